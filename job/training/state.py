"""Holds the state of a training run, except weights and moments."""

from dataclasses import dataclass, field
from typing import Any

from job.config import ScheduleConfig, TrainConfig
from job.data.sampling import share_at
from job.optimization.schedule import EarlyStopping, PlateauReducer, rate_factor


@dataclass
class TrainState:
    """Holds the state of a run; JSON types only, so that floats are restored bit by bit."""

    learning_rate: float
    epoch: int = 0  # the epoch in progress, from 0
    step_in_epoch: int = 0
    step: int = 0  # batches trained, including skipped ones
    sums: dict[str, list[float]] = field(default_factory=dict)  # of the epoch in progress
    rows: list[dict[str, Any]] = field(default_factory=list)  # of the finished epochs
    throughput: list[dict[str, Any]] = field(default_factory=list)  # of the same
    reducer: dict[str, Any] | None = None  # None before the first epoch has ended
    stopping: dict[str, Any] | None = None
    best: dict[str, Any] | None = None  # {"epoch", "val_loss", "step", "attempt"}
    stopped_early: bool = False
    skipped: int = 0  # steps without an update, whose float16 gradients overflowed

    @property
    def updates(self) -> int:
        """Number of weight updates, which the optimizer and the schedule count."""
        return self.step - self.skipped

    def is_finished(self, epochs: int) -> bool:
        """Returns whether no epoch is left."""
        return self.stopped_early or self.epoch >= epochs

    def rate(self, config: TrainConfig, num_steps: int, *, offset: int = 0) -> float:
        """Returns the learning rate of the next update, or of the one `offset` from it.

        Args:
            num_steps: steps per epoch.
        """
        return self.learning_rate * rate_factor(
            max(0, self.updates + offset),
            steps_per_epoch=num_steps,
            epochs=config.epochs,
            warmup_epochs=config.schedule.warmup_epochs,
            is_cosine=config.schedule.cosine,
        )

    def foreground_share(self, config: TrainConfig) -> float | None:
        """Returns the share of samples with foreground in the epoch in progress."""
        progress = self.epoch / max(1, config.epochs - 1)
        return share_at(config.foreground_share, config.foreground_share_end, progress)

    def watch(self, val_loss: float, settings: ScheduleConfig) -> bool:
        """Updates both schedules with the loss of the epoch; returns whether it is the best."""
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
