"""TensorFlow before its first operation: Keras 3, threads, logical devices, precision, strategy.

`configure` must run before anything else touches TensorFlow; its runtime cannot be changed later.
"""

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.errors import UsageError
from job.config import TrainConfig

logger = logging.getLogger(__name__)


def import_tensorflow() -> Any:
    """Returns the `tensorflow` module, quiet, with Keras 3 beside it.

    Raises:
        RuntimeError: Keras is older than 3, which this package cannot use.
    """
    # Set by launchers for Keras 2; it must be gone before TensorFlow is imported.
    os.environ.pop("TF_USE_LEGACY_KERAS", None)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    with _held_back_stderr():
        import keras
        import tensorflow as tf

        # The first look at the devices writes as much as the import.
        for gpu in tf.config.list_physical_devices("GPU"):
            # Otherwise the first process of a machine takes all of its memory.
            tf.config.experimental.set_memory_growth(gpu, True)
    if int(keras.__version__.split(".")[0]) < 3:
        raise RuntimeError(f"Keras {keras.__version__} found, 3 or newer needed")
    if keras.config.backend() != "tensorflow":
        raise UsageError(
            f"KERAS_BACKEND={keras.config.backend()}: this package trains with TensorFlow; unset it"
        )
    return tf


@contextmanager
def _held_back_stderr() -> Iterator[None]:
    """Shows what libraries write to stderr inside the block only if it fails.

    TensorFlow's C++ part writes several lines before its own log level applies.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        before = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except Exception:
            held.seek(0)
            os.write(before, held.read())
            raise
        finally:
            os.dup2(before, 2)
            os.close(before)


def configure(config: TrainConfig) -> Any:
    """Sets TensorFlow up for `config` and returns its `tf.distribute.Strategy`.

    All GPUs of this machine, or `cpu_replicas` logical CPUs where there is none.
    """
    tf = import_tensorflow()
    gpus = tf.config.list_physical_devices("GPU")
    tf.config.threading.set_intra_op_parallelism_threads(config.threads)
    if not gpus and config.cpu_replicas > 1:
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0],
            [tf.config.LogicalDeviceConfiguration()] * config.cpu_replicas,
        )
    if config.deterministic:
        # Seeds of ours are explicit everywhere; op determinism still asks for a global one.
        tf.random.set_seed(config.seed)
        tf.config.experimental.enable_op_determinism()
    kind = "GPU" if gpus else "CPU"
    devices = [device.name for device in tf.config.list_logical_devices(kind)]
    used = max(n for n in range(1, len(devices) + 1) if config.global_batch_size % n == 0)
    if used < len(devices) and not gpus:
        raise UsageError(
            f"cpu_replicas={len(devices)}: the batch of {config.global_batch_size} does not divide "
            "by it; choose a divisor of the batch"
        )
    if used < len(devices):
        logger.warning(
            "using %d of %d GPUs: a batch of %d does not divide by more; a multiple of %d uses all",
            *(used, len(devices), config.global_batch_size, len(devices)),
        )
        devices = devices[:used]
    return tf.distribute.MirroredStrategy([name.split("device:")[-1] for name in devices])


def resolve_precision(requested: str) -> str:
    """Returns `requested`, with `auto` replaced by what this machine computes natively.

    Raises:
        UsageError: mixed_bfloat16 asked for where the hardware emulates it.
    """
    if requested == "auto":
        return "mixed_bfloat16" if supports_bfloat16() else "float32"
    if requested == "mixed_bfloat16" and not supports_bfloat16():
        raise UsageError(
            "precision=mixed_bfloat16: this machine has no bfloat16 arithmetic "
            "(AVX512-BF16, AMX or a GPU of compute capability 8.0); use float32 or auto"
        )
    return requested


def supports_bfloat16() -> bool:
    """Returns whether every device that training would use multiplies bfloat16 natively."""
    tf = import_tensorflow()
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
        return all(detail.get("compute_capability", (0, 0)) >= (8, 0) for detail in details)
    return bool({"avx512_bf16", "amx_bf16"} & cpu_flags())


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
