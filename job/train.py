"""The seam: `train_and_evaluate`, which the command, the tests and a cluster's workers call.

python -m job.train --local --data DATASET --output RUNS --name NAME
"""

import json
import logging
import math
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import click

from flexunet.cli.interrupts import handled
from flexunet.cli.options import PATH, SettingsCommand, given, settings_options
from flexunet.cli.runner import run_command
from flexunet.errors import DivergedError, FlexUNetError, UsageError
from flexunet.json_files import read_json
from flexunet.progress import Alive, Progress, load_bar, not_told
from flexunet.settings import flag_of, merged, read_yaml, validated
from flexunet.storage import NotFound, Store, join_url, open_store
from flexunet.text import counted
from job.config import (
    PRESET_KEYS,
    TrainConfig,
    dotted_keys,
    identity_of,
    preset_values,
    stored_options,
)
from job.data.dataset import Dataset
from job.data.folds import evaluated_words, open_folded
from job.distributed.process_group import Place, Team, meet, place_from_environment
from job.distributed.watchdog import STACKS_FOLDER, Watchdog, end_process
from job.models.compatibility import check_fit, input_max
from job.optimization.schedule import stopped_early_words
from job.report import REPORT_NAME, read_summary, renew_report, write_report
from job.reporting.terminal import show_summary
from job.runs.identity import differences
from job.runs.layout import CROSS_VALIDATION_NAME, IDENTITY_NAME, RESTORE, checked_run_name
from job.runs.provenance import check_origin
from job.runs.run import Run
from job.training.cross_validation import cross_validate, fold_configs, own_process, show_folds
from job.training.state import TrainState

logger = logging.getLogger(__name__)

T = TypeVar("T")

_RETRY_S = 60.0
_STORING = "storing the end"
# Phases that take long and show nothing themselves, and what is said of them.
_SHOWN_PHASES = {
    "opening the session": "building the network",
    "evaluation": "evaluating {cases} with the best checkpoint",
}
_LAST_WORDS_S = 5.0  # for the stacks of a process that ends itself

# Called with {"event": "phase", "name", "needs_peers"} before every part of the work, after every
# step with {"event": "step", "epoch", "num_epochs", "step", "num_steps", "loss", "num_images",
# "epoch_images", "images_per_s"} and after every epoch with {"event": "epoch"} and its row.
Report = Callable[[Mapping[str, Any]], None]


