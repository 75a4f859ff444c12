"""Where a training run stands: all that a restart needs beside weights and moments."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class TrainState:
    """The state of a run; JSON types only, so that floats come back bit by bit."""

    learning_rate: float
    epoch: int = 0  # the epoch in progress, from 0
    step_in_epoch: int = 0
    step: int = 0  # batches trained, of which some may have been skipped
    sums: dict[str, list[float]] = field(default_factory=dict)  # of the epoch in progress
    rows: list[dict[str, Any]] = field(default_factory=list)  # of the finished epochs
    throughput: list[dict[str, Any]] = field(default_factory=list)  # of the same
    reducer: dict[str, Any] | None = None  # None before the first epoch has ended
    stopping: dict[str, Any] | None = None
    best: dict[str, Any] | None = None  # {"epoch", "val_loss", "step", "attempt"}
    stopped_early: bool = False
    skipped: int = 0  # steps without an update: in float16 their gradients overflowed

    @property
    def updates(self) -> int:
        """Updates of the weights: the steps that count for the optimizer and the schedule."""
        return self.step - self.skipped

    def is_finished(self, epochs: int) -> bool:
        """Returns whether no epoch is left to do."""
        return self.stopped_early or self.epoch >= epochs
