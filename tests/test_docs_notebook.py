"""The notebook of the documentation runs from top to bottom in a kernel of its own.

It takes 31 s of CPU time, about 25 s on an idle machine of two cores.
"""

import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.source_tree import ROOT

NOTEBOOK = ROOT / "docs" / "notebooks" / "first-model.ipynb"


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_notebook_is_stored_without_outputs() -> None:
    """What a cell shows would be of another version one day, and images fill the history."""
    cells = [each for each in read().cells if each.cell_type == "code"]
    assert [each.outputs for each in cells] == [[]] * len(cells)
    assert [each.execution_count for each in cells] == [None] * len(cells)
    text = nbformat.writes(read()) + "\n"
    assert NOTEBOOK.read_text(encoding="utf-8") == text
    # TensorFlow first: FlexUNet must work in a process that has used it.
    assert cells[0].source.startswith("import tensorflow")


@pytest.mark.cluster
# Jupyter's own.
@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *([path] if path else [])]))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = read()
    NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    # The lines of the log, the number of the last cells, and three figures.
    assert "epoch   5/5" in text
    assert "already in use" not in text
    found = re.search(r"55 steps, foreground Dice of the test split: (0\.\d+)", text)
    assert found is not None
    assert float(found[1]) > 0.1
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert (tmp_path / "runs" / "first" / "report.html").is_file()
