"""`tests/golden.py` finds differences, and leaves no files behind."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from flexunet.errors import EXIT_CODES
from tests.golden_outcomes import (
    Item,
    Side,
    differences,
    import_problem,
    invalid,
    normalised,
    strays,
)

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


def test_blanks_count_beside_inline_tags_and_in_verbatim_text() -> None:
    side = Side(Path("/trees/base"), Path("/work/base"))

    def shown(text: str) -> str:
        return normalised("report.html", text, side)

    assert shown("<tr>\n  <td> 1 </td>\n</tr>\n<p>a") == shown("<tr><td>1</td></tr> <p>a")
    assert shown("<p>Dice <b>0.9</b> over") != shown("<p>Dice<b>0.9</b>over")
    assert shown("<pre>\n a: 1</pre>\n") == shown("<pre>\n a: 1</pre>") != shown("<pre>a: 1</pre>")


def test_a_mistake_is_answered_with_its_exit_code_and_without_a_traceback() -> None:
    item = Item("mistake: no source", "flexunet prep nowhere out", code=2)
    answer = {"exit code": "2", "stderr": "no such folder", "imports": ""}
    assert invalid(item, answer) == []
    assert invalid(item, answer | {"exit code": "3"}) == [
        "of BASE: exit code 3, not 2: no such folder"
    ]
    traceback = "Traceback (most recent call last):\n"
    assert invalid(item, answer | {"stderr": traceback}) == ["of BASE: a traceback in stderr"]


def test_files_that_no_item_makes_are_found(tmp_path: Path) -> None:
    for name in ("data/a/b.txt", "wrong.yaml", "beside.txt", "data-2/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert strays(tmp_path, ["data", "wrong.yaml"]) == {"beside.txt", "data-2/c.txt"}


def test_every_mistake_has_an_exit_code_that_is_documented() -> None:
    mistakes = tomllib.loads((FOLDER / "golden.toml").read_text())["mistakes"]
    assert {int(code) for code in mistakes} <= set(EXIT_CODES) - {0}


def test_code_of_another_tree_is_a_problem(tmp_path: Path) -> None:
    notes, side = tmp_path / "notes", Side(tmp_path / "tree", tmp_path / "work")
    item = Item("two", "flexunet prep", processes=2)
    notes.write_text(f"7 {side.tree}/job/__init__.py\n8 {side.tree}/job/__init__.py\n")
    assert import_problem(item, side, notes) == ""
    notes.write_text(f"7 {side.tree}/job/__init__.py\n8 /usr/lib/job/__init__.py\n")
    assert import_problem(item, side, notes) == "/usr/lib/job/__init__.py was imported"
    notes.write_text(f"7 {side.tree}/job/__init__.py\n")
    assert import_problem(item, side, notes) == "1 of 2 processes import it"
