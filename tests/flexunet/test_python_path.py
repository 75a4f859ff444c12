"""Files beside the user's data that are named as modules, and processes that must not run them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flexunet import python_path
from flexunet.python_path import safe_environment, safe_path, unsafe_folders

PROJECT = Path(__file__).resolve().parents[2]
# Modules that a pool process imports before it gets the path of its parent, and the next ones.
NAMES = ("socket", "pickle", "numpy", "cv2", "flexunet", "data_prep", "job", "launcher")
SCRIPT = """
import json, os, sys
from flexunet.process_pool import open_pool
from data_prep.imaging.codecs import read_image

if __name__ == "__main__":
    with open_pool(2) as pool:
        safe = os.environ["PYTHONSAFEPATH"]
        found = list(pool.map(abs, [-1, -2]))
        name = pool.submit(getattr, read_image, "__module__").result()
    print(json.dumps([safe, found, name, os.environ.get("PYTHONSAFEPATH")]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a folder with files that must not be run."""
    folder = tmp_path / "work"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.py").write_text("raise SystemExit('this file of the user was run')")
    return folder


def test_processes_of_a_pool_import_nothing_of_the_working_folder(folder: Path) -> None:
    # As `flexunet` does: a script's own folder is on the path, the working folder is not.
    script = folder.parent / "bin" / "script.py"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    environment.pop("PYTHONSAFEPATH", None)
    done = subprocess.run(
        [sys.executable, str(script)], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == ["1", [1, 2], "data_prep.imaging.codecs", None]


def test_safe_path_puts_back_what_the_user_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    with safe_path():
        assert os.environ["PYTHONSAFEPATH"] == "1"
    assert os.environ["PYTHONSAFEPATH"] == ""


def test_a_checkout_stays_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_path.sys, "path", ["", "/elsewhere"])
    monkeypatch.setenv("PYTHONPATH", "/more")
    monkeypatch.chdir(PROJECT)
    assert unsafe_folders() == [str(PROJECT)]
    assert safe_environment()["PYTHONPATH"] == f"{PROJECT}{os.pathsep}/more"
    monkeypatch.chdir("/")
    assert unsafe_folders() == []
    assert safe_environment()["PYTHONPATH"] == "/more"
    assert safe_environment()["PYTHONSAFEPATH"] == "1"
