"""Starts workers on a Ray cluster, and restarts them until the run is finished.

The workers run `job.training.process.run_process`. All state of a run is in its folder or bucket,
none in Ray: whatever dies (a worker, the driver, the cluster), the next workers resume.
"""

import logging
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from flexunet.errors import FlexUNetError, StoppedError, UsageError
from flexunet.storage import join_url, open_store
from flexunet.text import pluralize
from job.config import TrainConfig
from job.data.dataset import Dataset
from job.data.folds import open_folded
from job.distributed.watchdog import STACKS_FOLDER
from job.models.compatibility import check_compatible
from job.planning.facts import machine_facts
from job.planning.options import begun_config, needs_plan
from job.planning.settle import preview
from job.reporting.training_display import TrainingDisplay
from job.runs.checkpoints import find_checkpoints
from job.runs.layout import run_url
from job.runs.provenance import check_origin
from job.runs.run import Run
from job.training.loop import earlier_outcome, renew_ended_run
from job.training.process import stop_signals, stored_precision
from launcher.cluster.connection import connected
from launcher.cluster.node_checks import check_nodes
from launcher.cluster.resources import (
    described_resources,
    described_shortage,
    require_slots,
    total,
    widest,
    worker_slots,
)
from launcher.config import LaunchConfig
from launcher.worker_group import NotStartedError, group_error, run_group, stopped_at_start

logger = logging.getLogger(__name__)

_TICK_S = 0.5
_LONGEST_PAUSE_S = 60.0


def launch(config: TrainConfig, settings: LaunchConfig) -> dict[str, Any]:
    """Trains on a cluster until the run is finished; returns its outcome.

    Args:
        config: has `data`, `output` and `name`; paths are absolute.

    Raises:
        FlexUNetError: as `job.training.loop.train_and_evaluate`; also when too many workers failed.
    """
    launch_id = uuid.uuid4().hex
    with stop_signals() as should_stop, TrainingDisplay(config) as display, ExitStack() as stack:

        def check_stop() -> None:
            if should_stop():
                raise stopped_at_start()

        dataset = open_folded(config)
        _check(config, settings, dataset)
        check_stop()
        stack.enter_context(connected(settings.address, worker_logs=False))
        outcome, config = _outcome_so_far(config, dataset.digest, launch_id)
        if outcome is not None:
            return outcome
        settings = _sized(config, settings)
        _log_plan(settings)
        retries = _RetryPolicy(settings)
        while True:
            check_stop()
            retries.begin(_newest_commit(config))
            stacks = _stacks(config)
            with _cluster_errors():
                group = run_group(config, settings, launch_id, should_stop, display)
            for name in sorted(_stacks(config) - stacks):
                logger.warning("a process stalled; stacks: %s", join_url(run_url(config), name))
            if group.outcome is not None:
                return group.outcome
            error = group_error(group)
            if should_stop():
                raise error
            pause_s = retries.spend(error, is_preempted=group.is_preempted)
            logger.warning("restarting the workers (%s)", error)
            _pause(pause_s, should_stop)


def _check(config: TrainConfig, settings: LaunchConfig, dataset: Dataset) -> None:
    """Checks before any worker starts what can be checked without one.

    The first worker plans the options of a new run. Its machine may differ from this one, so the
    plan here is only for these checks.
    """
    from job.distributed.strategy import check_batch

    num_replicas = settings.num_workers * max(1, settings.gpus_per_worker)
    machine = machine_facts(config, num_gpus=0)
    planned = preview(config, machine.model_copy(update={"num_replicas": num_replicas}))
    check_compatible(planned, dataset)
    check_origin(planned, dataset)
    check_batch(planned, settings.num_workers, settings.gpus_per_worker)


