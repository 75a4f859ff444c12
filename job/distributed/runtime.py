"""TensorFlow before its first operation: Keras 3, threads, logical devices, precision, strategy.

Call `configure` before anything else uses TensorFlow: its runtime cannot be changed later. Where a
notebook has used it already, `configure` does what still works. It warns of what is missing, and
refuses to go on where the result would differ.
"""

import contextlib
import ctypes
import faulthandler
import functools
import json
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flexunet.errors import UsageError
from flexunet.native_stderr import held_back_stderr
from flexunet.text import counted
from job.config import TrainConfig
from job.distributed.process_group import Place
from job.models.compatibility import FLOAT16_MAX

logger = logging.getLogger(__name__)

# CUDA's compute capability from which on tensor cores multiply them.
_FLOAT16_SINCE = (7, 0)
_BFLOAT16_SINCE = (8, 0)
_POOL_VARIABLE = "TF_CPU_ALLOCATOR_USE_BFC"
_RESTART = "start a new process (in a notebook: restart the kernel) and do this first"


def import_tensorflow() -> Any:
    """Returns the `tensorflow` module, quiet, with Keras 3 beside it.

    Raises:
        RuntimeError: Keras is older than 3, which this package cannot use.
    """
    # Set by launchers for Keras 2; it must be gone before TensorFlow is imported.
    os.environ.pop("TF_USE_LEGACY_KERAS", None)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    # TensorFlow's C++ part writes several lines before its own log level applies.
    with held_back_stderr(shown_on_error=True):
        import keras
        import tensorflow as tf

        # The first look at the devices writes as much as the import.
        for gpu in tf.config.list_physical_devices("GPU"):
            # Otherwise the first process of a machine takes all of its memory.
            with contextlib.suppress(RuntimeError, ValueError):  # `configure` tells it
                tf.config.experimental.set_memory_growth(gpu, True)
    if int(keras.__version__.split(".")[0]) < 3:
        raise RuntimeError(f"Keras {keras.__version__} found, 3 or newer needed")
    if keras.config.backend() != "tensorflow":
        raise UsageError(
            f"KERAS_BACKEND={keras.config.backend()}: this package trains with TensorFlow; unset it"
        )
    return tf


def configure(config: TrainConfig, place: Place | None = None) -> Any:
    """Sets TensorFlow up for `config` and returns its `tf.distribute.Strategy`.

    All GPUs that this process sees, or `cpu_replicas` logical CPUs where there is none; together
    with the other processes of `place`, which all must call it.

    Args:
        place: None, or of a cluster of one: this process alone.

    Raises:
        UsageError: the batch does not divide by the replicas of this process, or TensorFlow was
            used before and the result would be another one.
    """
    tf = import_tensorflow()
    refuse_used(place)
    _reuse_freed_memory()
    gpus = tf.config.list_physical_devices("GPU")
    too_late = [
        *([] if _grow(tf, gpus) else ["GPU memory that grows as needed"]),
        *([] if not config.keep_memory or _use_memory_pool() else ["--keep-memory"]),
        *([] if _set_threads(tf, config) else [f"--threads={config.threads}"]),
    ]
    if too_late:
        logger.warning(
            "TensorFlow was used before in this process, too late for %s: training goes on "
            "without; to have it, %s",
            *(" and ".join(too_late), _RESTART),
        )
    if config.deterministic:
        # Seeds of ours are explicit everywhere; op determinism still asks for a global one.
        tf.random.set_seed(config.seed)
        tf.config.experimental.enable_op_determinism()
    if place is not None and place.size > 1:
        return _of_many(tf, config, place, len(gpus))
    # Otherwise a strategy of one process would look for the peers of another one's cluster.
    os.environ.pop("TF_CONFIG", None)
    return _of_one(tf, config, gpus)


def was_used() -> bool:
    """Returns whether TensorFlow has made its devices in this process, as its first op does."""
    from tensorflow.python.eager import context

    # Every public function that tells anything of its devices makes them.
    return context.context()._context_handle is not None


def refuse_used(place: Place | None) -> None:
    """Refuses a cluster of processes where TensorFlow was used before in this one.

    Raises:
        UsageError: says what to do.
    """
    if place is not None and place.size > 1 and was_used():
        raise UsageError(
            f"TensorFlow was used before in this process, too late to join a cluster of "
            f"{place.size} processes; {_RESTART}"
        )


