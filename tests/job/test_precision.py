"""The precision follows what TensorFlow says of the GPUs."""

from typing import Any

import pytest
import tensorflow as tf

from flexunet.errors import UsageError
from job.distributed.precision import native_precision, resolve_precision

# The compute capability of each GPU (none: a CPU), whether the CPU has bfloat16, what auto is.
PRECISIONS: list[tuple[list[tuple[int, int]], bool, str]] = [
    ([(8, 0)], False, "mixed_bfloat16"),
    ([(9, 0), (8, 6)], False, "mixed_bfloat16"),
    ([(10, 0)], False, "mixed_bfloat16"),
    ([(7, 5)], True, "mixed_float16"),  # T4; of the CPU nothing counts beside a GPU
    ([(7, 0)], False, "mixed_float16"),  # V100
    ([(9, 0), (7, 5)], False, "mixed_float16"),
    ([(7, 5), (6, 1)], False, "float32"),
    ([(6, 1)], True, "float32"),
    ([(0, 0)], False, "float32"),  # not one of NVIDIA's
    ([], True, "mixed_bfloat16"),
    ([], False, "float32"),
]


@pytest.mark.parametrize(("capabilities", "cpu_has_bfloat16", "expected"), PRECISIONS)
def test_the_fastest_precision_that_every_device_computes_is_chosen(
    capabilities: list[tuple[int, int]], cpu_has_bfloat16: bool, expected: str
) -> None:
    assert native_precision(capabilities, cpu_has_bfloat16=cpu_has_bfloat16) == expected


@pytest.mark.parametrize(("capabilities", "_", "expected"), PRECISIONS[:-2])
def test_precision_follows_the_gpus(
    monkeypatch: pytest.MonkeyPatch, capabilities: list[tuple[int, int]], _: bool, expected: str
) -> None:
    def details(gpu: int) -> dict[str, Any]:
        return {"compute_capability": capabilities[gpu]}

    def devices(kind: str | None = None) -> list[int]:
        return list(range(len(capabilities))) if kind == "GPU" else []

    monkeypatch.setattr(tf.config, "list_physical_devices", devices)
    monkeypatch.setattr(tf.config.experimental, "get_device_details", details)
    monkeypatch.setattr(tf.config.experimental, "set_memory_growth", lambda gpu, grows: None)
    assert resolve_precision("auto") == expected
    # Pixels of 16 bits that are not scaled are beyond float16.
    large = "float32" if expected == "mixed_float16" else expected
    assert resolve_precision("auto", 65535.0) == large
    if expected != "mixed_bfloat16":
        with pytest.raises(UsageError, match="no bfloat16 arithmetic"):
            resolve_precision("mixed_bfloat16")
    if expected == "float32":
        with pytest.raises(UsageError, match=r"capability \d\.\d has no fast float16 arithmetic"):
            resolve_precision("mixed_float16")
    else:
        assert resolve_precision("mixed_float16") == "mixed_float16"


def test_float16_on_a_cpu_is_slow_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: [])
    assert resolve_precision("mixed_float16") == "mixed_float16"
    (record,) = caplog.records
    assert "several times slower than float32 on CPUs" in record.message