class _RetryPolicy:
    """Decides whether the workers restart, by the failures and preemptions so far."""

    def __init__(self, settings: LaunchConfig) -> None:
        self._settings = settings
        self._num_failures = 0
        self._num_preemptions = 0
        self._newest: Any = None

    def begin(self, newest: Any) -> None:
        """Notes the newest checkpoint before a start; a new one resets the failure count."""
        if newest != self._newest:
            self._newest, self._num_failures = newest, 0

    def spend(self, error: FlexUNetError, *, is_preempted: bool) -> float:
        """Returns the seconds to wait before the next start.

        Raises:
            FlexUNetError: the workers must not restart: `error` itself, or a limit is reached.
        """
        if isinstance(error, NotStartedError) and self._num_preemptions:
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
            raise StoppedError(
                f"{pluralize(self._num_preemptions, 'preempted node')}, more than "
                f"--max-preemptions={limit}; {error}"
            )
        if self._num_failures > self._settings.max_failures:
            raise FlexUNetError(
                f"{pluralize(self._num_failures, 'failure')} without a new checkpoint, more than "
                f"--max-failures={self._settings.max_failures}; the last: {error}"
            )
        # Back off: an immediate failure is likely to repeat.
        return min(2.0**self._num_failures, _LONGEST_PAUSE_S)


def _pause(seconds: float, should_stop: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not should_stop():
        time.sleep(_TICK_S)


@contextmanager
def _cluster_errors() -> Iterator[None]:
    """Turns a Ray error about the coordinator actor into a one-line error.

    Raises:
        FlexUNetError: the node of the driver, or the head, is gone.
    """
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        raise FlexUNetError(
            f"the Ray cluster is unreachable ({type(error).__name__}); the same command resumes, "
            "also on another cluster"
        ) from error


def _outcome_so_far(
    config: TrainConfig, digest: str, launch_id: str
) -> tuple[dict[str, Any] | None, TrainConfig]:
    """Returns the outcome of a finished run before any worker starts, else None, and the config.

    A run that another process has begun meanwhile keeps its options.

    Raises:
        LockedError: another process owns the run.
        UsageError: the run has another dataset or other settings.
    """
    with Run.open(config.output, str(config.name), launch=launch_id) as run:
        precision = stored_precision(run)
        outcome = None
        if precision is not None:
            if needs_plan(config):
                config = begun_config(config)
            found = config
            if config.precision == "auto":
                found = config.model_copy(update={"precision": precision})
            outcome = earlier_outcome(found, run, digest)
        if outcome is None:
            run.note_end("looked")
        else:
            renew_ended_run(config, run, outcome)
        return outcome, config


def _sized(config: TrainConfig, settings: LaunchConfig) -> LaunchConfig:
    """Returns `settings` with the cores per worker, after checking the cluster.

    Set once: only the same number of threads computes the same bits after a restart.

    Raises:
        UsageError: the workers do not fit on the cluster, or a node lacks something.
    """
    if settings.wait_for_nodes and settings.cpus_per_worker is None:
        raise UsageError("--wait-for-nodes needs --cpus-per-worker: the nodes are not known yet")
    num_cpus = settings.cpus_per_worker
    if num_cpus is None:
        num_cpus = int(widest(settings.num_workers, num_gpus=settings.gpus_per_worker).num_cpus)
    settings = settings.model_copy(update={"cpus_per_worker": num_cpus})
    num_gpus = int(total("GPU"))
    if num_gpus and not settings.gpus_per_worker:
        logger.warning(
            "training on CPUs although the cluster has %s; to use GPUs, give --gpus-per-worker",
            pluralize(num_gpus, "GPU"),
        )
    per_worker = settings.per_worker
    if not settings.wait_for_nodes:
        require_slots(per_worker, settings.num_workers)
    if worker_slots(per_worker):
        check_nodes(per_worker, reads=[str(config.data)], writes=[config.output])
    return settings


def _log_plan(settings: LaunchConfig) -> None:
    per_worker = settings.per_worker
    logger.info(
        "starting %s with %s each; the cluster has %s",
        pluralize(settings.num_workers, "worker"),
        per_worker,
        described_resources(),
    )
    shortage = described_shortage(per_worker, settings.num_workers)
    if shortage is not None:
        logger.warning(
            "not enough free resources yet (free: %s); waiting up to %g s (--join-timeout)",
            shortage,
            settings.join_timeout,
        )


def _newest_commit(config: TrainConfig) -> Any:
    checkpoints = find_checkpoints(open_store(run_url(config)))
    return max(checkpoints) if checkpoints else None


def _stacks(config: TrainConfig) -> set[str]:
    return {stat.name for stat in open_store(run_url(config)).list(f"{STACKS_FOLDER}/")}
