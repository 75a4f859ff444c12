"""Runs that earlier versions began: they open, go on and are evaluated with the same command.

Three processes train, 25 s together. See tests/relics/README.md.
"""

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from flexunet.storage import open_store
from job.runs.checkpoints import find_checkpoints
from job.runs.loading import open_run
from job.runs.status import run_status
from tests import commands

pytestmark = pytest.mark.cluster

PROJECT = Path(__file__).resolve().parents[2]
RELICS = PROJECT / "tests" / "relics" / "v0.1.0"
# The command that began them; what it says is also what makes a new run of it.
OPTIONS = {
    "epochs": "3", "global-batch-size": "2", "precision": "float64", "threads": "1",
    "prediction-images": "0", "checkpoint-every-minutes": "0", "model.num-layers": "2",
    "model.base-filters": "2", "model.base-kernels": "3,3", "model.dropout-rate": "0.1",
    "optimizer.learning-rate": "0.003", "augmentation.deformation-probability": "0.5",
}  # fmt: skip
FLAGS = ["--deterministic", "--no-tensorboard", "--no-progress", "--augmentation.enabled"]
STOPPED = ["--name", "stopped", "--model.normalization", "group"]
FOLDS = ["--name", "folds", "--folds", "3", "--keep-checkpoints", "1"]


@pytest.fixture
def relics(tmp_path: Path) -> Path:
    """Returns a copy of what version 0.1.0 has left."""
    return Path(shutil.copytree(RELICS, tmp_path / "relics"))


def run_command(module: str, *arguments: str) -> str:
    """Returns what a command wrote to stderr."""
    done = commands.run("tests.script", "--forks", "-m", module, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stderr


def train(relics: Path, *arguments: str) -> str:
    """Returns what the command that began a relic writes to stderr now."""
    options = OPTIONS | {"data": str(relics / "dataset"), "output": str(relics / "runs")}
    given = [part for name, value in options.items() for part in (f"--{name}", value)]
    return run_command("job.train", "--local", *FLAGS, *given, *arguments)


def assert_same_table(found: Path, expected: Path) -> None:
    """Checks that two tables have the same columns, words, and numbers to 1e-7.

    A later version may add columns at the end.
    """
    tables = [list(csv.reader(path.read_text().splitlines())) for path in (found, expected)]
    num_columns = len(tables[1][0])
    tables[0] = [row[:num_columns] for row in tables[0]]
    assert [len(row) for row in tables[0]] == [len(row) for row in tables[1]]
    for row, other in zip(*tables, strict=True):
        for cell, wanted in zip(row, other, strict=True):
            try:
                numbers = float(cell), float(wanted)
            except ValueError:
                assert cell == wanted
            else:
                assert math.isclose(*numbers, rel_tol=1e-7, abs_tol=1e-9), (found.name, row)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_run_stopped_in_an_epoch_goes_on_to_the_end_it_would_have_had(relics: Path) -> None:
    run = relics / "runs" / "stopped"
    identity = (run / "identity.json").read_bytes()
    errors = train(relics, *STOPPED)
    assert "resuming from checkpoints/step-00000007/a1" in errors
    assert "keeps the options of its first start: --random-streams 1" in errors
    assert (run / "identity.json").read_bytes() == identity
    expected = relics / "expected"
    assert_same_table(run / "metrics" / "history.csv", expected / "stopped-history.csv")
    assert_same_table(run / "evaluation" / "per_case.csv", expected / "stopped-per_case.csv")
    # Those of version 0.1.0 are gone by now, as they would be with that version.
    steps = [ref.step for ref in find_checkpoints(open_store(str(run)))]
    assert steps == [10, 15]
    assert run_status(open_store(str(run))) == "finished"


def test_folds_go_on_to_the_end_they_would_have_had(relics: Path) -> None:
    runs = relics / "runs"
    finished = (runs / "folds-fold-0" / "evaluation" / "summary.json").read_bytes()
    train(relics, *FOLDS)
    for fold in range(3):
        run, name = runs / f"folds-fold-{fold}", f"folds-fold-{fold}"
        assert read_json(run / "outcome.json")["status"] == "finished"
        expected = relics / "expected"
        assert_same_table(run / "metrics" / "history.csv", expected / f"{name}-history.csv")
        assert_same_table(
            run / "evaluation" / "measures_network.csv",
            expected / f"{name}-measures_network.csv",
        )
        # A fold that was not begun yet is one of the same cross-validation.
        assert "random_streams" not in read_json(run / "identity.json")["config"]
    assert (runs / "folds-fold-0" / "evaluation" / "summary.json").read_bytes() == finished
    pooled = read_json(runs / "folds" / "cross_validation.json")
    assert pooled["num_folds"] == 3
    assert pooled["sizes"]["network"]["pooled"]["num_groups"] == 13


def test_a_finished_run_is_evaluated_again_to_the_same_numbers(relics: Path) -> None:
    run = relics / "runs" / "folds-fold-0"
    before = {path.name: path.read_text() for path in (run / "evaluation").glob("*.csv")}
    data = ["--data", str(relics / "dataset")]
    run_command("job.evaluate", str(run), *data, "--no-progress")
    for name, text in before.items():
        (relics / name).write_text(text)
        assert_same_table(run / "evaluation" / name, relics / name)
    run_command("job.report", str(run))
    assert (run / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["stopped", "folds-fold-0", "folds-fold-1"])
def test_a_stored_config_means_what_it_meant(name: str) -> None:
    config = open_run(str(RELICS / "runs" / name)).config
    assert (config.random_streams, config.xla) == (1, "auto")
    assert config.epochs == 3
