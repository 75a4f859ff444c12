"""The comparison of methods measures a cell of a tiny set once, and goes on where it stopped."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import commands
from tests.source_tree import ROOT

SCRIPT = str(ROOT / "benchmarks" / "quality.py")


def write_set(folder: Path) -> None:
    """Writes nine images with a black membrane between white cells, as those of ISBI."""
    for name in ("image", "label"):
        (folder / name).mkdir(parents=True)
    for number in range(9):
        mask = np.full((32, 32), 255, np.uint8)
        mask[number + 8 : number + 12] = 0
        Image.fromarray(mask).save(folder / "label" / f"{number}.png")
        Image.fromarray(mask // 2 + 64).save(folder / "image" / f"{number}.png")


def test_a_cell_is_measured_once(tmp_path: Path) -> None:
    write_set(tmp_path / "isbi-membrane")
    environment = os.environ | {"FLEXUNET_BENCHMARK_RESULTS": str(tmp_path / "results")}
    words = [
        "tests.script",
        "--forks",
        SCRIPT,
        str(tmp_path),
        "--sets",
        "isbi-membrane",
        "--folds",
        "1",
    ]
    words += ["--minutes", "0.01", "--methods"]
    done = commands.run(*words, "auto", environment=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = (tmp_path / "results" / "quality").glob("*.json")
    cell = json.loads(path.read_text())
    assert len(cell["dice"]) == cell["num_images"]["test"] == 3
    assert cell["mean_dice"] == pytest.approx(np.mean(list(cell["dice"].values())))
    assert all(minutes > 0 for minutes, _ in cell["curve"])
    table = (path.parent / "table.md").read_text()
    assert f"| auto | {cell['mean_dice']:.3f} |" in table
    # Another seed would train again: the cell that exists does not.
    path.write_text(json.dumps(cell | {"mean_dice": 0.25}))
    again = commands.run(*words, "auto", environment=environment, timeout=60)
    assert again.returncode == 0, again.stderr
    assert "0.250" in again.stdout
