"""Makes the `tf.distribute` strategy of this process, and checks what it is made of.

Call `configure` before anything else uses TensorFlow.
"""

import contextlib
import faulthandler
import functools
import json
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

from flexunet.errors import UsageError
from flexunet.text import pluralize
from job.config import TrainConfig
from job.distributed.rendezvous import ProcessSpec
from job.distributed.runtime import RESTART, import_tensorflow, set_up, was_used

logger = logging.getLogger(__name__)


def configure(config: TrainConfig, spec: ProcessSpec | None = None) -> Any:
    """Sets TensorFlow up for `config` and returns its `tf.distribute.Strategy`.

    All GPUs that this process sees, or `cpu_replicas` logical CPUs where there is none; together
    with the other processes of `spec`, which all must call it.

    Args:
        place: None, or of a cluster of one: this process alone.

    Raises:
        UsageError: the batch does not divide by the replicas of this process, or TensorFlow was
            used before and the result would be another one.
    """
    tf = import_tensorflow()
    refuse_used(spec)
    set_up(tf, config)
    gpus = tf.config.list_physical_devices("GPU")
    if spec is not None and spec.size > 1:
        return _of_many(tf, config, spec, len(gpus))
    # Otherwise a strategy of one process would look for the peers of another one's cluster.
    os.environ.pop("TF_CONFIG", None)
    return _of_one(tf, config, gpus)


def refuse_used(spec: ProcessSpec | None) -> None:
    """Refuses a cluster of processes where TensorFlow was used before in this one.

    Raises:
        UsageError: says what to do.
    """
    if spec is not None and spec.size > 1 and was_used():
        raise UsageError(
            f"TensorFlow was used before in this process, too late to join a cluster of "
            f"{spec.size} processes; {RESTART}"
        )


def check_devices(config: TrainConfig, spec: ProcessSpec | None, num_gpus: int | None) -> int:
    """Refuses what the strategy could not be made with, before others wait for this process.

    Returns the number of GPUs that this process sees. Whether the batch divides by all replicas is
    known when the others have told theirs, see `check_batch`.

    Args:
        num_gpus: GPUs that this process was promised; None: whatever there is.

    Raises:
        UsageError: a promised GPU is not seen, one process of several shall have several CPU
            replicas, or has used TensorFlow before.
    """
    tf = import_tensorflow()
    seen = len(tf.config.list_physical_devices("GPU"))
    if num_gpus is not None and seen != num_gpus:
        raise _other_gpus(tf, num_gpus, seen)
    if spec is None or spec.size == 1:
        return seen
    refuse_used(spec)
    if config.cpu_replicas > 1:
        raise UsageError(
            f"--cpu-replicas={config.cpu_replicas}: each of {spec.size} processes has one CPU "
            "replica; leave it at 1"
        )
    return seen


def require_gpu() -> None:
    """Refuses to compute on CPUs where a GPU was asked for.

    Raises:
        UsageError: this process sees no GPU.
    """
    tf = import_tensorflow()
    if not tf.config.list_physical_devices("GPU"):
        raise UsageError(
            f"a GPU was asked for and TensorFlow sees none on {socket.gethostname()} "
            f"({_reasons(tf)}); install the extra gpu and a driver there, or ask for none"
        )


def check_batch(config: TrainConfig, num_processes: int, num_gpus: int) -> None:
    """Refuses a batch that cannot be cut into equal parts for every replica and micro-batch.

    Raises:
        UsageError: names the number of replicas.
    """
    num_replicas = num_processes * max(1, num_gpus)
    if config.global_batch_size % num_replicas:
        raise UsageError(
            f"--global-batch-size={config.global_batch_size} does not divide by the "
            f"{num_replicas} replicas ({num_processes} processes, {num_gpus} GPUs each); choose a "
            "multiple, or another number of workers"
        )
    check_micro_batches(config, num_replicas)


def check_micro_batches(config: TrainConfig, num_replicas: int) -> None:
    """Refuses a replica's batch that cannot be cut into equal micro-batches.

    Raises:
        UsageError: names the batch of a replica.
    """
    local = config.global_batch_size // num_replicas
    if local % config.accumulate:
        raise UsageError(
            f"--accumulate={config.accumulate} does not divide the batch of {local} that each of "
            f"{num_replicas} replicas holds; choose a divisor of it"
        )


