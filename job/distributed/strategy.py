"""Makes the `tf.distribute` strategy of this process, and checks devices and batch.

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

    Uses all GPUs that this process sees, or `cpu_replicas` logical CPUs if there are none. All
    processes of `spec` must call it.

    Args:
        spec: None, or of a cluster of one: this process alone.

    Raises:
        UsageError: the replicas of this process do not divide the batch, or TensorFlow was used
            before and the result would differ.
    """
    tf = import_tensorflow()
    refuse_used(spec)
    set_up(tf, config)
    gpus = tf.config.list_physical_devices("GPU")
    if spec is not None and spec.size > 1:
        return _of_many(tf, config, spec, len(gpus))
    # Otherwise the strategy of a single process would look for the peers in TF_CONFIG.
    before = os.environ.pop("TF_CONFIG", None)
    try:
        return _of_one(tf, config, gpus)
    finally:
        if before is not None:
            os.environ["TF_CONFIG"] = before


def refuse_used(spec: ProcessSpec | None) -> None:
    """Refuses to join a cluster if this process has used TensorFlow before.

    Raises:
        UsageError: it has; says what to do.
    """
    if spec is not None and spec.size > 1 and was_used():
        raise UsageError(
            f"TensorFlow is already in use, so this process cannot join a cluster of {spec.size} "
            f"processes; {RESTART}"
        )


def check_devices(config: TrainConfig, spec: ProcessSpec | None, num_gpus: int | None) -> int:
    """Checks the devices of this process, before other processes wait for it.

    Returns the number of GPUs that this process sees. `check_batch` checks the batch, once the
    numbers of the other processes are known.

    Args:
        num_gpus: GPUs that this process must see; None: any number.

    Raises:
        UsageError: the number of GPUs is another one; or, in a cluster, `cpu_replicas` is not 1 or
            TensorFlow was used before.
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
            "replica; leave --cpu-replicas at 1"
        )
    return seen


def require_gpu() -> None:
    """Refuses to compute on CPUs if a GPU was requested.

    Raises:
        UsageError: this process sees no GPU.
    """
    tf = import_tensorflow()
    if not tf.config.list_physical_devices("GPU"):
        raise UsageError(
            f"a GPU was requested, but TensorFlow finds none on {socket.gethostname()} "
            f"({_reasons(tf)}); install the extra gpu and a driver there, or request none"
        )


def check_batch(config: TrainConfig, num_processes: int, num_gpus: int) -> None:
    """Refuses a batch that does not divide evenly into replicas and micro-batches.

    Raises:
        UsageError: names the number of replicas.
    """
    num_replicas = num_processes * max(1, num_gpus)
    if config.global_batch_size % num_replicas:
        raise UsageError(
            f"--global-batch-size={config.global_batch_size} is not divisible by the "
            f"{num_replicas} replicas ({num_processes} processes, {num_gpus} GPUs each); choose a "
            "multiple, or another number of workers"
        )
    check_micro_batches(config, num_replicas)


def check_micro_batches(config: TrainConfig, num_replicas: int) -> None:
    """Refuses a replica batch that does not divide evenly into micro-batches.

    Raises:
        UsageError: names the batch of a replica.
    """
    local = config.global_batch_size // num_replicas
    if local % config.accumulate:
        raise UsageError(
            f"--accumulate={config.accumulate} does not divide {local}, the batch of each of "
            f"{num_replicas} replicas; choose a divisor of {local}"
        )


def _of_many(tf: Any, config: TrainConfig, spec: ProcessSpec, num_gpus: int) -> Any:
    # A chief becomes a worker: the rank decides which process is first.
    tasks = {
        "cluster": {"worker": spec.addresses},
        "task": {"type": "worker", "index": spec.rank},
    }
    os.environ["TF_CONFIG"] = json.dumps(tasks)
    # NCCL for GPUs. On CPUs only the ring sums in the same order every time.
    kinds = tf.distribute.experimental.CommunicationImplementation
    options = tf.distribute.experimental.CommunicationOptions(
        implementation=kinds.AUTO if num_gpus else kinds.RING
    )
    _let_watchdog_be_first(config, spec)
    # The strategy holds the interpreter while it waits, so no Python thread could end the process.
    faulthandler.dump_traceback_later(config.phase_timeout, exit=True, file=2)
    try:
        strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    finally:
        faulthandler.cancel_dump_traceback_later()
    if threading.current_thread() is threading.main_thread():
        # The runtime of the strategy has replaced the SIGTERM handler below Python's own handlers.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    return strategy


def _let_watchdog_be_first(config: TrainConfig, spec: ProcessSpec) -> None:
    """Makes the heartbeat of TensorFlow slower than the watchdog.

    Its default of 10 s aborts every process when one is silent: no stacks, and the checkpoint in
    upload is lost. A process that dies is still detected at once by its closed connections.
    """
    # The strategy starts a service only if none is configured; there is no public API for this.
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
        f"{promised} GPUs were requested, but TensorFlow finds {seen} on {socket.gethostname()} "
        f"({_reasons(tf)}); install the extra gpu and a driver there, or request other workers"
    )


def _reasons(tf: Any) -> str:
    """Returns possible reasons why TensorFlow finds no GPU."""
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
            f"--cpu-replicas={len(devices)} does not divide the batch of "
            f"{config.global_batch_size}; choose a divisor of the batch"
        )
    if used < len(devices):
        logger.warning(
            "using %d of %d GPUs, because %d do not divide --global-batch-size=%d; a batch that is "
            "a multiple of %d uses all",
            used,
            len(devices),
            len(devices),
            config.global_batch_size,
            len(devices),
        )
        devices = devices[:used]
    return _mirrored(tuple(name.split("device:")[-1] for name in devices))


def _logical_cpus(tf: Any, number: int) -> list[str]:
    """Returns the names of `number` logical CPUs; creates them unless TensorFlow was used before.

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
            f"--cpu-replicas={number}: TensorFlow is already in use with "
            f"{pluralize(len(names), 'CPU device')}, and cannot create more; {RESTART}"
        )
    return names[:number]


@functools.cache
def _mirrored(devices: tuple[str, ...]) -> Any:
    """Returns the strategy over `devices`, one per process.

    A second strategy would number its collectives from the start again, and TensorFlow would find
    other shapes under the same number.
    """
    import tensorflow as tf

    with _without_hints():
        return tf.distribute.MirroredStrategy(list(devices))


@contextlib.contextmanager
def _without_hints() -> Iterator[None]:
    """Suppresses hints of TensorFlow on collectives, given if it was used before."""
    log = logging.getLogger("tensorflow")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
