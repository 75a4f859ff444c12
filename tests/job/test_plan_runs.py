"""Planned runs with the real command: a kill, a resume, and the dry step's process."""

import json
from pathlib import Path

import numpy as np
import pytest

from flexunet.errors import StoppedError
from job.planning.facts import MachineFacts
from job.planning.options import resolve_config
from job.planning.plan_file import PLAN_NAME
from job.planning.settle import preview
from job.planning.situation import GIB
from job.training.dry_step import measure_step
from tests import commands
from tests.job.processes import run_alone, training, wait_until, weights_of

LAPTOP = MachineFacts(
    host="laptop", device="cpu", memory_bytes=16 * GIB, cores=2, precision="float32"
)


@pytest.mark.cluster
def test_a_planned_run_that_is_killed_resumes_bit_by_bit(discs: str, tmp_path: Path) -> None:
    options = ["--data", discs, "--output", str(tmp_path), "--deterministic", "--epochs", "3"]
    options += ["--model.num-layers", "3", "--model.base-filters", "4", "--no-tensorboard"]
    options += ["--prediction-images", "0", "--checkpoint-every-minutes", "0.0001"]
    run_alone([*options, "--name", "whole"])
    words = training(["--local", *options, "--name", "killed"])
    run = tmp_path / "killed"
    with commands.start(*words) as process:
        wait_until(lambda: len(list(run.glob("checkpoints/*/*/COMMIT.json"))) > 1, [process])
        process.kill()
        process.wait()
    plan = (run / PLAN_NAME).read_bytes()
    assert not (run / "outcome.json").exists()
    run_alone([*options, "--name", "killed"])
    assert (run / PLAN_NAME).read_bytes() == plan
    first, second = weights_of(tmp_path / "whole"), weights_of(run)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert np.array_equal(value, second[name]), name
    configs = [
        json.loads((tmp_path / n / "identity.json").read_text()) for n in ("whole", "killed")
    ]
    assert configs[0] == configs[1]
    assert configs[0]["config"]["optimizer.name"] == "adamw"


@pytest.mark.cluster
def test_a_dry_step_measures_and_ends_before_the_memory_does(discs: str, tmp_path: Path) -> None:
    values = {"data": discs, "output": str(tmp_path), "precision": "float32"}
    config = preview(resolve_config(values, None), LAPTOP)
    found = measure_step(config, LAPTOP, lambda: False)
    assert found.fits
    assert 0.2 * GIB < found.memory_bytes < 3 * GIB
    assert 0 < found.step_s < 60
    # TensorFlow alone needs more than this.
    small = LAPTOP.model_copy(update={"memory_bytes": GIB // 4})
    found = measure_step(config, small, lambda: False)
    assert not found.fits
    assert found.memory_bytes > 0.9 * GIB / 4
    with pytest.raises(StoppedError, match="before training began"):
        measure_step(config, LAPTOP, lambda: True)
