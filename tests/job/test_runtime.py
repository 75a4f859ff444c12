"""What is chosen where there are GPUs, by what TensorFlow says of them."""

import os
import subprocess
import sys
from typing import Any

import pytest
import tensorflow as tf

from data_prep.errors import UsageError
from job.runtime import resolve_precision, supports_bfloat16

PEEK = """
from job import runtime
from job.config import TrainConfig

tf = runtime.import_tensorflow()
runtime.configure(TrainConfig())
import os
print(os.environ["TF_CPU_ALLOCATOR_USE_BFC"])
"""


@pytest.mark.parametrize(
    ("capabilities", "is_native"),
    [([(8, 0)], True), ([(9, 0), (8, 6)], True), ([(7, 5)], False), ([(9, 0), (7, 5)], False)],
)
def test_bfloat16_is_chosen_where_every_gpu_computes_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: list[tuple[int, int]], is_native: bool
) -> None:
    def details(gpu: int) -> dict[str, Any]:
        return {"compute_capability": capabilities[gpu]}

    def devices(kind: str | None = None) -> list[int]:
        return list(range(len(capabilities))) if kind == "GPU" else []

    monkeypatch.setattr(tf.config, "list_physical_devices", devices)
    monkeypatch.setattr(tf.config.experimental, "get_device_details", details)
    monkeypatch.setattr(tf.config.experimental, "set_memory_growth", lambda gpu, grows: None)
    assert supports_bfloat16() is is_native
    assert resolve_precision("auto") == ("mixed_bfloat16" if is_native else "float32")
    if not is_native:
        with pytest.raises(UsageError, match="no bfloat16 arithmetic"):
            resolve_precision("mixed_bfloat16")


@pytest.mark.parametrize(("given", "used"), [(None, "true"), ("false", "false")])
def test_freed_memory_is_kept_unless_the_environment_says_no(given: str | None, used: str) -> None:
    # In a process of its own: TensorFlow reads it once.
    environment = {k: v for k, v in os.environ.items() if k != "TF_CPU_ALLOCATOR_USE_BFC"}
    environment |= {} if given is None else {"TF_CPU_ALLOCATOR_USE_BFC": given}
    done = subprocess.run(
        [sys.executable, "-c", PEEK], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [used]
