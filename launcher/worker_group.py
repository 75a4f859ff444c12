"""Runs one set of workers with Ray Train, and follows it in the driver."""

import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flexunet.errors import FlexUNetError, StoppedError, error_of
from flexunet.text import pluralize
from job.config import TrainConfig
from job.reporting.training_display import TrainingDisplay
from launcher.channel import RunCoordinator
from launcher.cluster.resources import described_resources
from launcher.config import LaunchConfig
from launcher.worker import work

logger = logging.getLogger(__name__)

_TICK_S = 0.5
_PREEMPTED = "preempted"
_STOPPED = "stopped"


class NotStartedError(FlexUNetError):
    """Workers did not start in time."""


@dataclass
class WorkerGroup:
    """The state of one set of workers in the driver."""

    coordinator: Any
    nodes: dict[int, str] = field(default_factory=dict)  # by rank
    ends: list[dict[str, Any]] = field(default_factory=list)
    outcome: dict[str, Any] | None = None
    failure: BaseException | None = None  # Ray's
    is_preempted: bool = False


def group_error(group: WorkerGroup) -> FlexUNetError:
    """Returns the error that ended the workers: the most specific one, else a worker's death."""
    failures = [error_of(end["kind"], end["text"]) for end in group.ends]
    if isinstance(group.failure, FlexUNetError):
        return group.failure
    for error in failures:
        if type(error) is not FlexUNetError:
            return error
    dead = sorted(set(group.nodes) - {end["rank"] for end in group.ends})
    if group.failure is not None and dead:
        ranks = ", ".join(str(rank) for rank in dead)
        return FlexUNetError(f"the worker of rank {ranks} died or was killed")
    if failures:
        return failures[0]
    return FlexUNetError(f"the workers failed: {group.failure}")


def run_group(
    config: TrainConfig,
    settings: LaunchConfig,
    launch_id: str,
    should_stop: Callable[[], bool],
    display: TrainingDisplay,
) -> WorkerGroup:
    """Starts workers and follows them until all have ended."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    coordinator = ray.remote(num_cpus=0, scheduling_strategy=here)(RunCoordinator).remote()
    group = WorkerGroup(coordinator)
    with tempfile.TemporaryDirectory(prefix="flexunet-ray-") as folder:
        thread = threading.Thread(
            target=_fit, args=(group, config, settings, launch_id, folder), daemon=True
        )
        thread.start()
        begin = time.monotonic()
        while thread.is_alive():
            thread.join(_TICK_S)
            if should_stop():
                coordinator.request_stop.remote(_STOPPED)
            num_before = len(group.nodes)
            _look(group, display)
            if num_before < settings.num_workers == len(group.nodes):
                logger.info("all workers have started and are loading TensorFlow")
            if len(group.nodes) < settings.num_workers and not group.ends:
                if should_stop():
                    raise stopped_at_start()
                if time.monotonic() - begin > settings.join_timeout:
                    group.failure = _not_started(group, settings)
                    break
            elif not group.is_preempted and _draining() & set(group.nodes.values()):
                group.is_preempted = True
                coordinator.request_stop.remote(_PREEMPTED)
        _look(group, display)
    ray.kill(coordinator)
    return group


def _look(group: WorkerGroup, display: TrainingDisplay) -> None:
    import ray

    events, group.nodes, group.ends = ray.get(group.coordinator.take.remote())
    for event in events:
        if event["event"] == "log":
            logger.log(event["level"], "%s", event["text"])
        else:
            display.report(event)


def _draining() -> set[str]:
    """Returns the ids of the nodes that the cluster will remove soon."""
    import ray

    # Ray Train reads the same; there is no public function.
    return set(ray._private.state.state.get_draining_nodes())


def stopped_at_start() -> StoppedError:
    """Returns the error for a stop before training began."""
    return StoppedError("stopped before all workers had started; the same command resumes")


def _not_started(group: WorkerGroup, settings: LaunchConfig) -> "NotStartedError":
    missing = [str(rank) for rank in range(settings.num_workers) if rank not in group.nodes]
    return NotStartedError(
        f"rank {', '.join(missing)} of {pluralize(settings.num_workers, 'worker')} did not start "
        f"within {settings.join_timeout:g} s (--join-timeout); each needs {settings.per_worker}, "
        f"the cluster has {described_resources()}"
    )


def _fit(
    group: WorkerGroup, config: TrainConfig, settings: LaunchConfig, launch_id: str, folder: str
) -> None:
    """Runs one set of workers; stores its outcome or failure in `group`."""
    try:
        group.outcome = _outcome_of(group, config, settings, launch_id, folder)
    except BaseException as error:
        group.failure = error


def _outcome_of(
    group: WorkerGroup, config: TrainConfig, settings: LaunchConfig, launch_id: str, folder: str
) -> dict[str, Any] | None:
    """Returns the outcome from rank 0; `folder` is an empty folder for Ray."""
    # Keep the working folder, or relative paths would change. The driver watches for drained
    # nodes, and ends a start that takes too long.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(settings.join_timeout)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    from job.distributed.runtime import import_tensorflow

    import_tensorflow()  # quietly, before Ray's module does it
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.tensorflow import TensorflowTrainer

    num_cpus = int(settings.per_worker.num_cpus)
    if config.threads == 0 and not settings.gpus_per_worker:
        # Otherwise every worker would start one thread per core of its machine.
        config = config.model_copy(update={"threads": num_cpus})
    resources = {"CPU": num_cpus} | (
        {"GPU": settings.gpus_per_worker} if settings.gpus_per_worker else {}
    )
    trainer = TensorflowTrainer(
        work,
        train_loop_config={
            # What is not set, the first worker plans.
            "config": config.model_dump(mode="json", exclude_unset=True),
            "coordinator": group.coordinator,
            "launch": launch_id,
            "num_gpus": settings.gpus_per_worker,
            "num_cpus": num_cpus,
        },
        scaling_config=ScalingConfig(
            num_workers=settings.num_workers,
            use_gpu=settings.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        # Ray writes only a marker here; the state of a run is in the run's own folder.
        run_config=RunConfig(
            name=str(config.name),
            storage_path=folder,
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0),
        ),
    )
    return trainer.fit().return_value
