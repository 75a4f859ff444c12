"""Setups of trainings as the tests need them."""

from typing import Any

from job.config import TrainConfig
from job.data.folds import open_folded
from job.distributed.process_group import ProcessGroup
from job.runs.run import Run
from job.training.setup import TrainingSetup


def one_process_setup(config: TrainConfig, run: Run | None, strategy: Any) -> TrainingSetup:
    """Returns the setup of this process alone; opens the dataset of `config`."""
    return TrainingSetup(config, open_folded(config), run, strategy, ProcessGroup(strategy))
