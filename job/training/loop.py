"""Trains until the epochs are done or training stops early, then evaluates the test split."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from flexunet.errors import DivergedError, UsageError
from flexunet.text import pluralize
from job.config import TrainConfig, identity_of
from job.distributed.process_group import peer_errors
from job.optimization.schedule import stopped_early_words
from job.optimization.time_schedule import seconds_of
from job.planning.options import stored_yaml
from job.reporting.html_report import renew_report
from job.runs.run import Run
from job.trackers.opening import send_ended_run
from job.training.setup import Callbacks, TrainingSetup
from job.training.state import TrainState

if TYPE_CHECKING:
    from job.training.trainer import Trainer

logger = logging.getLogger(__name__)

T = TypeVar("T")

_STORING = "storing the outcome"


def train_and_evaluate(setup: TrainingSetup, callbacks: Callbacks) -> dict[str, Any]:
    """Trains until the epochs are done or training stops early, then evaluates the test split.

    Resumes from the newest verified checkpoint of the run. Every epoch ends with tables, curves,
    predictions and, last, a checkpoint. All processes must call it.

    Returns:
        The outcome, as written to `outcome.json`.

    Raises:
        UsageError: the run was started with another dataset or other settings.
        StoppedError: `should_stop` returned true in one process; a checkpoint was written.
        DivergedError: the loss is not finite, or the gradient with every loss scale; the outcome
            was written.
        LockedError, StorageError: the run was lost, or could not be stored.
    """
    process_group, run = setup.process_group, setup.run
    outcome = process_group.run_on_primary(lambda: _looked_for_outcome(setup))
    if outcome is not None:
        ended = outcome
        process_group.run_on_primary(lambda: renew_ended_run(setup.config, run, ended))
        return outcome
    from job.training.trainer_factory import open_trainer

    callbacks.begin("building the network")
    with (
        open_trainer(setup, heartbeat=callbacks.heartbeat) as trainer,
        _ends_by_storing(callbacks),
        peer_errors(process_group),
    ):
        return _Loop(trainer, callbacks).run()


@dataclass(frozen=True)
class _Loop:
    """Runs the loop over epochs and steps."""

    trainer: "Trainer"
    callbacks: Callbacks

    def run(self) -> dict[str, Any]:
        """Trains the remaining epochs and evaluates; returns the outcome."""
        trainer, begin = self.trainer, self.callbacks.begin
        begin("restoring")
        state = trainer.restore()
        self.callbacks.report(_started_event(trainer, state))
        while not state.is_finished(trainer.config):
            begin(f"epoch {state.epoch + 1}")
            clock = _Clock()
            self._train_steps(state, clock)
            self._end_epoch(state, clock)
            if self._is_over() and not state.is_finished(trainer.config):
                raise self._end(trainer.end_stopped, state)
        begin("evaluation")
        evaluation = trainer.evaluate_best(state, self._asks_to_stop)
        outcome = self._end(trainer.end_finished, state, evaluation)
        if evaluation is not None:
            self.callbacks.report({"event": "evaluation", "summary": outcome["evaluation"]})
        return outcome

    def _train_steps(self, state: TrainState, clock: "_Clock") -> None:
        """Trains the rest of the current epoch, with a checkpoint whenever one is due."""
        trainer = self.trainer
        for loss, num_images in trainer.train_steps(state):
            clock.tick(num_images)
            self.callbacks.report(_step_event(trainer, state, loss, clock, num_images))
            self._report_stored()
            if not math.isfinite(loss) or trainer.is_stuck:
                raise self._end(trainer.end_diverged, state, loss)
            if trainer.messages.any(self._asks_to_stop()):
                raise self._end(trainer.end_stopped, state)
            is_last = state.step_in_epoch == trainer.num_steps or state.is_time_over()
            if not is_last and clock.is_due(trainer.config.checkpoint_every_minutes):
                trainer.save(state)

    def _end_epoch(self, state: TrainState, clock: "_Clock") -> None:
        """Validates, and stores the results of the epoch."""
        trainer, number = self.trainer, state.epoch + 1
        self.callbacks.begin(f"validation of epoch {number}")
        numbers = trainer.validate(state, self._asks_to_stop)
        self.callbacks.begin(f"end of epoch {number}")
        if numbers is None:
            raise self._end(trainer.end_stopped, state)
        row = numbers.row
        if not math.isfinite(row["val_loss"]):
            raise self._end(trainer.end_diverged, state, row["val_loss"])
        trainer.finish_epoch(state, numbers, images_per_s=clock.images_per_s)
        self.callbacks.report({"event": "epoch", "num_epochs": trainer.config.epochs, **row})
        self._report_stored()

    def _is_over(self) -> bool:
        return self.trainer.process_group.any(self._asks_to_stop())

    def _asks_to_stop(self) -> bool:
        # A lost run or failed storage is reported when the run ends.
        return self.callbacks.should_stop() or self.trainer.has_failed

    def _end(self, store: Callable[..., T], *details: Any) -> T:
        # Uploads must finish even if other processes are gone.
        self.callbacks.begin(_STORING, needs_peers=False)
        found = store(*details)
        self._report_stored()
        return found

    def _report_stored(self) -> None:
        for checkpoint in self.trainer.take_stored():
            self.callbacks.report({"event": "checkpoint", **checkpoint})


@contextmanager
def _ends_by_storing(callbacks: Callbacks) -> Iterator[None]:
    """Lets a process finish its uploads after an error, even if other processes are gone."""
    try:
        yield
    except BaseException:
        callbacks.begin(_STORING, needs_peers=False)
        raise


def _looked_for_outcome(setup: TrainingSetup) -> dict[str, Any] | None:
    """Returns `earlier_outcome`; a refused attempt does not count as a restart."""
    run = setup.run
    assert run is not None  # noqa: S101 - only the owner calls it
    try:
        return earlier_outcome(setup.config, run, setup.dataset.digest)
    except (UsageError, DivergedError):
        run.note_end("looked")
        raise


def earlier_outcome(
    config: TrainConfig, run: Run | None, dataset_digest: str
) -> dict[str, Any] | None:
    """Returns the outcome of an ended run, or None; a higher `epochs` reopens a finished one.

    Args:
        run: owned by this process.

    Raises:
        UsageError: the run has another dataset or other settings.
        DivergedError: the run diverged.
    """
    assert run is not None  # noqa: S101 - only the owner calls it
    _check_dataset(config, run, dataset_digest)
    run.check_identity(identity_of(config), dataset_digest)
    outcome = run.read_outcome()
    if outcome is None:
        return None
    if outcome["status"] == "diverged":
        raise DivergedError(f"{outcome['reason']}; start a run of another name")
    if outcome["stopped_early"]:
        words = stopped_early_words(outcome["epochs"], outcome["best"]["epoch"])
        logger.info(
            "%s: finished already: %s; to continue from its best weights, give another "
            "--name and --init-from %s",
            run.store.url,
            words,
            run.store.url,
        )
        return outcome
    if _is_complete(outcome, config):
        logger.info(
            "%s: finished already after %s", run.store.url, pluralize(outcome["epochs"], "epoch")
        )
        return outcome
    if config.schedule.cosine:
        whole = (
            f"{config.time_budget:g} minutes"
            if config.epochs is None
            else pluralize(config.epochs, "epoch")
        )
        logger.warning(
            "%s: schedule.cosine spans all epochs: the learning rate is 0 after epoch %d and now "
            "jumps back up to that of a run of %s; another --name trains such a run from "
            "the start",
            run.store.url,
            outcome["epochs"],
            whole,
        )
    run.clear_outcome()
    return None


def renew_ended_run(config: TrainConfig, run: Run | None, outcome: Mapping[str, Any]) -> None:
    """Writes the report of an ended run again, and sends to its tracker what that lacks.

    `evaluate` may have replaced its evaluation, and the tracker may have missed its end.

    Args:
        run: owned by this process.
    """
    assert run is not None  # noqa: S101 - only the owner calls it
    renew_report(run.store)
    send_ended_run(config, run, outcome)


def _is_complete(outcome: Mapping[str, Any], config: TrainConfig) -> bool:
    """Returns whether a finished run has the epochs, or the time, that `config` asks for."""
    if config.epochs is not None and outcome["epochs"] >= config.epochs:
        return True
    if config.time_budget is None or not outcome.get("is_time_over"):
        return False
    return bool(outcome["time_budget_s"] >= seconds_of(config.time_budget))


def _check_dataset(config: TrainConfig, run: Run, dataset_digest: str) -> None:
    """Refuses another dataset than that of the first attempt.

    Raises:
        UsageError: names both datasets.
    """
    stored = run.read_identity()
    if stored is not None and stored["dataset_digest"] != dataset_digest:
        begun_with = stored_yaml(run.store).get("data", "unknown")
        raise UsageError(
            f"--data {config.data} is not the dataset of run {run.url} "
            f"({begun_with}), or was prepared again since (sha256 of dataset.json: "
            f"{stored['dataset_digest'][:12]}, now {dataset_digest[:12]}); give that dataset or "
            "another --name"
        )


def _started_event(trainer: "Trainer", state: TrainState) -> dict[str, Any]:
    return {
        "event": "started",
        "epoch": state.epoch,
        "num_epochs": trainer.config.epochs,
        "num_steps": trainer.num_steps,
        "attempt": trainer.attempt,
    }


def _step_event(
    trainer: "Trainer", state: TrainState, loss: float, clock: "_Clock", num_images: int
) -> dict[str, Any]:
    event = {
        "event": "step",
        "epoch": state.epoch,
        "num_epochs": trainer.config.epochs,
        "step": state.step_in_epoch,
        "num_steps": trainer.num_steps,
        "loss": loss,
        "num_images": num_images,
        "epoch_images": len(trainer.dataset.split("train")),
        "images_per_s": clock.images_per_s,
    }
    if state.time is not None:
        event["time_fraction"] = state.time.fraction_at(state.step)
    return event


class _Clock:
    """Measures images per second of an epoch, and the time to the next checkpoint."""

    def __init__(self) -> None:
        self._saved = time.monotonic()
        self._first: float | None = None
        self._num_images = 0
        self.images_per_s = 0.0

    def tick(self, num_images: int) -> None:
        """Counts a step, except the first, which may compile."""
        now = time.monotonic()
        if self._first is None:
            self._first = now
            return
        self._num_images += num_images
        self.images_per_s = self._num_images / (now - self._first)

    def is_due(self, minutes: float) -> bool:
        """Returns whether `minutes` have passed since it last returned true; 0: never."""
        is_due = 0 < minutes * 60 <= time.monotonic() - self._saved
        if is_due:
            self._saved = time.monotonic()
        return is_due
