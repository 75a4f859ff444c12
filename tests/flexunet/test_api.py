"""The names of `import flexunet`: all there, none imported before it is used."""

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import flexunet
from flexunet.errors import UsageError
from flexunet.storage import open_store

PROJECT = Path(__file__).resolve().parents[2]
HEAVY = (
    *("numpy", "pydantic", "tensorflow", "keras", "ray", "yaml", "google", "importlib.metadata"),
    "mlflow",
)


def test_every_name_is_the_one_of_its_module() -> None:
    assert flexunet.UsageError is UsageError
    assert flexunet.open_store is open_store
    for name in flexunet.__all__:
        assert getattr(flexunet, name) is not None
    assert set(flexunet.__all__) <= set(dir(flexunet))
    assert set(flexunet.__all__) - {"__version__"} == set(flexunet._MODULES)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'flexunet' has no attribute 'nothing'"):
        flexunet.nothing  # noqa: B018


def test_version_is_written_in_one_place() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert flexunet.__version__ == project["version"] == importlib.metadata.version("flexunet")
    others = ["Dockerfile", "Makefile"]
    assert [name for name in others if project["version"] in (PROJECT / name).read_text()] == []


def test_a_checkout_that_is_not_installed_has_an_unknown_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def not_installed(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    assert flexunet.__version__ == "0+unknown"
    names: dict[str, object] = {}
    exec("from flexunet import *", names)  # noqa: S102
    assert set(flexunet.__all__) <= set(names)


def test_import_is_quick_and_loads_no_library() -> None:
    code = (
        "import sys, time; begin = time.process_time(); import flexunet; "
        "seconds = time.process_time() - begin; "
        f"print(seconds < 0.2, [name for name in {HEAVY} if name in sys.modules])"
    )
    # Isolated: an editable install finds its modules by hooks that import some themselves.
    command = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        f"import sys; sys.path.append({str(PROJECT)!r}); {code}",
    ]
    assert subprocess.check_output(command, text=True) == "True []\n"
