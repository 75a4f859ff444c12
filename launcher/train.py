"""Training on a Ray cluster: workers, their failures, and what the driver shows of them.

The workers run `job.train.run_member`; the bucket alone says where a run stands. So whatever dies
(a worker, the driver, the cluster), the next workers resume, and Ray keeps nothing of a run.

python -m launcher train --data DATASET --output RUNS --name NAME --num-workers 2
"""

import contextlib
import logging
import os
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import click

from flexunet.cli.options import PATH, SettingsCommand, from_options, given, settings_options
from flexunet.errors import FlexUNetError, StoppedError, UsageError, error_of, kind_of
from flexunet.settings import Settings, option
from flexunet.storage import join_url, open_store
from flexunet.text import counted
from job.config import TrainConfig
from job.data.folds import open_folded
from job.distributed.process_group import place_from_environment
from job.distributed.watchdog import STACKS_FOLDER
from job.models.compatibility import check_fit
from job.report import renew_report, write_report
from job.runs.provenance import check_origin
from job.runs.run import Run, find_commits
from job.train import (
    Display,
    earlier_outcome,
    prep_flags,
    resolve_config,
    run_member,
    show_end,
    stop_signals,
    stored_precision,
)
from job.training.cross_validation import cross_validate, own_process, show_folds
from launcher.cluster import (
    Demand,
    check_nodes,
    connected,
    described_resources,
    described_shortage,
    places,
    require_places,
    total,
    widest,
)

logger = logging.getLogger(__name__)

_PACKAGES = ("flexunet", "data_prep", "job")  # whose log records a worker sends

_TICK_S = 0.5
_MEET_S = 5.0  # in which the other workers end with the same error, when they all do
_LONGEST_PAUSE_S = 60.0
_PREEMPTED = "preempted"
_STOPPED = "stopped"


class LaunchConfig(Settings):
    """Where training runs, and how often it is started again."""

    address: str | None = option(
        None, "HOST:PORT of a Ray cluster; none: RAY_ADDRESS, else a Ray of this machine."
    )
    num_workers: int = option(1, "Workers: processes that train together.", ge=1)
    gpus_per_worker: int = option(0, "GPUs of each worker; 0: it computes on CPUs.", ge=0)
    cpus_per_worker: int | None = option(
        None, "CPU cores of each worker; none: as many as all of them can have.", ge=1
    )
    max_failures: int = option(
        3,
        "Failures in a row, with no new checkpoint between them, after which it is given up. A "
        "preempted node is not one.",
        ge=0,
    )
    max_preemptions: int | None = option(
        None,
        "Preempted nodes that are survived; one more ends it, to be resumed. None: any number.",
        ge=0,
    )
    wait_for_nodes: bool = option(
        False, "Wait for nodes that the cluster does not have yet; needs --cpus-per-worker."
    )
    join_timeout: float = option(900.0, "Seconds within which all workers must have started.", gt=0)


class _NotStartedError(FlexUNetError):
    """Workers did not start in time."""


class Board:
    """An actor on which driver and workers leave what the other should know."""

    def __init__(self) -> None:
        self._wish: str | None = None
        self._seen: dict[int, str] = {}
        self._events: list[dict[str, Any]] = []
        self._ends: dict[int, dict[str, Any]] = {}

    def tell(self, rank: int, node: str, events: list[dict[str, Any]]) -> str | None:
        """Takes the events of a worker; returns why it should stop, None to go on."""
        self._seen[rank] = node
        self._events += events
        return self._wish

    def end(self, rank: int, kind: str, text: str) -> None:
        """Takes the error that ended a worker."""
        self._ends[rank] = {"rank": rank, "kind": kind, "text": text}

    def num_ends(self) -> int:
        """Returns how many workers have ended with an error."""
        return len(self._ends)

    def wish(self, reason: str) -> None:
        """Asks all workers to store a checkpoint and stop."""
        self._wish = self._wish or reason

    def take(self) -> tuple[list[dict[str, Any]], dict[int, str], list[dict[str, Any]]]:
        """Returns new events, the node of each rank seen, and the errors of those that ended."""
        events, self._events = self._events, []
        return events, self._seen, [self._ends[rank] for rank in sorted(self._ends)]


