"""The events of a training run, as `flexunet.train(on_event=...)` sends them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from job.training.setup import Callbacks


@dataclass(frozen=True)
class TrainingStarted:
    """Reports that the network, the data and the run are ready; the first step follows.

    Attributes:
        run: folder or gs:// URL of the run.
        num_epochs_done: epochs that earlier calls finished; 0 for a new run.
        num_epochs: epochs of the whole run; None if only its time ends it.
        num_steps: steps of each epoch.
        attempt: how often the run was started, from 1.
    """

    run: str
    num_epochs_done: int
    num_epochs: int | None
    num_steps: int
    attempt: int


@dataclass(frozen=True)
class StepEnded:
    """Reports a finished step.

    Attributes:
        epoch: the epoch in progress, from 1.
        num_epochs: epochs of the whole run; None if only its time ends it.
        step: the step of the epoch, from 1.
        num_steps: steps of each epoch.
        loss: mean over the images of the step.
        images_per_s: mean since the second step of the epoch; 0 after the first.
    """

    epoch: int
    num_epochs: int | None
    step: int
    num_steps: int
    loss: float
    images_per_s: float


@dataclass(frozen=True)
class EpochEnded:
    """Reports a trained and validated epoch.

    Attributes:
        epoch: the epoch that ended, from 1.
        num_epochs: epochs of the whole run; None if only its time ends it.
        metrics: the row of `Run.history` without its epoch: `loss`, `val_loss`,
            `val_foreground_dice`, `learning_rate` and others; None where a value is not defined.
    """

    epoch: int
    num_epochs: int | None
    metrics: Mapping[str, float | None]


@dataclass(frozen=True)
class CheckpointStored:
    """Reports a stored checkpoint; the same call resumes after it.

    Attributes:
        num_epochs_done: whole epochs in it.
        step: steps of the next epoch in it.
        checkpoint: its folder in the run.
    """

    num_epochs_done: int
    step: int
    checkpoint: str


@dataclass(frozen=True)
class EvaluationEnded:
    """Reports the stored evaluation of the test split with the best checkpoint.

    Attributes:
        summary: as `Run.summary`.
    """

    summary: Mapping[str, Any]


@dataclass(frozen=True)
class TrainingEnded:
    """Reports the end of the call; the last event after `TrainingStarted`.

    Attributes:
        status: "stopped": a checkpoint was stored, the same call resumes; "failed": an error that
            is raised after this event.
    """

    status: Literal["finished", "stopped", "diverged", "failed"]


Event = (
    TrainingStarted | StepEnded | EpochEnded | CheckpointStored | EvaluationEnded | TrainingEnded
)
"""An event of a training run."""


class EventSender:
    """Sends the events of a run to a function; an exception of the function stops the run.

    Attributes:
        failure: what the function raised; it gets no event after that.
    """

    def __init__(self, on_event: Callable[[Event], object], run: str) -> None:
        """Sends the events of the run at the URL `run` to `on_event`."""
        self.failure: Exception | None = None
        self._on_event = on_event
        self._run = run
        self._has_started = False

    @property
    def callbacks(self) -> Callbacks:
        """The callbacks for the training process."""
        return Callbacks(self._report, lambda: self.failure is not None)

    def end(self, status: Literal["finished", "stopped", "diverged", "failed"]) -> None:
        """Sends the end of the run, with its status."""
        if self._has_started:
            self._send(TrainingEnded(status))

    def _report(self, event: Mapping[str, Any]) -> None:
        found = _event_of(event, self._run)
        self._has_started = self._has_started or isinstance(found, TrainingStarted)
        if found is not None:
            self._send(found)

    def _send(self, event: Event) -> None:
        if self.failure is None:
            try:
                self._on_event(event)
            except Exception as error:
                self.failure = error


def _event_of(event: Mapping[str, Any], run: str) -> Event | None:
    """Returns an event of a training process as one of the API; None where it has none."""
    kind = event["event"]
    if kind == "started":
        return TrainingStarted(
            run=run,
            num_epochs_done=event["epoch"],
            num_epochs=event["num_epochs"],
            num_steps=event["num_steps"],
            attempt=event["attempt"],
        )
    if kind == "step":
        names = ("num_epochs", "step", "num_steps", "loss", "images_per_s")
        return StepEnded(epoch=event["epoch"] + 1, **{name: event[name] for name in names})
    if kind == "epoch":
        others = ("event", "epoch", "num_epochs")
        metrics = {name: value for name, value in event.items() if name not in others}
        return EpochEnded(event["epoch"] + 1, event["num_epochs"], metrics)
    if kind == "checkpoint":
        return CheckpointStored(event["epoch"], event["step"], event["checkpoint"])
    return EvaluationEnded(event["summary"]) if kind == "evaluation" else None
