"""Chooses the precision that the devices of this machine compute natively."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flexunet.errors import UsageError
from job.distributed.runtime import import_tensorflow

logger = logging.getLogger(__name__)

# Lowest compute capability whose tensor cores support the type.
_FLOAT16_SINCE = (7, 0)
_BFLOAT16_SINCE = (8, 0)
_FLOAT16_MAX = float(np.finfo(np.float16).max)


def resolve_precision(requested: str, largest_input: float = 1.0) -> str:
    """Returns `requested`, with `auto` replaced by the native precision of this machine.

    Args:
        largest_input: largest network input; above the float16 range, `auto` is not float16.

    Raises:
        UsageError: the hardware does not compute the requested 16-bit type natively.
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
            f"{'.'.join(map(str, min(gpus)))} has no fast float16 arithmetic (since 7.0); "
            "use float32 or auto"
        )
    if requested == "mixed_bfloat16" and native != "mixed_bfloat16":
        raise UsageError(
            "precision=mixed_bfloat16: this machine has no bfloat16 arithmetic "
            "(AVX512-BF16, AMX or a GPU of compute capability 8.0); use float32 or auto"
        )
    return requested


def predicting_precision(trained_in: str) -> str:
    """Returns the precision in which this machine predicts with a run trained in `trained_in`."""
    if trained_in == "mixed_float16" and not _capabilities():
        return "float32"  # several times faster on CPUs
    return trained_in


def native_precision(gpus: Sequence[tuple[int, int]], *, cpu_has_bfloat16: bool) -> str:
    """Returns the fastest precision that every device computes natively.

    Tensor cores support float16 since compute capability 7.0 (V100, T4) and bfloat16 since 8.0. If
    both are native, chooses bfloat16, which needs no loss scale. Source: CUDA C++ Programming
    Guide, section "Compute Capabilities".

    Args:
        gpus: compute capability of each GPU; empty: training uses the CPU.
    """
    if not gpus:
        return "mixed_bfloat16" if cpu_has_bfloat16 else "float32"
    if min(gpus) >= _BFLOAT16_SINCE:
        return "mixed_bfloat16"
    return "mixed_float16" if min(gpus) >= _FLOAT16_SINCE else "float32"


def _capabilities() -> list[tuple[int, int]]:
    """Returns the compute capability of each GPU; (0, 0) if unknown."""
    tf = import_tensorflow()
    details = [
        tf.config.experimental.get_device_details(gpu)
        for gpu in tf.config.list_physical_devices("GPU")
    ]
    return [tuple(detail.get("compute_capability", (0, 0))) for detail in details]


def _cpu_has_bfloat16() -> bool:
    return bool({"avx512_bf16", "amx_bf16"} & cpu_flags())


def cpu_flags() -> set[str]:
    """Returns the feature flags of the first CPU; empty if unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return set(value.split())
    return set()