def train_and_evaluate(
    config: TrainConfig,
    run: Run | None,
    strategy: Any,
    report: Report,
    should_stop: Callable[[], bool],
    team: Team | None = None,
    alive: Alive = not_told,
    dataset: Dataset | None = None,
) -> dict[str, Any]:
    """Trains until the epochs are done or training stops early, then evaluates the test split.

    Resumes from the newest verified checkpoint of `run`. Every epoch ends with tables, curves,
    predictions and, last, a checkpoint. Every process of a team calls it.

    Args:
        config: precision already resolved.
        run: opened, owned by this process; None but in the first process of a team.
        strategy: a `tf.distribute.Strategy`.
        report: told of every phase, step and epoch.
        should_stop: asked after every step and every batch of an evaluation.
        team: None: this process alone.
        alive: told of parts of what lies between, where that may take long.
        dataset: of `config`, where it was opened already.

    Returns:
        The outcome, as written to `outcome.json`.

    Raises:
        UsageError: no dataset, or the run was begun with another one or other settings.
        StoppedError: `should_stop` answered yes in one process; a checkpoint was written.
        DivergedError: the loss, or with every scale its gradient, is not finite; the outcome was
            written.
        LockedError, StorageError: the run was lost, or could not be stored.
    """
    team = team or Team(strategy)

    def begin(phase: str, needs_peers: bool = True) -> None:
        report({"event": "phase", "name": phase, "needs_peers": needs_peers})

    def end(store: Callable[..., T], *details: Any) -> T:
        # Whoever else is gone: what is on its way to storage must arrive.
        begin(_STORING, needs_peers=False)
        return store(*details)

    if dataset is None:
        dataset = open_folded(config)
    _check_same(config, dataset, team)
    outcome = team.on_first(lambda: _looked_for_outcome(config, run, dataset.digest))
    if outcome is not None:
        # It may have been evaluated anew since.
        team.on_first(lambda: renew_report(run.store) if run is not None else None)
        return outcome
    from job.training.trainer import open_session

    begin("opening the session")
    with (
        open_session(*(config, run, strategy, team, dataset), alive=alive) as session,
        _ends_by_storing(begin),
        _told_of_peers(team),
    ):

        def is_over() -> bool:
            # A run that was lost, or cannot be stored, is told when it is ended.
            return team.any(should_stop() or session.is_in_trouble)

        begin("restoring")
        state = session.restore()
        while not state.is_finished(config.epochs):
            begin(f"epoch {state.epoch + 1}")
            clock = _Clock()
            for loss, num_images in session.train_steps(state):
                clock.tick(num_images)
                report(_step_event(session, state, loss, clock, num_images))
                if not math.isfinite(loss) or session.is_stuck:
                    raise end(session.end_diverged, state, loss)
                if is_over():
                    raise end(session.end_stopped, state)
                is_last = state.step_in_epoch == session.num_steps
                if not is_last and clock.is_due(config.checkpoint_every_minutes):
                    session.save(state)
            begin(f"validation of epoch {state.epoch + 1}")
            row = session.validate(state, is_over)
            begin(f"end of epoch {state.epoch + 1}")
            if row is None:
                raise end(session.end_stopped, state)
            if not math.isfinite(row["val_loss"]):
                raise end(session.end_diverged, state, row["val_loss"])
            session.finish_epoch(state, row, images_per_s=clock.images_per_s)
            report({"event": "epoch", "num_epochs": config.epochs, **row})
            if is_over() and not state.is_finished(config.epochs):
                raise end(session.end_stopped, state)
        begin("evaluation")
        evaluation = session.evaluate_best(state, is_over)
        return end(session.end_finished, state, evaluation)


@contextmanager
def _ends_by_storing(begin: Callable[..., None]) -> Iterator[None]:
    """Lets a process that ends by an error store what is on its way, whoever else is gone."""
    try:
        yield
    except BaseException:
        begin(_STORING, needs_peers=False)
        raise


_ALIKE = ("epochs", "accumulate", "gradient_exchange", "exchange_flops_per_byte", "xla")


def _check_same(config: TrainConfig, dataset: Dataset, team: Team) -> None:
    """Refuses processes that were started with other settings or another dataset than the first.

    Raises:
        UsageError: on all of them; names the rank and what differs.
    """

    def settings() -> dict[str, Any]:
        # These decide which collectives run, and when: one that differs is waited for without end.
        free = {name: getattr(config, name) for name in _ALIKE}
        together = {**identity_of(config), **free}
        return {"config": together, "dataset": dataset.digest}

    first, *others = team.on_each(settings)
    for rank, other in enumerate(others, start=1):
        if other != first:
            raise UsageError(
                f"rank {rank} was started with other settings than rank 0: "
                f"{'; '.join(differences(first, other))}; start all with the same"
            )


@contextmanager
def _told_of_peers(team: Team) -> Iterator[None]:
    """Turns what a collective says of a lost peer into a line.

    Raises:
        FlexUNetError: another process ended or cannot be reached.
    """
    import tensorflow as tf

    try:
        yield
    except (tf.errors.UnavailableError, tf.errors.InternalError, tf.errors.AbortedError,
            tf.errors.CancelledError, tf.errors.DeadlineExceededError) as error:  # fmt: skip
        if team.size == 1:
            raise
        raise FlexUNetError(
            f"rank {team.rank}: another process ended or cannot be reached "
            f"({type(error).__name__}); the same command resumes"
        ) from error


