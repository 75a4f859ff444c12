"""`tests/golden.py` sees what differs, and leaves nothing behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden_outcomes import Item, Side, differences, import_problem, normalised

FOLDER = Path(__file__).resolve().parent


def test_a_mistake_is_equal_to_itself(tmp_path: Path) -> None:
    known = subprocess.run(
        ["git", "-C", FOLDER, "rev-parse", "--verify", "HEAD"], capture_output=True
    )
    if known.returncode:
        pytest.skip(f"{FOLDER} is in no git repository")
    command = [
        sys.executable,
        FOLDER / "golden.py",
        "HEAD",
        "--only",
        "mistake: launch, an unknown",
    ]
    done = subprocess.run(
        command, env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True
    )
    first, last = done.stdout.splitlines()
    # Uncommitted work may have changed the message.
    assert first.split()[0] == ("DIFFERENT" if done.returncode else "equal"), done.stderr
    assert last.startswith(f"{done.returncode} of 1 differ"), done.stderr
    assert not list(tmp_path.iterdir())
    trees = subprocess.run(
        ["git", "-C", FOLDER, "worktree", "list"], capture_output=True, text=True
    )
    assert str(tmp_path) not in trees.stdout


def test_differences_names_what_changed() -> None:
    base = {
        "exit code": "2",
        "stderr": "size 8\nis small\n",
        "mask.png": "sha256 0",
        "seconds": "1",
    }
    assert differences(base, base | {"seconds": "2"}) == []
    head = {"exit code": "2", "stderr": "size 9\nis small\n", "seconds": "1"}
    assert differences(base, head) == ["stderr:", "  -size 8", "  +size 9", "mask.png: only before"]


def test_normalised_takes_away_no_more_than_it_says() -> None:
    side = Side(Path("/trees/base"), Path("/work/base"))
    text = "/work/base/data: 3 images\nencoding: 3/3 images, 17.3 images/s\n"
    assert normalised("stderr", text, side) == "<work>/data: 3 images\n"
    assert normalised("table.csv", text, side) == text.replace("/work/base", "<work>")


def test_code_of_another_tree_is_a_problem(tmp_path: Path) -> None:
    notes, side = tmp_path / "notes", Side(tmp_path / "tree", tmp_path / "work")
    item = Item("two", "flexunet prep", processes=2)
    notes.write_text(f"7 {side.tree}/job/__init__.py\n8 {side.tree}/job/__init__.py\n")
    assert import_problem(item, side, notes) == ""
    notes.write_text(f"7 {side.tree}/job/__init__.py\n8 /usr/lib/job/__init__.py\n")
    assert import_problem(item, side, notes) == "/usr/lib/job/__init__.py was imported"
    notes.write_text(f"7 {side.tree}/job/__init__.py\n")
    assert import_problem(item, side, notes) == "1 of 2 processes import it"
