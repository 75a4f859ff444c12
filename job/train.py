"""The seam: `train_and_evaluate`, which the command, the tests and a cluster's workers call.

python -m job.train --local --data DATASET --output RUNS --name NAME
"""

import logging
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click

from data_prep.command import SettingsCommand, given, run_command, settings_options
from data_prep.errors import DivergedError, StoppedError, UsageError
from data_prep.progress import Progress
from data_prep.settings import merged, read_yaml, validated
from data_prep.storage import join_url
from job.config import TrainConfig, identity_of
from job.data import open_dataset
from job.evaluate import show_summary
from job.run import Run
from job.state import TrainState

logger = logging.getLogger(__name__)

# Called after every step with {"event": "step", "epoch", "num_epochs", "step", "num_steps",
# "loss", "num_images", "images_per_s"} and after every epoch with {"event": "epoch"} and its row.
Report = Callable[[Mapping[str, Any]], None]


def train_and_evaluate(
    config: TrainConfig,
    run: Run,
    strategy: Any,
    report: Report,
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """Trains until the epochs are done or training stops early, then evaluates the test split.

    Resumes from the newest verified checkpoint of `run`. Every epoch ends with tables, curves,
    predictions and, last, a checkpoint.

    Args:
        config: precision already resolved.
        run: opened, owned by this process.
        strategy: a `tf.distribute.Strategy`.
        report: told of every step and every epoch.
        should_stop: asked after every step.

    Returns:
        The outcome, as written to `outcome.json`.

    Raises:
        UsageError: no dataset, or the run was begun with another one or other settings.
        StoppedError: `should_stop` answered yes; a checkpoint was written.
        DivergedError: the loss is not finite; the outcome was written.
    """
    dataset = open_dataset(str(config.data))
    run.check_identity(identity_of(config), dataset.digest)
    outcome = _earlier_outcome(config, run)
    if outcome is not None:
        return outcome
    from job.session import open_session

    with open_session(config, run, strategy, dataset) as session:
        state = session.restore()
        while not state.is_finished(config.epochs):
            clock = _Clock()
            for loss, num_images in session.train_steps(state):
                clock.tick(num_images)
                report(
                    _step_event(
                        *(config, state, session.num_steps, loss),
                        *(clock, num_images, len(dataset.split("train"))),
                    )
                )
                if not math.isfinite(loss):
                    raise _diverged(run, state, loss)
                # A run that was lost is found out by the commit.
                if should_stop() or run.lost:
                    session.commit(state)
                    raise _stopped(state)
                is_last = state.step_in_epoch == session.num_steps
                if not is_last and clock.is_due(config.checkpoint_every_minutes):
                    session.commit(state)
            try:
                row = session.validate(state, should_stop)
            except StoppedError:
                session.commit(state)
                raise _stopped(state) from None
            if not math.isfinite(row["val_loss"]):
                raise _diverged(run, state, row["val_loss"])
            session.finish_epoch(state, row, images_per_s=clock.images_per_s)
            report({"event": "epoch", "num_epochs": config.epochs, **row})
            if should_stop() and not state.is_finished(config.epochs):
                raise _stopped(state)
        outcome = {
            "epochs": state.epoch,
            "stopped_early": state.stopped_early,
            "best": state.best,
            "evaluation": session.evaluate_best(state, should_stop),
        }
    run.write_outcome("finished", 0, **outcome)
    return outcome


def _earlier_outcome(config: TrainConfig, run: Run) -> dict[str, Any] | None:
    """Returns the outcome of a run that is over; a higher `epochs` reopens a finished one."""
    outcome = run.read_outcome()
    if outcome is None:
        return None
    if outcome["status"] == "diverged":
        raise DivergedError(f"{outcome['reason']}; start a run of another name")
    is_over = outcome["stopped_early"] or outcome["epochs"] >= config.epochs
    if is_over:
        logger.info("%s: finished already after %d epochs", run.store.url, outcome["epochs"])
        return outcome
    run.clear_outcome()
    return None


def _diverged(run: Run, state: TrainState, loss: float) -> DivergedError:
    reason = (
        f"{run.store.url}: the loss became {loss} in epoch {state.epoch + 1}, step "
        f"{state.step_in_epoch}; lower optimizer.learning_rate or set model.input_scaling=unit"
    )
    run.write_outcome("diverged", DivergedError.exit_code, reason=reason)
    return DivergedError(reason)


def _stopped(state: TrainState) -> StoppedError:
    return StoppedError(
        f"stopped and saved at epoch {state.epoch + 1}, step {state.step_in_epoch}; "
        "the same command resumes"
    )


def _step_event(
    config: TrainConfig,
    state: TrainState,
    num_steps: int,
    loss: float,
    clock: "_Clock",
    num_images: int,
    epoch_images: int,
) -> dict[str, Any]:
    return {
        "event": "step",
        "epoch": state.epoch,
        "num_epochs": config.epochs,
        "step": state.step_in_epoch,
        "num_steps": num_steps,
        "loss": loss,
        "num_images": num_images,
        "epoch_images": epoch_images,
        "images_per_s": clock.images_per_s,
    }


class _Clock:
    """Images per second since the first step of an epoch, and the time to the next checkpoint."""

    def __init__(self) -> None:
        self._saved = time.monotonic()
        self._first: float | None = None
        self._num_images = 0
        self.images_per_s = 0.0

    def tick(self, num_images: int) -> None:
        """Counts a step. The first is left out: it may compile."""
        now = time.monotonic()
        if self._first is None:
            self._first = now
            return
        self._num_images += num_images
        self.images_per_s = self._num_images / (now - self._first)

    def is_due(self, minutes: float) -> bool:
        """Returns whether `minutes` have passed since the last yes; 0 is never."""
        is_due = 0 < minutes * 60 <= time.monotonic() - self._saved
        if is_due:
            self._saved = time.monotonic()
        return is_due


def run_local(config: TrainConfig) -> dict[str, Any]:
    """Trains on the devices of this machine; the body of `train --local`.

    Args:
        config: `data` and `name` are set.
    """
    from job import runtime

    # What can be refused at once is: TensorFlow takes seconds to come.
    open_dataset(str(config.data))
    with Run.open(config.output, str(config.name)) as run, _stop_signals() as should_stop:
        precision = runtime.resolve_precision(config.precision)
        config = config.model_copy(update={"precision": precision})
        strategy = runtime.configure(config)
        with _Display(config) as display:
            return train_and_evaluate(config, run, strategy, display.report, should_stop)


class _Display:
    """What a person sees of a run: one bar for all epochs and a line for each of them."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._progress: Progress | None = None

    def __enter__(self) -> "_Display":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._progress is not None:
            self._progress.__exit__(*error)

    def report(self, event: Mapping[str, Any]) -> None:
        """Shows a step or an epoch; the first step of a process opens the bar."""
        if self._progress is None and event["event"] == "step":
            self._progress = self._open(event)
        if self._progress is None:
            return
        if event["event"] == "step":
            note = f"epoch {event['epoch'] + 1}/{event['num_epochs']} loss {event['loss']:.4f}"
            self._progress.advance(event["num_images"], note)
        else:
            self._progress.line(_epoch_line(event))

    def _open(self, event: Mapping[str, Any]) -> Progress:
        done = (event["step"] - 1) * self._config.global_batch_size
        total = (event["num_epochs"] - event["epoch"]) * event["epoch_images"] - done
        return Progress("train", total, shown=self._config.progress).__enter__()


def _epoch_line(row: Mapping[str, Any]) -> str:
    dice = row["val_foreground_dice"]
    return (
        f"epoch {row['epoch'] + 1:3d}/{row['num_epochs']}  loss {row['loss']:.4f}  "
        f"val_loss {row['val_loss']:.4f}  "
        f"val foreground Dice {'-' if dice is None else f'{dice:.4f}'}  "
        f"learning rate {row['learning_rate']:.2e}"
    )


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether SIGINT or SIGTERM came; a second one ends at once."""
    stop = threading.Event()

    def ask(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        logger.warning("stopping after this step; a second signal stops at once, without saving")
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def resolve_config(
    options: Mapping[str, Any], file: str | None, prep_options: Mapping[str, bool] | None = None
) -> TrainConfig:
    """Returns the config of `file` with the options of the command line laid over it.

    A file of the reference implementation (.config, .ini) is read as it is; when no dataset is
    given, its image folders are prepared first, beside the run, with `prep_options` as well.

    Raises:
        UsageError: no dataset, or a value that is not allowed.
        ContentError: the image folders hold bad files or leaking splits.
    """
    from job.reference_config import is_reference_config

    if file is not None and is_reference_config(file):
        return _resolve_reference(options, file, prep_options or {})
    if prep_options:
        raise _nothing_to_prepare(prep_options)
    values = read_yaml(_read_text(file), file) if file else {}
    config = validated(TrainConfig, merged(values, options), file or "options")
    if config.data is None:
        raise UsageError("no dataset: give --data DATASET, a folder or gs:// URL made by prep")
    # The run must find it again from another working folder.
    data = config.data if "://" in config.data else os.path.abspath(config.data)
    return config.model_copy(update={"data": data, "name": config.name or run_name(data)})


def _resolve_reference(
    options: Mapping[str, Any], file: str, prep_options: Mapping[str, bool]
) -> TrainConfig:
    from job.reference_config import format_notes, prepare_sources, read_reference_config

    reference = read_reference_config(file)
    from rich.console import Console

    Console(stderr=True).print(format_notes(reference.notes))
    config = validated(TrainConfig, merged(reference.train, options), file)
    name = config.name or run_name(config.data or os.path.dirname(os.path.abspath(file)))
    config = config.model_copy(update={"name": name})
    if config.data is None:
        data = join_url(config.output, f"{name}-dataset")
        prepare_sources(reference, data, file, prep_options)
        config = config.model_copy(update={"data": data})
    elif prep_options:
        raise _nothing_to_prepare(prep_options)
    return config


def _nothing_to_prepare(prep_options: Mapping[str, bool]) -> UsageError:
    flag = "--" + next(iter(prep_options)).replace("_", "-")
    return UsageError(
        f"{flag} is for a .config file without --data; give it to `flexunet prep` instead"
    )


def run_name(url: str) -> str:
    """Returns a run name made from the last part of `url`."""
    last = url.rstrip("/").rsplit("/", 1)[-1].lower()
    name = re.sub(r"[^a-z0-9]+", "-", last).strip("-")[:47].rstrip("-")
    return name if re.match(r"[a-z]", name) else f"run-{name}"[:47].rstrip("-")


def _read_text(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: config file cannot be read: {error}") from error


@click.command(cls=SettingsCommand)
@click.option("--local", is_flag=True, help="Train on the devices of this machine.")
@click.option(
    "--config",
    "file",
    type=click.Path(),
    help="YAML file with any of these options, or the reference implementation's .config file.",
)
@click.option(
    "--allow-leaks",
    is_flag=True,
    help="With a .config file: accept its splits though they share a group or a picture.",
)
@click.option(
    "--skip-bad",
    is_flag=True,
    help="With a .config file: leave bad pictures out, listed in the dataset's report/rejects.csv.",
)
@settings_options(TrainConfig)
def command(
    local: bool, file: str | None, allow_leaks: bool, skip_bad: bool, **options: Any
) -> int:
    """Train a segmentation network on a prepared dataset, then evaluate it.

    The same command again resumes the run. Ctrl-C saves first; the exit code is then 6.
    """
    if not local:
        raise UsageError("no cluster is described here; give --local to train on this machine")
    flags = {"allow_leaks": allow_leaks, "skip_bad": skip_bad}
    prep_options = {name: True for name, is_given in flags.items() if is_given}
    config = resolve_config(given(options), file, prep_options)
    outcome = run_local(config)
    url = join_url(config.output, str(config.name))
    if outcome["evaluation"]:
        show_summary(outcome["evaluation"])
    click.echo(f"run: {url}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(command, argv, "flexunet train")


if __name__ == "__main__":
    raise SystemExit(main())
