"""XLA is used where it can be, by all processes or none."""

from typing import Any

import pytest
import tensorflow as tf

from flexunet.errors import UsageError
from job.config import TrainConfig
from job.distributed.process_group import ProcessGroup
from job.distributed.xla import uses_xla, why_not_xla


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
    assert uses_xla(TrainConfig(**options), ProcessGroup(tf.distribute.get_strategy())) is expected


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
    process_group = ProcessGroup(tf.distribute.get_strategy())
    assert not uses_xla(TrainConfig(xla="auto"), process_group)
    (record,) = [record for record in caplog.records if record.name == "job.distributed.xla"]
    assert "AsString" in record.message
    with pytest.raises(UsageError, match="--xla=on: XLA does not work on this machine"):
        uses_xla(TrainConfig(xla="on"), process_group)
