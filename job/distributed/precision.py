"""Chooses the precision: what this machine's devices compute natively."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flexunet.errors import UsageError
from job.distributed.runtime import import_tensorflow

logger = logging.getLogger(__name__)

# CUDA's compute capability from which on tensor cores multiply them.
_FLOAT16_SINCE = (7, 0)
_BFLOAT16_SINCE = (8, 0)
_FLOAT16_MAX = float(np.finfo(np.float16).max)


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
        is_too_large = native == "mixed_float16" and largest_input > _FLOAT16_MAX
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