def _grow(tf: Any, gpus: list[Any]) -> bool:
    """Returns whether the memory of every GPU grows as needed."""
    return all(tf.config.experimental.get_memory_growth(gpu) for gpu in gpus)


def _set_threads(tf: Any, config: TrainConfig) -> bool:
    """Sets the number of threads of an operation; returns whether it could.

    Raises:
        UsageError: it could not, and bits that depend on the number are asked for.
    """
    threading_of_tf = tf.config.threading
    found = threading_of_tf.get_intra_op_parallelism_threads() or 0
    if found == config.threads:
        return True
    if not was_used():
        threading_of_tf.set_intra_op_parallelism_threads(config.threads)
        return True
    if config.deterministic:
        raise UsageError(
            f"--deterministic: TensorFlow was used before in this process, with "
            f"{counted(found, 'thread') if found else 'one thread per core'}, too late for "
            f"--threads={config.threads}, and the last bits depend on it; {_RESTART}"
        )
    return False


def _reuse_freed_memory() -> None:
    """Lets glibc serve the tensors of a step from the memory of the step before.

    By default it gives large pieces back to the system, which must clear every page of the next
    one: 8 % of the CPU time of a step at 512 x 512. No more arenas than there are, because only
    the first holds pieces above 64 MiB. Where the C library is another one, nothing changes.
    """
    with contextlib.suppress(AttributeError):
        set_option = ctypes.CDLL(None).mallopt
        # Names and numbers are those of malloc.h.
        for option, value in (
            (-3, 2**30),  # M_MMAP_THRESHOLD, bytes
            (-1, 2**31 - 1),  # M_TRIM_THRESHOLD, bytes: the largest that it takes
            (-8, 1),  # M_ARENA_MAX
        ):
            set_option(option, value)


def _use_memory_pool() -> bool:
    """Lets TensorFlow hold what is freed in a pool of its own, also above 1 GiB.

    Returns whether it could.

    Convolutions without oneDNN make such tensors: a step at 512 x 512 then took 40 % of its CPU
    time for new pages, and 11.8 GB instead of 6.9 with the pool. Read when TensorFlow makes its
    first CPU device; its allocator for oneDNN does not look at it.
    """
    if was_used():
        return os.environ.get(_POOL_VARIABLE) == "true"
    os.environ[_POOL_VARIABLE] = "true"
    return True


