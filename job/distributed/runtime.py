"""Sets TensorFlow up before its first operation: Keras 3, memory, threads, determinism.

TensorFlow's runtime cannot be changed later. Where a notebook has used it already, what still works
is done; the rest is a warning, or an error where the result would differ.
"""

import contextlib
import ctypes
import logging
import os
from typing import Any

from flexunet.errors import UsageError
from flexunet.native_stderr import suppress_native_stderr
from flexunet.text import pluralize
from job.config import TrainConfig

logger = logging.getLogger(__name__)

RESTART = "start a new process (in a notebook: restart the kernel) and do this first"

_POOL_VARIABLE = "TF_CPU_ALLOCATOR_USE_BFC"


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
    with suppress_native_stderr(shown_on_error=True):
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


def set_up(tf: Any, config: TrainConfig) -> None:
    """Sets memory, threads and determinism; warns of what comes too late for this process.

    Raises:
        UsageError: TensorFlow was used before and the result would be another one.
    """
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
            " and ".join(too_late),
            RESTART,
        )
    if config.deterministic:
        # Seeds of ours are explicit everywhere; op determinism still asks for a global one.
        tf.random.set_seed(config.seed)
        tf.config.experimental.enable_op_determinism()


def was_used() -> bool:
    """Returns whether TensorFlow has made its devices in this process, as its first op does."""
    from tensorflow.python.eager import context

    # Every public function that tells anything of its devices makes them.
    return context.context()._context_handle is not None


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
            f"{pluralize(found, 'thread') if found else 'one thread per core'}, too late for "
            f"--threads={config.threads}, and the last bits depend on it; {RESTART}"
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