def work(settings: dict[str, Any]) -> dict[str, Any] | None:
    """Trains as one worker; returns the outcome, None where all workers ended with an error.

    An error that the others do not share is raised, because they would wait for this one for ever.
    """
    place = place_from_environment()
    assert place is not None  # noqa: S101 - Ray Train sets it
    config = TrainConfig.model_validate(settings["config"])
    if settings["num_gpus"] == 0:
        # Ray leaves the GPUs of a node visible to a worker that was given none.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with _Link(settings["board"], place.rank) as link:
        try:
            return run_member(
                *(config, place, link.report, link.should_stop),
                num_gpus=settings["num_gpus"],
                launch=settings["launch"],
            )
        except Exception as error:
            if link.is_shared(error, place.size):
                return None
            raise


class _Link:
    """A worker's line to the board: a thread that carries events there and the wish to stop back.

    Log records of ours travel as events, because the driver shows nothing else of a worker.
    """

    def __init__(self, board: Any, rank: int) -> None:
        self._board = board
        self._rank = rank
        self._mutex = threading.Lock()
        self._events: list[dict[str, Any]] = []
        self._wish: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._carry, name="link", daemon=True)
        self._handler = _ToBoard(self._add)

    def __enter__(self) -> "_Link":
        for name in _PACKAGES:
            logging.getLogger(name).addHandler(self._handler)
            logging.getLogger(name).setLevel(logging.INFO if self._rank == 0 else logging.WARNING)
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        for name in _PACKAGES:
            logging.getLogger(name).removeHandler(self._handler)
        self._stop.set()
        self._thread.join(_MEET_S)

    def report(self, event: Mapping[str, Any]) -> None:
        """Sends an event of the first worker; the others have the same."""
        if self._rank == 0:
            self._add(dict(event))

    def should_stop(self) -> bool:
        """Returns whether the driver wishes it."""
        return self._wish is not None

    def is_shared(self, error: Exception, size: int) -> bool:
        """Tells the driver of `error`; returns whether all workers soon ended with one."""
        import ray

        kind = kind_of(error) if isinstance(error, FlexUNetError) else FlexUNetError.__name__
        text = (
            str(error) if isinstance(error, FlexUNetError) else f"{type(error).__name__}: {error}"
        )
        if not isinstance(error, FlexUNetError):
            self._add({"event": "log", "level": logging.ERROR, "text": traceback.format_exc()})
        end = time.monotonic() + _MEET_S
        with contextlib.suppress(ray.exceptions.RayError):  # it must not hide the error itself
            ray.get(self._board.end.remote(self._rank, kind, " ".join(text.split())))
            while time.monotonic() < end:
                if ray.get(self._board.num_ends.remote()) == size:
                    return isinstance(error, FlexUNetError)
                time.sleep(_TICK_S / 5)
        return False

    def _add(self, event: dict[str, Any]) -> None:
        with self._mutex:
            self._events.append(event)

    def _carry(self) -> None:
        import ray

        node = ray.get_runtime_context().get_node_id()
        is_last = False
        while not is_last:
            is_last = self._stop.wait(_TICK_S)
            with self._mutex:
                events, self._events = self._events, []
            try:
                wish = ray.get(self._board.tell.remote(self._rank, node, events))
            except ray.exceptions.ActorUnavailableError:
                with self._mutex:  # the network broke for a moment
                    self._events[:0] = events
                continue
            except ray.exceptions.RayError:
                return  # without its driver this worker is about to be ended
            self._wish = wish or self._wish


class _ToBoard(logging.Handler):
    def __init__(self, add: Callable[[dict[str, Any]], None]) -> None:
        super().__init__()
        self._add = add

    def emit(self, record: logging.LogRecord) -> None:
        self._add({"event": "log", "level": record.levelno, "text": record.getMessage()})


@dataclass
class _Group:
    """One set of workers from its start to its end, as the driver sees it."""

    board: Any
    nodes: dict[int, str] = field(default_factory=dict)  # by rank
    ends: list[dict[str, Any]] = field(default_factory=list)
    outcome: dict[str, Any] | None = None
    failure: BaseException | None = None  # Ray's
    is_preempted: bool = False


