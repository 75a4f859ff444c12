"""The command `flexunet plan` shows the plan of a dataset and stores nothing."""

from pathlib import Path

import pytest

from job.plan import main
from job.planning.plan_file import PLANNED, Plan


def files_below(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_the_plan_is_a_table_that_fits_a_terminal(
    discs: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    before = files_below(Path(discs))
    assert main([discs, "--dry-step", "never", "--optimizer.learning-rate", "0.002"]) == 0
    lines = capsys.readouterr().out.splitlines()
    notes = [line for line in lines if line.startswith("note: ")]
    assert max(len(line) for line in lines if line not in notes) <= 80
    # A command in a note can be copied: it is on one line.
    assert "flexunet prep SOURCE DATASET" in notes[0]
    (given,) = (line for line in lines if "0.002" in line)
    assert "given" in given
    assert files_below(Path(discs)) == before


def test_a_file_gives_options_and_the_command_replaces_them(
    discs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("seed: 5\nmodel:\n  num_layers: 2\n  base_filters: 6\n")
    words = ["--config", str(file), "--model.base-filters", "4", "--dry-step", "never", "--json"]
    assert main([discs, *words]) == 0
    plan = Plan.model_validate_json(capsys.readouterr().out)
    assert (plan.value("model.num_layers"), plan.value("model.base_filters")) == (2, 4)
    assert {each.option for each in plan.choices} == PLANNED
    assert not plan.chose("model.num_layers")


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("project.config", "[model]\nnum_layers = 3\n", "sets all options itself"),
        ("options.yaml", "model: {num_layers: many}\n", "num_layers"),
    ],
)
def test_a_file_that_cannot_be_planned_for_is_refused(
    name: str, text: str, problem: str, discs: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / name).write_text(text)
    assert main([discs, "--config", str(tmp_path / name)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("flexunet plan: ")
    assert problem in line