def _looked_for_outcome(
    config: TrainConfig, run: Run | None, dataset_digest: str
) -> dict[str, Any] | None:
    """Returns what `earlier_outcome` does; an attempt that is refused counts as no restart."""
    assert run is not None  # noqa: S101 - only who owns it asks
    try:
        return earlier_outcome(config, run, dataset_digest)
    except (UsageError, DivergedError):
        run.note_end("looked")
        raise


def earlier_outcome(
    config: TrainConfig, run: Run | None, dataset_digest: str
) -> dict[str, Any] | None:
    """Returns the outcome of a run that is over; a higher `epochs` reopens a finished one.

    Args:
        run: owned by this process.

    Raises:
        UsageError: it is a run of another dataset or other settings.
        DivergedError: it diverged.
    """
    assert run is not None  # noqa: S101 - only who owns it asks
    stored = run.read_identity()
    if stored is not None and stored["dataset_digest"] != dataset_digest:
        begun_with = _stored_yaml(run.store).get("data", "not known any more")
        raise UsageError(
            f"--data {config.data} is not the dataset with which run {run.url} was begun "
            f"({begun_with}), or was prepared anew since (sha256 of dataset.json: "
            f"{stored['dataset_digest'][:12]}, now {dataset_digest[:12]}); give that dataset or "
            "another --name"
        )
    run.check_identity(identity_of(config), dataset_digest)
    outcome = run.read_outcome()
    if outcome is None:
        return None
    if outcome["status"] == "diverged":
        raise DivergedError(f"{outcome['reason']}; start a run of another name")
    if outcome["stopped_early"]:
        words = stopped_early_words(outcome["epochs"], outcome["best"]["epoch"])
        logger.info(
            "%s: finished already: %s; to go on from its best weights, give another "
            "--name and --init-from %s",
            *(run.store.url, words, run.store.url),
        )
        return outcome
    if outcome["epochs"] >= config.epochs:
        logger.info(
            "%s: finished already after %s", run.store.url, counted(outcome["epochs"], "epoch")
        )
        return outcome
    if config.schedule.cosine:
        logger.warning(
            "%s: the cosine is one of all epochs: from its end after %d it jumps back up, to where "
            "a run of %d would be; another --name trains such a run from the start",
            *(run.store.url, outcome["epochs"], config.epochs),
        )
    run.clear_outcome()
    return None


