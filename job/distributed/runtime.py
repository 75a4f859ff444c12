"""Sets TensorFlow up before its first operation: Keras 3, memory, threads, determinism.

The runtime of TensorFlow cannot be changed later. If a notebook has used it already, each setting
that is too late gives a warning, or an error if the result would differ.
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

RESTART = (
    "restart the process (in a notebook: restart the kernel), and call flexunet before other "
    "TensorFlow code"
)

_POOL_VARIABLE = "TF_CPU_ALLOCATOR_USE_BFC"


def import_tensorflow() -> Any:
    """Imports and returns `tensorflow` without its log output, with Keras 3.

    Raises:
        RuntimeError: Keras is older than 3, which this package cannot use.
    """
    # Some launchers set this for Keras 2. Remove it before TensorFlow is imported.
    os.environ.pop("TF_USE_LEGACY_KERAS", None)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    # The C++ part of TensorFlow writes several lines before its log level applies.
    with suppress_native_stderr(shown_on_error=True):
        import keras
        import tensorflow as tf

        # The first listing of the devices writes as much as the import.
        for gpu in tf.config.list_physical_devices("GPU"):
            # Otherwise the first process of a machine takes all GPU memory.
            with contextlib.suppress(RuntimeError, ValueError):  # `set_up` warns
                tf.config.experimental.set_memory_growth(gpu, True)
    if int(keras.__version__.split(".")[0]) < 3:
        raise RuntimeError(f"found Keras {keras.__version__}, but 3 or newer is required")
    if keras.config.backend() != "tensorflow":
        raise UsageError(
            f"KERAS_BACKEND={keras.config.backend()}: training needs TensorFlow; unset the variable"
        )
    return tf


def set_up(tf: Any, config: TrainConfig) -> None:
    """Sets memory, threads and determinism; warns of settings that cannot be set any more.

    Raises:
        UsageError: TensorFlow is already in use, and the result would differ.
    """
    _reuse_freed_memory()
    gpus = tf.config.list_physical_devices("GPU")
    too_late = [
        *([] if _grow(tf, gpus) else ["GPU memory growth"]),
        *([] if not config.keep_memory or _use_memory_pool() else ["--keep-memory"]),
        *([] if _set_threads(tf, config) else [f"--threads={config.threads}"]),
    ]
    if too_late:
        logger.warning(
            "TensorFlow is already in use, so %s cannot be set; training continues without; "
            "to set, %s",
            " and ".join(too_late),
            RESTART,
        )
    if config.deterministic:
        # All seeds are explicit, but op determinism needs a global seed, too.
        tf.random.set_seed(config.seed)
        tf.config.experimental.enable_op_determinism()
    elif is_deterministic():
        logger.warning(
            "--no-deterministic: TensorFlow was made deterministic before in this process and "
            "stays so, which is slower; to change it, %s",
            RESTART,
        )


def is_deterministic() -> bool:
    """Returns whether the operations of this process are deterministic, which cannot be undone."""
    from tensorflow.python.framework import config

    return bool(config.is_op_determinism_enabled())


def was_used() -> bool:
    """Returns whether TensorFlow has created its devices, which its first operation does."""
    from tensorflow.python.eager import context

    # Every public function about the devices would create them.
    return context.context()._context_handle is not None


def _grow(tf: Any, gpus: list[Any]) -> bool:
    """Returns whether the memory of every GPU grows as needed."""
    return all(tf.config.experimental.get_memory_growth(gpu) for gpu in gpus)


def _set_threads(tf: Any, config: TrainConfig) -> bool:
    """Sets the number of threads per operation; returns whether that was possible.

    Raises:
        UsageError: it is too late, and `deterministic` needs the number.
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
            f"--deterministic: TensorFlow is already in use with "
            f"{pluralize(found, 'thread') if found else 'one thread per core'}, so "
            f"--threads={config.threads} cannot be set, and the last bits of results depend on it; "
            f"{RESTART}"
        )
    return False


def _reuse_freed_memory() -> None:
    """Makes glibc reuse the memory of the step before for the tensors of a step.

    By default glibc returns large pieces to the system, which must clear every page of the next
    piece: 8 % of the CPU time of a step at 512 x 512. Limits glibc to one arena, because only the
    first can hold pieces above 64 MiB. Has no effect with another C library.
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
    """Makes TensorFlow keep freed memory in its own pool, also tensors above 1 GiB.

    Returns whether that was possible.

    Convolutions without oneDNN create such tensors: without the pool, a step at 512 x 512 took 40 %
    of its CPU time for new pages; with it, 11.8 GB of memory instead of 6.9. TensorFlow reads the
    variable when it creates its first CPU device; its oneDNN allocator ignores it.
    """
    if was_used():
        return os.environ.get(_POOL_VARIABLE) == "true"
    os.environ[_POOL_VARIABLE] = "true"
    return True