def launch(config: TrainConfig, settings: LaunchConfig) -> dict[str, Any]:
    """Trains on a cluster until the run is over; returns the outcome.

    Args:
        config: `data`, `output` and `name` are set; paths are absolute.

    Raises:
        FlexUNetError: as `job.train.train_and_evaluate`; also when too many workers failed.
    """
    from job.distributed.runtime import check_batch

    launch_id = uuid.uuid4().hex
    with stop_signals() as should_stop, Display(config) as display, ExitStack() as stack:

        def check_wish() -> None:
            if should_stop():
                raise _stopped_at_start()

        dataset = open_folded(config)
        check_fit(config, dataset)
        check_origin(config, dataset)
        check_batch(config, settings.num_workers, settings.gpus_per_worker)
        check_wish()
        stack.enter_context(connected(settings.address, worker_logs=False))
        outcome = _outcome_so_far(config, dataset.digest, launch_id)
        if outcome is not None:
            return outcome
        settings = _sized(config, settings)
        _tell_plan(settings)
        budget = _Budget(settings)
        while True:
            check_wish()
            budget.begin(_newest_commit(config))
            stacks = _stacks(config)
            with _told_of_cluster():
                group = _run_group(config, settings, launch_id, should_stop, display)
            for name in sorted(_stacks(config) - stacks):
                logger.warning("a process stood still: %s", join_url(_url(config), name))
            if group.outcome is not None:
                return group.outcome
            error = _error_of(group)
            if should_stop():
                raise error
            pause_s = budget.spend(error, is_preempted=group.is_preempted)
            logger.warning("starting the workers again (%s)", error)
            _pause(pause_s, should_stop)


class _Budget:
    """How often workers are started again."""

    def __init__(self, settings: LaunchConfig) -> None:
        self._settings = settings
        self._num_failures = 0
        self._num_preemptions = 0
        self._newest: Any = None

    def begin(self, newest: Any) -> None:
        """Takes the newest commit before a start; failures count from the last new one."""
        if newest != self._newest:
            self._newest, self._num_failures = newest, 0

    def spend(self, error: FlexUNetError, *, is_preempted: bool) -> float:
        """Returns the seconds to wait before the next start.

        Raises:
            FlexUNetError: there is none: `error`, or that the budget is spent.
        """
        if isinstance(error, _NotStartedError) and self._num_preemptions:
            raise StoppedError(f"{error}; the same command resumes") from error
        is_retried = type(error) is FlexUNetError or (
            is_preempted and isinstance(error, StoppedError)
        )
        if not is_retried:
            raise error
        self._num_preemptions += is_preempted
        self._num_failures += not is_preempted
        limit = self._settings.max_preemptions
        if limit is not None and self._num_preemptions > limit:
            raise StoppedError(f"preempted nodes: {self._num_preemptions}; {error}")
        if self._num_failures > self._settings.max_failures:
            raise FlexUNetError(
                f"{counted(self._num_failures, 'failure')} without a new checkpoint, the last: "
                f"{error}"
            )
        # What failed at once will fail at once again.
        return min(2.0**self._num_failures, _LONGEST_PAUSE_S)