def _step_event(
    session: Any, state: TrainState, loss: float, clock: "_Clock", num_images: int
) -> dict[str, Any]:
    return {
        "event": "step",
        "epoch": state.epoch,
        "num_epochs": session.config.epochs,
        "step": state.step_in_epoch,
        "num_steps": session.num_steps,
        "loss": loss,
        "num_images": num_images,
        "epoch_images": len(session.dataset.split("train")),
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
    with stop_signals() as should_stop, Display(config) as display:
        return run_member(config, None, display.report, should_stop)


def run_in_cluster(config: TrainConfig, place: Place) -> dict[str, Any]:
    """Trains as the process `place` of a cluster; the body of `train` without `--local`."""
    with stop_signals() as should_stop, Display(config) as display:
        report = display.report if place.rank == 0 else lambda event: None
        return run_member(config, place, report, should_stop)


def run_member(
    config: TrainConfig,
    place: Place | None,
    report: Report,
    should_stop: Callable[[], bool],
    *,
    num_gpus: int | None = None,
    launch: str | None = None,
) -> dict[str, Any]:
    """Trains as one of the processes that train together; all of them call it.

    Args:
        config: `data` and `name` are set.
        place: None: this process alone.
        num_gpus: GPUs that this process was promised; None: whatever there is.
        launch: names the launcher, whose processes may follow one another at once.

    Raises:
        FlexUNetError: also where another process ended, or cannot be reached.
    """
    # What can be refused at once is: TensorFlow takes seconds to come.
    dataset = open_folded(config)
    check_fit(config, dataset)
    if place is None or place.size == 1:
        if launch is None:  # a launcher has done it
            check_origin(config, dataset)
        with _own_run(config, launch) as run:
            return _train(config, dataset, None, run, report, should_stop, num_gpus, launch)
    return _train(config, dataset, place, None, report, should_stop, num_gpus, launch)


def _train(
    config: TrainConfig,
    dataset: Dataset,
    place: Place | None,
    run: Run | None,
    report: Report,
    should_stop: Callable[[], bool],
    num_gpus: int | None,
    launch: str | None,
) -> dict[str, Any]:
    from job.distributed import runtime

    num_seen = runtime.check_devices(config, place, num_gpus)
    if place is not None:
        meet(place, config.phase_timeout, num_seen)
        if place.size > 1:
            runtime.check_batch(config, place.size, num_seen)
    with _watched(config, place) as watchdog, ExitStack() as stack:
        watchdog.enter("making the strategy")
        strategy = runtime.configure(config, place)
        runtime.check_micro_batches(config, strategy.num_replicas_in_sync)
        team = Team(strategy, place)

        def own() -> None:
            nonlocal run
            run = stack.enter_context(_own_run(config, launch))

        def tell(event: Mapping[str, Any]) -> None:
            if event["event"] == "phase":
                watchdog.enter(event["name"], needs_peers=event["needs_peers"])
            report(event)

        def ask() -> bool:
            watchdog.beat()
            return should_stop()

        with _told_of_peers(team):
            if place is not None:
                team.on_first(own)
                if launch is None:
                    team.on_first(lambda: check_origin(config, dataset))
            watchdog.enter("starting")
            wished: str = config.precision
            begun_in: str | None = None
            if wished == "auto":
                # A run goes on as it began, on whatever it is resumed.
                begun_in = team.on_first(lambda: stored_precision(run))
                wished = begun_in or wished
            largest = input_max(config, dataset.manifest)

            def resolve() -> str:
                try:
                    return runtime.resolve_precision(wished, largest)
                except UsageError as error:
                    if begun_in is None:
                        raise
                    raise UsageError(
                        f"{config.output}/{config.name} was begun in {begun_in}, which "
                        f"{socket.gethostname()} does not compute; resume it on a machine that "
                        "does, or train another --name"
                    ) from error

            precisions = team.on_each(resolve)
            # Where machines are of two kinds, all of them compute in float32.
            precision = precisions[0] if len(set(precisions)) == 1 else "float32"
            config = config.model_copy(update={"precision": precision})
            return train_and_evaluate(
                *(config, run, strategy, tell, ask, team, watchdog.alive, dataset)
            )


def stored_precision(run: Run | None) -> str | None:
    """Returns the precision in which a run was begun; None for a new one, or where it is not ours.

    Only the processes that train know what they compute natively, so `auto` is this one then.
    """
    stored = run.read_identity() if run is not None else None
    return str(stored["config"]["precision"]) if stored else None


def _own_run(config: TrainConfig, launch: str | None) -> Run:
    # A request is repeated for a while, and the outbox repeats the whole call for longer.
    retry_s = min(_RETRY_S, max(config.storage_timeout, 1.0))
    store = open_store(config.output, retry_s=retry_s).below(checked_run_name(str(config.name)))
    return Run.own(store, launch=launch)


@contextmanager
def _watched(config: TrainConfig, place: Place | None) -> Iterator[Watchdog]:
    """Yields the watchdog of this process, which writes into the run what stood still where."""
    rank = place.rank if place else 0
    peers = {r: a for r, a in enumerate(place.addresses) if r != rank} if place else {}
    store = open_store(config.output, retry_s=_LAST_WORDS_S).below(str(config.name))

    def end(problem: str) -> None:
        name = f"{STACKS_FOLDER}/{socket.gethostname()}-{os.getpid()}-rank-{rank}.txt"
        end_process(store, name, f"rank {rank}: {problem}")

    with Watchdog(
        # The end of an epoch may wait for storage.
        phase_s=config.phase_timeout + config.storage_timeout,
        step_s=config.step_timeout,
        expired=end,
        peers=peers,
    ) as watchdog:
        yield watchdog


class Display:
    """What a person sees of a run: one bar for all epochs and a line for each of them."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._progress: Progress | None = None
        self._phase = ""

    def __enter__(self) -> "Display":
        load_bar()  # while no other thread imports anything
        return self

    def __exit__(self, *error: Any) -> None:
        self._close(*error)

    def _close(self, *error: Any) -> None:
        if self._progress is not None:
            self._progress.__exit__(*(error or (None, None, None)))
            self._progress = None

    def report(self, event: Mapping[str, Any]) -> None:
        """Shows a step, an epoch, or what takes long without either.

        The first step of a process opens the bar.
        """
        if event["event"] == "phase":
            self._show_phase(event["name"])
            return
        if self._progress is None and event["event"] == "step":
            self._progress = self._open(event)
        if self._progress is None:
            return
        if event["event"] == "step":
            note = f"epoch {event['epoch'] + 1}/{event['num_epochs']} step loss {event['loss']:.4f}"
            self._progress.advance(event["num_images"], note)
        elif event["event"] == "epoch":
            self._progress.line(_epoch_line(event))

    def _show_phase(self, name: str) -> None:
        """Says what is done where else nothing would be seen for long."""
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
        total = event["num_epochs"] * event["epoch_images"]
        return Progress("train", total, done=done, shown=self._config.progress).__enter__()


def _epoch_line(row: Mapping[str, Any]) -> str:
    """Returns the numbers of an epoch in 80 columns; Dice is that of the validation split."""
    dice = row["val_foreground_dice"]
    return (
        f"epoch {row['epoch'] + 1:3d}/{row['num_epochs']}  loss {row['loss']:.4f}  "
        f"val_loss {row['val_loss']:.4f}  "
        f"foreground Dice {'-' if dice is None else f'{dice:.4f}'}  "
        f"lr {row['learning_rate']:.1e}"
    )


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether Ctrl-C, SIGTERM or SIGHUP came; two end at once."""
    stop = threading.Event()

    def ask(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        logger.warning("stopping after this step; a second signal stops at once, without saving")
        stop.set()

    with handled((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), ask):
        yield stop.is_set


def resolve_config(
    options: Mapping[str, Any], file: str | None, prep_options: Mapping[str, bool] | None = None
) -> TrainConfig:
    """Returns the config of `file` with the options of the command line laid over it.

    A run that exists goes on as it was begun: what neither of them says is taken from its own
    `config.yaml`, whatever the defaults are by now.

    A file of the reference implementation (.config, .ini) is read as it is; when no dataset is
    given, its image folders are prepared first, beside the run, with `prep_options` as well.

    Raises:
        UsageError: no dataset, a value that is not allowed, or a preset that `file` overrules.
        ContentError: the image folders hold bad files or leaking splits.
    """
    from job.compat.ini_mapping import is_reference_config

    if file is not None and is_reference_config(file):
        return _resolve_reference(options, file, prep_options or {})
    if prep_options:
        raise _nothing_to_prepare(prep_options)
    values = read_yaml(_read_text(file), file) if file else {}
    if file is not None:
        _check_preset(options, values, file)
    config = _resolved(
        merged(values, options),
        file or "options",
        options,
        lambda found: run_name(_data_of(found)),
    )
    _data_of(config)
    return _absolute(config)


def _data_of(config: TrainConfig) -> str:
    if config.data is None:
        raise UsageError("no dataset: give --data DATASET, a folder or gs:// URL made by prep")
    return config.data


def _resolved(
    values: Mapping[str, Any],
    where: str,
    options: Mapping[str, Any],
    name_for: Callable[[TrainConfig], str],
) -> TrainConfig:
    """Returns the config of `values`; of a run that exists, what they do not say is as it was.

    Args:
        where: what the values came from, named in errors.
        options: those of them that were given on the command line.
        name_for: the name of a run for which `values` have none.
    """
    place = {name: values[name] for name in _PLACE if name in values}
    found = validated(TrainConfig, place, where, typed=options)
    name = found.name or name_for(found)
    found = found.model_copy(update={"name": name})
    stored = _stored_values(found)
    _refuse_other_kind(found, is_new=stored is None)
    if stored is None:
        return validated(TrainConfig, {**values, "name": name}, where, typed=options)
    given = {**values, "name": name}
    if "preset" in values:  # it says all that presets say
        preset = validated(TrainConfig, {"preset": values["preset"]}, where, typed=options)
        given = merged(preset_values(preset), given)
    config = validated(TrainConfig, merged(stored, given), where, typed=options)
    now, defaults = (
        {**identity_of(each, is_whole=True), "epochs": each.epochs}
        for each in (config, TrainConfig())
    )
    given_keys = dotted_keys(given)
    own = [
        f"{flag_of(key.split('.'))} {json.dumps(value)}"
        for key, value in now.items()
        if key not in given_keys and value != defaults[key]
    ]
    if own:
        url = join_url(config.output, name)
        logger.info("%s goes on as it was begun: %s", url, ", ".join(own))
    return config


# What says which run is meant.
_PLACE = ("data", "output", "name", "folds", "fold")


def _stored_values(place: TrainConfig) -> dict[str, Any] | None:
    """Returns the options of a run, or of a fold of it that exists, as values; None for a new run.

    Without the precision: `auto` is what the run was begun in, see `stored_precision`.

    Raises:
        ContentError: what the run has stored is damaged, or of a later version.
    """
    output, names = open_store(place.output), [str(place.name)]
    is_parent = place.folds is not None and place.fold is None
    if is_parent:
        names = [str(each.name) for each in fold_configs(place)]
    for run in map(output.below, names):
        identity = read_json(run, IDENTITY_NAME, RESTORE)
        if identity is None:
            continue
        values = stored_options(identity["config"], _stored_yaml(run), run.url)
        for name in ("precision", "output", "name", *(["fold"] if is_parent else [])):
            values.pop(name, None)
        return values
    return None


def _refuse_other_kind(place: TrainConfig, *, is_new: bool) -> None:
    """Refuses a run in the folder of a cross-validation, and a cross-validation in that of a run.

    Each would replace the report of the other.

    Raises:
        UsageError: says which of the two it is.
    """
    output = open_store(place.output)
    run = output.below(str(place.name))
    if place.folds is None and is_new:
        first = output.below(f"{place.name}-fold-0")
        identity = read_json(first, IDENTITY_NAME, RESTORE)
        if identity is not None or run.stat(CROSS_VALIDATION_NAME) is not None:
            number = identity["config"].get("folds", "N") if identity else "N"
            raise UsageError(
                f"{run.url} is a cross-validation: give --folds {number} to go on with it, or "
                "another --name"
            )
    is_parent = place.folds is not None and place.fold is None
    if is_parent and run.stat(IDENTITY_NAME) is not None:
        raise UsageError(f"{run.url} is a run, and no cross-validation; give another --name")


def _stored_yaml(run: Store) -> dict[str, Any]:
    """Returns `config.yaml` of a run; empty where its first process has not come so far."""
    try:
        return read_yaml(run.get("config.yaml").decode(), f"{run.url}/config.yaml")
    except NotFound:
        return {}


def _absolute(config: TrainConfig) -> TrainConfig:
    """Returns `config` with paths that mean the same in every working folder."""
    paths = {}
    for name in ("data", "output", "cache_dir", "prediction_folder", "init_from"):
        value = getattr(config, name)
        if value is not None and "://" not in value:
            paths[name] = os.path.abspath(value)
    return config.model_copy(update=paths)


def _resolve_reference(
    options: Mapping[str, Any], file: str, prep_options: Mapping[str, bool]
) -> TrainConfig:
    from job.compat.ini_mapping import read_reference_config
    from job.compat.ini_prep import prepare_sources
    from job.compat.ini_reader import format_notes

    reference = read_reference_config(file)
    _check_preset(options, reference.train, file)
    from rich.console import Console

    Console(stderr=True).print(format_notes(reference.notes))
    folder = os.path.dirname(os.path.abspath(file))
    config = _resolved(
        *(merged(reference.train, options), file, options),
        lambda found: run_name(found.data or folder),
    )
    name = str(config.name)
    if config.data is None:
        data = join_url(config.output, f"{name}-dataset")
        prepare_sources(reference.sources, {**reference.prep, **prep_options}, data, file)
        config = config.model_copy(update={"data": data})
    elif prep_options:
        raise _nothing_to_prepare(prep_options)
    return _absolute(config)


def _check_preset(options: Mapping[str, Any], values: Mapping[str, Any], file: str) -> None:
    """Refuses a preset of the command line where `file` would win over parts of it.

    Raises:
        UsageError: names the keys that are set in the file and not on the command line.
    """
    preset = options.get("preset")
    if preset in (None, values.get("preset", "reference")):
        return
    lost = sorted(PRESET_KEYS & dotted_keys(values) - dotted_keys(options))
    if lost:
        raise UsageError(
            f"--preset {preset} lies below {file}, which sets {', '.join(lost)}; take these out "
            "of the file, give them as options too, or leave --preset out"
        )


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


def prep_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the flags for the datasets that a .config file of the reference prepares first."""
    for name, text in (
        ("--skip-bad", "leave bad pictures out, listed in the dataset's report/rejects.csv."),
        ("--allow-leaks", "accept its splits though they share a group or a picture."),
    ):
        function = click.option(name, is_flag=True, help=f"With a .config file: {text}")(function)
    return function


@click.command(cls=SettingsCommand)
@click.option(
    "--local",
    is_flag=True,
    help="Train on the devices of this machine; without it, join the cluster of TF_CONFIG.",
)
@click.option(
    "--config",
    "file",
    type=PATH,
    metavar="PATH",
    help="YAML file with any of these options, or the reference implementation's .config file.",
)
@prep_flags
@settings_options(TrainConfig)
def command(
    local: bool, file: str | None, allow_leaks: bool, skip_bad: bool, **options: Any
) -> int:
    """Train a segmentation network on a prepared dataset, then evaluate it.

    The same command again resumes the run. Ctrl-C saves first; the exit code is then 6.
    """
    place = None if local else place_from_environment()
    if not local and place is None:
        raise UsageError(
            "no cluster is described here (TF_CONFIG is not set); give --local to train on this "
            "machine, or use `flexunet launch train`"
        )
    flags = {"allow_leaks": allow_leaks, "skip_bad": skip_bad}
    prep_options = {name: True for name, is_given in flags.items() if is_given}
    config = resolve_config(given(options), file, prep_options)
    if config.folds is not None and config.fold is None:
        return _cross_validate(config, place)
    outcome = run_in_cluster(config, place) if place else run_local(config)
    if place and place.rank > 0:
        return 0
    show_end(outcome, join_url(config.output, str(config.name)))
    return 0


def show_end(outcome: Mapping[str, Any], url: str) -> None:
    """Prints the newest evaluation of the test split, as the report shows it, and where all is.

    That is not always the evaluation that ended training: `evaluate` may have replaced it since.
    The report was written while the run was owned.
    """
    store = open_store(url)
    summary = read_summary(store) or outcome["evaluation"]
    if summary:
        show_summary(summary)
    click.echo(f"run: {url}")
    click.echo(f"report: {join_url(store.url, REPORT_NAME)}")


def _cross_validate(config: TrainConfig, place: Place | None) -> int:
    if place is not None:
        raise UsageError(
            "--folds trains several runs: give --local, --fold for one of them, or use "
            "`flexunet launch train`"
        )
    with stop_signals() as should_stop:
        code = cross_validate(config, own_process("job.train", "--local"), 1, should_stop)
    if code == 0:
        show_folds(config)
        url = join_url(config.output, str(config.name))
        click.echo(f"report: {write_report(open_store(url))}")
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(command, argv, "flexunet train")


if __name__ == "__main__":
    raise SystemExit(main())
