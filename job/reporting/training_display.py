"""Shows a training run on a terminal: one bar for all epochs and a line for each epoch."""

import logging
from collections.abc import Mapping
from typing import Any

from flexunet.progress import Progress, load_bar
from job.config import TrainConfig
from job.data.folds import evaluated_words

logger = logging.getLogger(__name__)

# Long phases without a progress bar of their own, and their log lines.
_SHOWN_PHASES = {
    "building the network": "building the network",
    "evaluation": "evaluating {cases} with the best checkpoint",
}


class TrainingDisplay:
    """Shows one bar for all epochs of a run and a line for each epoch."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._progress: Progress | None = None
        self._phase = ""
        self._other: Progress | None = None  # of a worker: other work than steps
        self._other_title = ""

    def __enter__(self) -> "TrainingDisplay":
        load_bar()  # while no other thread imports anything
        return self

    def __exit__(self, *error: Any) -> None:
        self._close(*error)

    def _close(self, *error: Any) -> None:
        self._close_other()
        if self._progress is not None:
            self._progress.__exit__(*(error or (None, None, None)))
            self._progress = None

    def report(self, event: Mapping[str, Any]) -> None:
        """Shows a step, an epoch, or a long phase that has neither.

        The first step of each attempt opens the bar: a launcher shows several.
        """
        if event["event"] == "phase":
            self._close_other()
            self._show_phase(event["name"])
            return
        if event["event"] == "progress":
            self._show_other(event)
            return
        if event["event"] == "started":
            self._close()  # the steps of an attempt that died are trained again
        if self._progress is None and event["event"] == "step":
            self._close_other()
            self._progress = self._open(event)
        if self._progress is None:
            return
        if event["event"] == "step":
            note = f"epoch {_epoch_words(event)} step loss {event['loss']:.4f}"
            if "time_fraction" in event:
                note = f"{event['time_fraction']:.0%} of the time, {note}"
            self._progress.advance(event["num_images"], note)
        elif event["event"] == "epoch":
            self._progress.line(_epoch_line(event))

    def _show_other(self, event: Mapping[str, Any]) -> None:
        """Shows the progress of a worker, see `flexunet.progress.sent_by`."""
        if self._progress is not None:
            return  # a terminal has one bar at a time
        if self._other is None or self._other_title != event["title"]:
            self._close_other()
            self._other_title = event["title"]
            self._other = Progress.of(event, shown=self._config.progress).__enter__()
        self._other.follow(event)
        if event["is_over"]:
            self._close_other()

    def _close_other(self) -> None:
        if self._other is not None:
            self._other.__exit__(None, None, None)
            self._other = None

    def _show_phase(self, name: str) -> None:
        """Names a phase that shows nothing else for long."""
        if name.startswith("epoch ") and self._progress is None:
            text = f"compiling the first step of {name}"
        elif name in _SHOWN_PHASES and name != self._phase:
            text = _SHOWN_PHASES[name].format(cases=evaluated_words(self._config))
        else:
            return
        self._phase = name
        if self._progress is not None and name == "evaluation":
            self._close()  # there are no steps any more
        if self._progress is not None:
            self._progress.line(text)
        elif self._config.progress:
            logger.info("%s", text)

    def _open(self, event: Mapping[str, Any]) -> Progress:
        before = (event["step"] - 1) * self._config.global_batch_size
        done = event["epoch"] * event["epoch_images"] + before
        num_epochs = event["num_epochs"]
        total = None if num_epochs is None else num_epochs * event["epoch_images"]
        return Progress("train", total, done=done, shown=self._config.progress).__enter__()


def _epoch_words(event: Mapping[str, Any]) -> str:
    """Returns the number of an epoch, and of how many if that is known."""
    number = f"{event['epoch'] + 1:3d}" if event["event"] == "epoch" else f"{event['epoch'] + 1}"
    return number if event["num_epochs"] is None else f"{number}/{event['num_epochs']}"


def _epoch_line(row: Mapping[str, Any]) -> str:
    """Returns the numbers of an epoch in 80 columns; those after the bar are of validation."""
    dice = row["val_foreground_dice"]
    return (
        f"epoch {_epoch_words(row)} lr {row['learning_rate']:.1e} "
        f"loss {row['loss']:.4f} | val: loss {row['val_loss']:.4f} "
        f"foreground Dice {'-' if dice is None else f'{dice:.4f}'}"
    )
