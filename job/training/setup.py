"""Holds the setup of a training process and the callbacks of its caller."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flexunet.progress import Heartbeat, no_heartbeat
from job.config import TrainConfig
from job.data.dataset import Dataset
from job.distributed.process_group import ProcessGroup
from job.runs.run import Run

# Called with a mapping whose "event" is one of:
#   "phase": "name", "needs_peers"; before every part of the work
#   "started": "epoch" (epochs done), "num_epochs", "num_steps", "attempt"; before the first step
#   "step": "epoch", "num_epochs", "step", "num_steps", "loss", "num_images", "epoch_images",
#       "images_per_s", with a time budget also "time_fraction"; after every step
#   In each, "num_epochs" is None if only the time ends training.
#   "epoch": "num_epochs" and the row of the epoch; after every epoch
#   "checkpoint": "epoch" (epochs done), "step" (of the next), "checkpoint" (its folder); after the
#       step, epoch or end that follows its storing, of the first process alone
#   "evaluation": "summary"; when the evaluation of the test split was stored
Report = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class TrainingSetup:
    """Holds the config, dataset, run and processes of a training.

    Attributes:
        config: precision already resolved.
        dataset: dataset of `config`.
        run: run owned by this process; None except in the first process.
        strategy: a `tf.distribute.Strategy`.
        process_group: the processes that train together.
    """

    config: TrainConfig
    dataset: Dataset
    run: Run | None
    strategy: Any
    process_group: ProcessGroup


@dataclass(frozen=True)
class Callbacks:
    """Holds the functions by which a training process reports to its caller.

    Attributes:
        report: called with every event: phase, step, epoch and others.
        should_stop: called after every step and every batch of an evaluation. True ends training;
            a group of processes may train one more step before.
        heartbeat: called on progress in between, if that may take long.
    """

    report: Report
    should_stop: Callable[[], bool]
    heartbeat: Heartbeat = no_heartbeat

    def joined(self, other: "Callbacks") -> "Callbacks":
        """Returns callbacks that call these first, then `other`; either can stop training."""

        def report(event: Mapping[str, Any]) -> None:
            self.report(event)
            other.report(event)

        return Callbacks(report, lambda: self.should_stop() or other.should_stop(), self.heartbeat)

    def begin(self, phase: str, *, needs_peers: bool = True) -> None:
        """Reports that `phase` begins; `needs_peers`: it waits for the other processes."""
        self.report({"event": "phase", "name": phase, "needs_peers": needs_peers})
