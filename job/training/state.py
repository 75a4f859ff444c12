"""Holds the state of a training run, except weights and moments."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from job.config import ScheduleConfig, TrainConfig
from job.data.sampling import share_at
from job.optimization.schedule import (
    EarlyStopping,
    PlateauReducer,
    rate_factor,
    timed_rate_factor,
)
from job.optimization.time_schedule import Record, TimeSchedule, seconds_of


@dataclass(frozen=True)
class EpochNumbers:
    """The numbers of a trained and validated epoch.

    Attributes:
        row: of `history.csv`.
        class_dice: of `class_dice.csv`.
    """

    row: dict[str, Any]
    class_dice: dict[str, Any]


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
    time: TimeSchedule | None = None  # of a run with a time budget
    # Samples with foreground in the epoch in progress, where their share falls: a later attempt may
    # have more epochs or time, but keeps the order of the samples that this epoch began with.
    epoch_share: float | None = None

    def __post_init__(self) -> None:
        """Takes the values of a checkpoint."""
        stored: Any = self.time
        if isinstance(stored, dict):
            self.time = TimeSchedule(**stored)

    def as_values(self) -> dict[str, Any]:
        """Returns the values for a checkpoint, in JSON types."""
        values = dataclasses.asdict(self)
        if self.step_in_epoch == 0:
            values["epoch_share"] = None  # the next epoch decides again
        for name in ("time", "epoch_share"):  # earlier versions do not know them
            if values[name] is None:
                del values[name]
        return values

    def begin(self, config: TrainConfig, record: Record | None) -> None:
        """Begins an attempt.

        Args:
            record: of the time of another run, to follow instead of the clock.
        """
        if config.time_budget is None:
            self.time = None
            return
        budget_s = seconds_of(config.time_budget)
        if self.time is None:
            self.time = TimeSchedule(budget_s)
        if record is not None:
            self.time.follow(record)
        self.time.begin(budget_s, self.step)

    @property
    def updates(self) -> int:
        """Number of weight updates, which the optimizer and the schedule count."""
        return self.step - self.skipped

    def is_time_over(self) -> bool:
        """Whether the time budget, if there is one, leaves no time for a step."""
        return self.time is not None and self.time.is_over

    def is_finished(self, config: TrainConfig) -> bool:
        """Returns whether no epoch is left."""
        is_last = config.epochs is not None and self.epoch >= config.epochs
        # The epoch that the time cuts short is validated, too, also after a restart.
        is_cut = self.is_time_over() and self.step_in_epoch == 0
        return self.stopped_early or is_last or is_cut

    def end_step(self, used_s: float | None) -> None:
        """Counts a step.

        Args:
            used_s: training time at its start, the same in all processes; None: no time budget.
        """
        self.step += 1
        self.step_in_epoch += 1
        if self.time is not None and used_s is not None:
            self.time.note(used_s, self.step)

    def note_epoch_end(self, used_s: float | None) -> None:
        """Takes the training time after the validation of an epoch, the same in all processes."""
        if self.time is not None and used_s is not None:
            self.time.note_epoch_end(used_s, self.step)

    def note_used(self, used_s: float | None) -> None:
        """Takes the training time of a checkpoint; the schedule changes only with the next step."""
        if self.time is not None and used_s is not None:
            self.time.used_s = used_s

    def time_outcome(self) -> dict[str, Any]:
        """Returns the time of a finished run, for its outcome; empty without a time budget."""
        if self.time is None:
            return {}
        return {
            "time_budget_s": self.time.budget_s,
            "time_used_s": self.time.used_s,
            "is_time_over": self.is_time_over(),
        }

    def rate(self, config: TrainConfig, num_steps: int, *, offset: int = 0) -> float:
        """Returns the learning rate of the next update, or of the one `offset` from it.

        Args:
            num_steps: steps per epoch.
        """
        step, schedule = max(0, self.updates + offset), config.schedule
        if self.time is None:
            return self.learning_rate * rate_factor(
                step,
                steps_per_epoch=num_steps,
                epochs=config.epochs,
                warmup_epochs=schedule.warmup_epochs,
                is_cosine=schedule.cosine,
            )
        fraction = self.time.fraction_at(self.step + offset)
        if config.epochs is not None:  # whichever ends first
            fraction = max(fraction, min(1.0, step / (config.epochs * num_steps)))
        return self.learning_rate * timed_rate_factor(
            step,
            fraction,
            steps_per_epoch=num_steps,
            warmup_epochs=schedule.warmup_epochs,
            is_cosine=schedule.cosine,
        )

    def foreground_share(self, config: TrainConfig) -> float | None:
        """Returns the share of samples with foreground in the epoch in progress.

        Its first call in an epoch decides for all of it.
        """
        if self.step_in_epoch == 0 or self.epoch_share is None:
            progress = 0.0 if config.epochs is None else self.epoch / max(1, config.epochs - 1)
            if self.time is not None:
                progress = max(progress, self.time.fraction_at(self.step - self.step_in_epoch))
            share = share_at(config.foreground_share, config.foreground_share_end, progress)
            self.epoch_share = None if config.foreground_share_end is None else share
            return share
        return self.epoch_share

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


def diverged_words(config: TrainConfig, state: TrainState, problem: str) -> str:
    """Returns the reason of a run that diverged, and what to change.

    Args:
        problem: what is not finite.
    """
    remedy = "lower --optimizer.learning-rate or give --model.input-scaling=unit"
    if config.precision == "mixed_float16":
        remedy += ", or train a run with --precision float32"
    return (
        f"{config.output}/{config.name}: {problem} in epoch {state.epoch + 1}, step "
        f"{state.step_in_epoch}; {remedy}"
    )
