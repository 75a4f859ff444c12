"""Cross-validation on a Ray cluster: how many folds train at once, and the whole command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from job.runs.layout import CROSS_VALIDATION_NAME
from launcher.commands.train import _arguments
from launcher.commands.train import command as launch_train
from launcher.config import LaunchConfig
from tests.job.discs import prepare_discs
from tests.launcher.conftest import PROJECT, Launch, RayCluster

pytestmark = pytest.mark.cluster

SIDE_BY_SIDE = """
import json, sys
from flexunet.errors import UsageError
from launcher.cluster.connection import connected
from launcher.commands.train import _side_by_side
from launcher.config import LaunchConfig
with connected(sys.argv[1], worker_logs=False):
    for settings in ({}, {"num_workers": 2}, {"num_workers": 3}, {"cpus_per_worker": 2}):
        try:
            count, sized = _side_by_side(5, LaunchConfig(**settings))
            print(json.dumps([count, sized.cpus_per_worker]))
        except UsageError as error:
            print(json.dumps(str(error)))
"""


def test_as_many_folds_go_side_by_side_as_have_room(ray_cluster: RayCluster) -> None:
    command = [sys.executable, "-c", SIDE_BY_SIDE, ray_cluster.address]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one_worker, two_workers, three_workers, two_cpus = map(json.loads, done.stdout.splitlines())
    # Two nodes of one CPU: two folds of one worker, one fold of two, none of three.
    assert one_worker == [2, 1]
    assert two_workers == [1, 1]
    assert "3 workers with" in three_workers
    assert "the cluster fits 0" in two_cpus


@pytest.mark.parametrize(
    "settings",
    [
        LaunchConfig(),
        LaunchConfig(
            address="head:6379", num_workers=3, gpus_per_worker=1, cpus_per_worker=2,
            max_failures=0, max_preemptions=4, wait_for_nodes=True, join_timeout=7.5,
        ),
    ],
)  # fmt: skip
def test_arguments_give_the_same_settings_again(settings: LaunchConfig) -> None:
    context = launch_train.make_context("train", _arguments(settings))
    given = {name: context.params[name] for name in LaunchConfig.model_fields}
    present = {name: value for name, value in given.items() if value is not None}
    assert LaunchConfig.model_validate(present) == settings


@pytest.mark.faults
def test_launch_trains_every_fold_and_pools_them(
    ray_cluster: RayCluster, tmp_path: Path, flexunet: Launch
) -> None:
    data = prepare_discs(tmp_path, num_images=15, side=16)
    done = flexunet(
        *("launch", "train", "--folds", 3, "--address", ray_cluster.address, "--data", data),
        *("--output", tmp_path / "runs", "--name", "cv", "--epochs", 1, "--no-tensorboard"),
        *("--prediction-images", 0, "--precision", "float32", "--no-progress"),
        *("--model.num-layers", 2, "--model.base-filters", 4),
    )
    assert done.returncode == 0, done.stderr
    assert "3 folds, 2 at a time" in done.stderr
    names = ("cv", "cv-fold-0", "cv-fold-1", "cv-fold-2")
    plans = {(tmp_path / "runs" / name / "plan.json").read_bytes() for name in names}
    assert len(plans) == 1
    summary = json.loads((tmp_path / "runs" / "cv" / CROSS_VALIDATION_NAME).read_text())
    assert summary["sizes"]["network"]["pooled"]["num_cases"] == 12