def _pause(seconds: float, should_stop: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not should_stop():
        time.sleep(_TICK_S)


@contextmanager
def _told_of_cluster() -> Iterator[None]:
    """Turns Ray's word that our own actor is out of reach into a line.

    Raises:
        FlexUNetError: the node of the driver, or the head, is gone.
    """
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        raise FlexUNetError(
            f"the Ray cluster is out of reach ({type(error).__name__}); the same command resumes, "
            "also on another cluster"
        ) from error


def _outcome_so_far(config: TrainConfig, digest: str, launch_id: str) -> dict[str, Any] | None:
    """Returns the outcome of a run that is over, before any worker starts; None to go on.

    Raises:
        LockedError: another process owns the run.
        UsageError: it is a run of another dataset or other settings.
    """
    with Run.open(config.output, str(config.name), launch=launch_id) as run:
        precision = stored_precision(run)
        outcome = None
        if precision is not None:
            if config.precision == "auto":
                config = config.model_copy(update={"precision": precision})
            outcome = earlier_outcome(config, run, digest)
        if outcome is None:
            run.note_end("looked")
        else:
            renew_report(run.store)  # it may have been evaluated anew since
        return outcome


def _sized(config: TrainConfig, settings: LaunchConfig) -> LaunchConfig:
    """Returns `settings` with the cores of each worker, for a cluster that can do the work.

    Decided once: the same number of threads after a restart computes the same bits.

    Raises:
        UsageError: the workers have no room, or a node lacks something.
    """
    if settings.wait_for_nodes and settings.cpus_per_worker is None:
        raise UsageError("--wait-for-nodes: give --cpus-per-worker too, as the nodes are not known")
    num_cpus = settings.cpus_per_worker
    if num_cpus is None:
        num_cpus = int(widest(settings.num_workers, num_gpus=settings.gpus_per_worker).num_cpus)
    settings = settings.model_copy(update={"cpus_per_worker": num_cpus})
    num_gpus = int(total("GPU"))
    if num_gpus and not settings.gpus_per_worker:
        logger.warning(
            "computing on CPUs, though the cluster has %s; give --gpus-per-worker",
            counted(num_gpus, "GPU"),
        )
    demand = _demand(settings)
    if not settings.wait_for_nodes:
        require_places(demand, settings.num_workers)
    if places(demand):
        check_nodes(demand, reads=[str(config.data)], writes=[config.output])
    return settings


def _tell_plan(settings: LaunchConfig) -> None:
    demand = _demand(settings)
    logger.info(
        "starting %s with %s each, of %s",
        *(counted(settings.num_workers, "worker"), demand, described_resources()),
    )
    shortage = described_shortage(demand, settings.num_workers)
    if shortage is not None:
        logger.warning(
            "there is no room yet (free: %s); waiting for room for %g s (--join-timeout)",
            *(shortage, settings.join_timeout),
        )


def _demand(settings: LaunchConfig) -> Demand:
    return Demand(settings.cpus_per_worker or 1, settings.gpus_per_worker)


def _newest_commit(config: TrainConfig) -> Any:
    places = find_commits(open_store(_url(config)))
    return max(places) if places else None


def _stacks(config: TrainConfig) -> set[str]:
    return {stat.name for stat in open_store(_url(config)).list(f"{STACKS_FOLDER}/")}


def _url(config: TrainConfig) -> str:
    return join_url(config.output, str(config.name))


def _error_of(group: _Group) -> FlexUNetError:
    """Returns what ended the workers: the error that says most, else that one of them died."""
    told = [error_of(end["kind"], end["text"]) for end in group.ends]
    if isinstance(group.failure, FlexUNetError):
        return group.failure
    for error in told:
        if type(error) is not FlexUNetError:
            return error
    dead = sorted(set(group.nodes) - {end["rank"] for end in group.ends})
    if group.failure is not None and dead:
        ranks = ", ".join(str(rank) for rank in dead)
        return FlexUNetError(f"the worker of rank {ranks} died or was killed")
    if told:
        return told[0]
    return FlexUNetError(f"the workers failed: {group.failure}")


def _run_group(
    config: TrainConfig,
    settings: LaunchConfig,
    launch_id: str,
    should_stop: Callable[[], bool],
    display: Display,
) -> _Group:
    """Starts workers and follows them to their end."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()
    group = _Group(board)
    with tempfile.TemporaryDirectory(prefix="flexunet-ray-") as folder:
        thread = threading.Thread(
            target=_fit, args=(group, config, settings, launch_id, folder), daemon=True
        )
        thread.start()
        begin = time.monotonic()
        while thread.is_alive():
            thread.join(_TICK_S)
            if should_stop():
                board.wish.remote(_STOPPED)
            num_before = len(group.nodes)
            _look(group, display)
            if num_before < settings.num_workers == len(group.nodes):
                logger.info("all workers have started; they load TensorFlow")
            if len(group.nodes) < settings.num_workers and not group.ends:
                if should_stop():
                    raise _stopped_at_start()
                if time.monotonic() - begin > settings.join_timeout:
                    group.failure = _not_started(group, settings)
                    break
            elif not group.is_preempted and _draining() & set(group.nodes.values()):
                group.is_preempted = True
                board.wish.remote(_PREEMPTED)
        _look(group, display)
    ray.kill(board)
    return group


def _look(group: _Group, display: Display) -> None:
    import ray

    events, group.nodes, group.ends = ray.get(group.board.take.remote())
    for event in events:
        if event["event"] == "log":
            logger.log(event["level"], "%s", event["text"])
        else:
            display.report(event)


def _draining() -> set[str]:
    """Returns the ids of the nodes that will go away soon."""
    import ray

    # What Ray Train itself reads; there is no public form.
    return set(ray._private.state.state.get_draining_nodes())


def _stopped_at_start() -> StoppedError:
    return StoppedError("stopped before all workers had started; the same command resumes")


def _not_started(group: _Group, settings: LaunchConfig) -> "_NotStartedError":
    missing = [str(rank) for rank in range(settings.num_workers) if rank not in group.nodes]
    return _NotStartedError(
        f"rank {', '.join(missing)} of {counted(settings.num_workers, 'worker')} did not start "
        f"within {settings.join_timeout:g} s (--join-timeout); each needs {_demand(settings)}, the "
        f"cluster has {described_resources()}"
    )


def _fit(
    group: _Group, config: TrainConfig, settings: LaunchConfig, launch_id: str, folder: str
) -> None:
    """Runs one set of workers; what came of it is left in `group`."""
    try:
        group.outcome = _outcome_of(group, config, settings, launch_id, folder)
    except BaseException as error:
        group.failure = error


def _outcome_of(
    group: _Group, config: TrainConfig, settings: LaunchConfig, launch_id: str, folder: str
) -> dict[str, Any] | None:
    """Returns what the first of a set of workers returned; `folder` is Ray's, and empty."""
    # Relative names would mean another folder; drained nodes are seen by the driver; and a start
    # that takes long is the driver's to give up.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(settings.join_timeout)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    from job.distributed.runtime import import_tensorflow

    import_tensorflow()  # quietly; Ray's module does it otherwise
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.tensorflow import TensorflowTrainer

    num_cpus = int(_demand(settings).num_cpus)
    if config.threads == 0 and not settings.gpus_per_worker:
        # Otherwise every worker of a machine would start a thread for each of its cores.
        config = config.model_copy(update={"threads": num_cpus})
    resources = {"CPU": num_cpus} | (
        {"GPU": settings.gpus_per_worker} if settings.gpus_per_worker else {}
    )
    trainer = TensorflowTrainer(
        work,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "board": group.board,
            "launch": launch_id,
            "num_gpus": settings.gpus_per_worker,
        },
        scaling_config=ScalingConfig(
            num_workers=settings.num_workers,
            use_gpu=settings.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        # Ray writes a marker there and no more: a run's own folder is the truth.
        run_config=RunConfig(
            name=str(config.name),
            storage_path=folder,
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0),
        ),
    )
    return trainer.fit().return_value