def check_devices(config: TrainConfig, place: Place | None, num_gpus: int | None) -> int:
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
    if place is None or place.size == 1:
        return seen
    refuse_used(place)
    if config.cpu_replicas > 1:
        raise UsageError(
            f"--cpu-replicas={config.cpu_replicas}: each of {place.size} processes has one CPU "
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


def _of_many(tf: Any, config: TrainConfig, place: Place, num_gpus: int) -> Any:
    # Of a chief and workers, all become workers: who is first is the rank's to say.
    tasks = {
        "cluster": {"worker": place.addresses},
        "task": {"type": "worker", "index": place.rank},
    }
    os.environ["TF_CONFIG"] = json.dumps(tasks)
    # NCCL where there are GPUs. The ring is the one that sums in the same order every time.
    kinds = tf.distribute.experimental.CommunicationImplementation
    options = tf.distribute.experimental.CommunicationOptions(
        implementation=kinds.AUTO if num_gpus else kinds.RING
    )
    _let_watchdog_be_first(config, place)
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


def _let_watchdog_be_first(config: TrainConfig, place: Place) -> None:
    """Makes TensorFlow's own heartbeat slower than our watchdog.

    Its default of 10 s aborts every process when one is silent: no stacks, and the checkpoint that
    is on its way is lost. A process that dies is noticed by its connections at once all the same.
    """
    # The strategy asks for a service only where none was configured; there is no public way.
    from tensorflow.python.distribute.collective_all_reduce_strategy import coordination_config_pb2
    from tensorflow.python.eager import context

    patience_ms = int(2000 * (config.phase_timeout + config.storage_timeout))
    job = coordination_config_pb2.CoordinatedJob(name="worker", num_tasks=place.size)
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
            *(used, len(devices), config.global_batch_size, len(devices)),
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
            f"{counted(len(names), 'CPU device')}, too late for more; {_RESTART}"
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


def resolve_precision(requested: str, largest_input: float = 1.0) -> str:
    """Returns `requested`, with `auto` replaced by what this machine computes natively.

    Args:
        largest_input: of the network; beyond float16's largest number, `auto` is not float16.

    Raises:
        UsageError: 16 bits asked for of a kind that the hardware emulates, or a GPU does.
    """
    gpus = _capabilities()
    native = native_precision(gpus, cpu_has_bfloat16=_cpu_has_bfloat16())
    if requested == "auto":
        is_too_large = native == "mixed_float16" and largest_input > FLOAT16_MAX
        return "float32" if is_too_large else native
    if requested == "mixed_float16" and not gpus:
        logger.warning("precision=mixed_float16 is several times slower than float32 on CPUs")
    elif requested == "mixed_float16" and min(gpus) < _FLOAT16_SINCE:
        raise UsageError(
            "precision=mixed_float16: a GPU of compute capability "
            f"{'.'.join(map(str, min(gpus)))} has no fast float16 arithmetic (7.0 and later have); "
            "use float32 or auto"
        )
    if requested == "mixed_bfloat16" and native != "mixed_bfloat16":
        raise UsageError(
            "precision=mixed_bfloat16: this machine has no bfloat16 arithmetic "
            "(AVX512-BF16, AMX or a GPU of compute capability 8.0); use float32 or auto"
        )
    return requested


def predicting_precision(trained_in: str) -> str:
    """Returns the precision in which this machine predicts by a run that was trained in another."""
    if trained_in == "mixed_float16" and not _capabilities():
        return "float32"  # here several times faster
    return trained_in


def supports_bfloat16() -> bool:
    """Returns whether every device that training would use multiplies bfloat16 natively."""
    found = native_precision(_capabilities(), cpu_has_bfloat16=_cpu_has_bfloat16())
    return found == "mixed_bfloat16"


def native_precision(gpus: Sequence[tuple[int, int]], *, cpu_has_bfloat16: bool) -> str:
    """Returns the fastest precision that every device computes natively.

    Tensor cores multiply float16 since compute capability 7.0 (V100, T4), bfloat16 since 8.0; of
    both, bfloat16 is taken, which needs no loss scale. Source: CUDA C++ Programming Guide, section
    "Compute Capabilities".

    Args:
        gpus: the compute capability of each; empty: training uses the CPU.
    """
    if not gpus:
        return "mixed_bfloat16" if cpu_has_bfloat16 else "float32"
    if min(gpus) >= _BFLOAT16_SINCE:
        return "mixed_bfloat16"
    return "mixed_float16" if min(gpus) >= _FLOAT16_SINCE else "float32"


def _capabilities() -> list[tuple[int, int]]:
    """Returns the compute capability of each GPU; (0, 0) of one that tells none."""
    tf = import_tensorflow()
    details = [
        tf.config.experimental.get_device_details(gpu)
        for gpu in tf.config.list_physical_devices("GPU")
    ]
    return [tuple(detail.get("compute_capability", (0, 0))) for detail in details]


def _cpu_has_bfloat16() -> bool:
    return bool({"avx512_bf16", "amx_bf16"} & cpu_flags())


def why_not_xla() -> str | None:
    """Returns why XLA cannot compile a network for this machine's devices; None: it can.

    For a GPU it needs parts of CUDA that TensorFlow itself runs without.
    """
    tf = import_tensorflow()

    @tf.function(jit_compile=True, autograph=False)
    def convolution(images: Any, kernel: Any) -> Any:
        return tf.nn.softplus(tf.nn.conv2d(images, kernel, 1, "SAME"))

    kernel = tf.ones((3, 3, 8, 8))
    try:
        with tf.GradientTape() as tape:
            tape.watch(kernel)
            value = convolution(tf.ones((1, 8, 8, 8)), kernel)
        tape.gradient(value, kernel).numpy()
    except tf.errors.OpError as error:
        return str(error.message).splitlines()[0]
    return None


def cpu_flags() -> set[str]:
    """Returns the feature flags of the first CPU; empty where Linux does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return set(value.split())
    return set()
