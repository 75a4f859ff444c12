"""What is chosen where there are GPUs, by what TensorFlow says of them."""

import os
import platform
import subprocess
import sys
from typing import Any

import pytest
import tensorflow as tf

from flexunet.errors import UsageError
from job.config import TrainConfig
from job.distributed.process_group import Place, Team
from job.distributed.runtime import (
    check_batch,
    check_devices,
    native_precision,
    resolve_precision,
    supports_bfloat16,
    why_not_xla,
)
from job.training.trainer import uses_xla

PEEK = """
import resource, sys
from job.distributed import runtime
from job.config import TrainConfig

tf = runtime.import_tensorflow()
runtime.configure(TrainConfig(keep_memory=sys.argv[1] == "kept"))
work = tf.function(lambda x: tf.reduce_sum(tf.exp(x) * 2))
x = tf.zeros(25_000_000)  # 100 MB, 24,000 pages
float(work(x))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    float(work(x))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


REUSE = """
import ctypes, resource, sys
from job.distributed import runtime
from job.config import TrainConfig

if sys.argv[1] == "configured":
    runtime.configure(TrainConfig())
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
size = 100_000_000  # 24,000 pages

def work():
    piece = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size)))
    ctypes.memset(piece, 1, size)
    libc.free(piece)

work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


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
    assert supports_bfloat16() is (expected == "mixed_bfloat16")
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


@pytest.mark.parametrize(
    ("options", "has_gpu", "expected"),
    [
        ({}, True, False),  # XLA has run on no GPU yet
        ({"xla": "auto"}, True, True),
        ({"xla": "auto"}, False, False),
        ({"xla": "off"}, True, False),
        ({"xla": "on"}, False, True),
        ({"xla": "on", "deterministic": True}, False, True),
        ({"xla": "auto", "deterministic": True}, True, False),
        ({"xla": "auto", "model": {"normalization": "batch"}}, True, False),
        ({"xla": "auto", "model": {"normalization": "group"}}, True, True),
    ],
)
def test_xla_is_used_on_gpus_where_it_can_be(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], has_gpu: bool, expected: bool
) -> None:
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: [0] if has_gpu else [])
    assert uses_xla(TrainConfig(**options), Team(tf.distribute.get_strategy())) is expected


def test_what_xla_cannot_compile_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert why_not_xla() is None
    # No backend of XLA has strings.
    monkeypatch.setattr(tf.nn, "softplus", tf.strings.as_string)
    reason = why_not_xla()
    assert reason is not None
    assert "\n" not in reason
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: [0])
    team = Team(tf.distribute.get_strategy())
    assert not uses_xla(TrainConfig(xla="auto"), team)
    (record,) = [record for record in caplog.records if record.name == "job.training.trainer"]
    assert "AsString" in record.message
    with pytest.raises(UsageError, match="--xla=on: XLA compiles nothing here"):
        uses_xla(TrainConfig(xla="on"), team)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is a setting of glibc")
def test_freed_memory_is_used_again() -> None:
    faults = {}
    for way in ("configured", "plain"):
        done = subprocess.run(
            [sys.executable, "-c", REUSE, way], capture_output=True, text=True, check=True
        )
        faults[way] = int(done.stdout)
    assert faults["configured"] < 2000 < 20_000 < faults["plain"]


def test_kept_memory_is_used_again() -> None:
    faults = {}
    for way in ("kept", "returned"):
        # In a process of its own: TensorFlow reads it once. With oneDNN, which it chooses by the
        # CPU, it keeps memory anyway.
        done = subprocess.run(
            [sys.executable, "-c", PEEK, way],
            env=os.environ | {"TF_ENABLE_ONEDNN_OPTS": "0"},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        faults[way] = int(done.stdout)
    # Now and then the next call finds what the last one left.
    assert faults["kept"] < 2000 < 50_000 < faults["returned"]


def test_devices_are_checked_without_the_batch_that_others_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("job.distributed.runtime.was_used", lambda: False)  # a process of its own
    # Of processes that see 1 and 4 GPUs, one would end alone, and the other wait for it.
    place = Place(1, ("localhost:1", "localhost:2"))
    seen = len(tf.config.list_physical_devices("GPU"))
    assert check_devices(TrainConfig(global_batch_size=3), place, None) == seen


def test_micro_batches_divide_what_each_replica_holds() -> None:
    config = TrainConfig(global_batch_size=8, accumulate=4)
    check_batch(config, 2, 0)
    check_batch(config, 1, 2)
    with pytest.raises(UsageError, match=r"--accumulate=4 does not divide .* of 2 .* 4 repl"):
        check_batch(config, 2, 2)