def _of_many(tf: Any, config: TrainConfig, spec: ProcessSpec, num_gpus: int) -> Any:
    # Of a chief and workers, all become workers: who is first is the rank's to say.
    tasks = {
        "cluster": {"worker": spec.addresses},
        "task": {"type": "worker", "index": spec.rank},
    }
    os.environ["TF_CONFIG"] = json.dumps(tasks)
    # NCCL where there are GPUs. The ring is the one that sums in the same order every time.
    kinds = tf.distribute.experimental.CommunicationImplementation
    options = tf.distribute.experimental.CommunicationOptions(
        implementation=kinds.AUTO if num_gpus else kinds.RING
    )
    _let_watchdog_be_first(config, spec)
    # It holds the interpreter while it waits for the others, so that no thread of ours can end it.
    faulthandler.dump_traceback_later(config.phase_timeout, exit=True, file=2)
    try:
        strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    finally:
        faulthandler.cancel_dump_traceback_later()
    if threading.current_thread() is threading.main_thread():
        # The strategy's runtime has taken SIGTERM for itself, below Python's own handlers.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    return strategy


def _let_watchdog_be_first(config: TrainConfig, spec: ProcessSpec) -> None:
    """Makes TensorFlow's own heartbeat slower than our watchdog.

    Its default of 10 s aborts every process when one is silent: no stacks, and the checkpoint that
    is on its way is lost. A process that dies is noticed by its connections at once all the same.
    """
    # The strategy asks for a service only where none was configured; there is no public way.
    from tensorflow.python.distribute.collective_all_reduce_strategy import coordination_config_pb2
    from tensorflow.python.eager import context

    patience_ms = int(2000 * (config.phase_timeout + config.storage_timeout))
    job = coordination_config_pb2.CoordinatedJob(name="worker", num_tasks=spec.size)
    context.context().configure_coordination_service(
        service_type="standalone",
        service_leader="/job:worker/replica:0/task:0",
        cluster_register_timeout_in_ms=patience_ms,
        heartbeat_timeout_in_ms=patience_ms,
        coordinated_jobs=[job],
    )


def _other_gpus(tf: Any, promised: int, seen: int) -> UsageError:
    return UsageError(
        f"{promised} GPUs were asked for and TensorFlow sees {seen} on {socket.gethostname()} "
        f"({_reasons(tf)}); install the extra gpu and a driver there, or ask for other workers"
    )


def _reasons(tf: Any) -> str:
    """Returns what may hide a GPU from TensorFlow."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
    built = "is built with" if tf.test.is_built_with_cuda() else "is built without"
    return f"CUDA_VISIBLE_DEVICES {visible}; this TensorFlow {built} CUDA"


def _of_one(tf: Any, config: TrainConfig, gpus: list[Any]) -> Any:
    if gpus:
        devices = [device.name for device in tf.config.list_logical_devices("GPU")]
    else:
        devices = _logical_cpus(tf, config.cpu_replicas)
    used = max(n for n in range(1, len(devices) + 1) if config.global_batch_size % n == 0)
    if used < len(devices) and not gpus:
        raise UsageError(
            f"--cpu-replicas={len(devices)}: the batch of {config.global_batch_size} does not "
            "divide by it; choose a divisor of the batch"
        )
    if used < len(devices):
        logger.warning(
            "using %d of %d GPUs: a batch of %d does not divide by more; a multiple of %d uses all",
            used,
            len(devices),
            config.global_batch_size,
            len(devices),
        )
        devices = devices[:used]
    return _mirrored(tuple(name.split("device:")[-1] for name in devices))


def _logical_cpus(tf: Any, number: int) -> list[str]:
    """Returns the names of so many logical CPUs, which are made where they may be.

    Raises:
        UsageError: TensorFlow was used before, with fewer.
    """
    if number > 1 and not was_used():
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0],
            [tf.config.LogicalDeviceConfiguration()] * number,
        )
    names = [device.name for device in tf.config.list_logical_devices("CPU")]
    if len(names) < number:
        raise UsageError(
            f"--cpu-replicas={number}: TensorFlow was used before in this process, with "
            f"{pluralize(len(names), 'CPU device')}, too late for more; {RESTART}"
        )
    return names[:number]


@functools.cache
def _mirrored(devices: tuple[str, ...]) -> Any:
    """Returns the one strategy of this process over `devices`.

    A second one would number its collectives from the start again, and TensorFlow would find other
    shapes under the same number.
    """
    import tensorflow as tf

    with _without_hints():
        return tf.distribute.MirroredStrategy(list(devices))


@contextlib.contextmanager
def _without_hints() -> Iterator[None]:
    """Holds back what TensorFlow advises on collectives where it was used before."""
    log = logging.getLogger("tensorflow")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
