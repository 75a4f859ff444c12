"""Holds where a training run stands beside weights and moments; schedules move it on."""

from dataclasses import dataclass, field
from typing import Any

from job.config import ScheduleConfig, TrainConfig
from job.optimization.schedule import EarlyStopping, PlateauReducer, rate_factor


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

    def rate(self, config: TrainConfig, num_steps: int, *, offset: int = 0) -> float:
        """Returns the learning rate of the update that comes next, or `offset` from it.

        Args:
            num_steps: of an epoch.
        """
        return self.learning_rate * rate_factor(
            max(0, self.updates + offset),
            steps_per_epoch=num_steps,
            epochs=config.epochs,
            warmup_epochs=config.schedule.warmup_epochs,
            is_cosine=config.schedule.cosine,
        )

    def watch(self, val_loss: float, settings: ScheduleConfig) -> bool:
        """Lets both schedules see the loss of the epoch; returns whether it is the best so far."""
        if settings.reduce_on_plateau:
            reducer = PlateauReducer(
                factor=settings.reducer_factor,
                patience=settings.reducer_patience,
                min_lr=settings.min_learning_rate,
            )
            if self.reducer is not None:
                reducer.load_state(self.reducer)
            self.learning_rate = reducer.update(val_loss, self.learning_rate)
            self.reducer = reducer.state()
        stopping = EarlyStopping(patience=settings.early_stopping_patience)
        if self.stopping is not None:
            stopping.load_state(self.stopping)
        self.stopped_early = stopping.update(val_loss, self.epoch)
        self.stopping = stopping.state()
        return self.best is None or val_loss < self.best["val_loss"]