@click.command(cls=SettingsCommand)
@click.option(
    "--config",
    "file",
    type=PATH,
    metavar="PATH",
    help="YAML file with any of the options of train, or the reference's .config file.",
)
@prep_flags
@settings_options(LaunchConfig)
@settings_options(TrainConfig)
def command(file: str | None, allow_leaks: bool, skip_bad: bool, **options: Any) -> int:
    """Train on a Ray cluster, or on a Ray started on this machine.

    The same command again resumes the run, on any number of workers that the batch divides by.
    """
    flags = {"allow_leaks": allow_leaks, "skip_bad": skip_bad}
    where = {name: options.pop(name) for name in LaunchConfig.model_fields}
    settings = from_options(LaunchConfig, where)
    prep_options = {name: True for name, is_given in flags.items() if is_given}
    config = resolve_config(given(options), file, prep_options)
    if config.folds is not None and config.fold is None:
        return _cross_validate(config, settings)
    show_end(launch(config, settings), _url(config))
    return 0


def _cross_validate(config: TrainConfig, settings: LaunchConfig) -> int:
    """Trains the folds side by side, as many as the cluster has room for; returns the exit code."""
    import ray

    with stop_signals() as should_stop, connected(settings.address, worker_logs=False):
        num_parallel, settings = _side_by_side(int(config.folds or 1), settings)
        address = ray.get_runtime_context().gcs_address
        arguments = _arguments(settings.model_copy(update={"address": address}))
        command = own_process("launcher", "train", *arguments)
        logger.info("%d folds, %d at a time", config.folds, num_parallel)
        code = cross_validate(config, command, num_parallel, should_stop)
    if code == 0:
        show_folds(config)
        click.echo(f"report: {write_report(open_store(_url(config)))}")
    return code


def _side_by_side(num_folds: int, settings: LaunchConfig) -> tuple[int, LaunchConfig]:
    """Returns how many folds have room at a time, and `settings` with the cores of each worker.

    Raises:
        UsageError: not even one has.
    """
    for count in range(num_folds, 0, -1):
        num_workers, num_gpus = count * settings.num_workers, settings.gpus_per_worker
        num_cpus = settings.cpus_per_worker
        if num_cpus is None:
            num_cpus = int(widest(num_workers, num_gpus=num_gpus).num_cpus)
        sized = settings.model_copy(update={"cpus_per_worker": num_cpus})
        if sum(places(_demand(sized)).values()) >= num_workers:
            return count, sized
    if not settings.wait_for_nodes:
        require_places(_demand(sized), settings.num_workers)
    return 1, sized


def _arguments(settings: LaunchConfig) -> list[str]:
    """Returns the command line that gives these settings."""
    arguments = []
    for name, value in settings.model_dump().items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            arguments += [f"--{flag}", str(value)]
    return arguments
