"""What the strategy cannot be made with is refused before others wait."""

import pytest
import tensorflow as tf

from flexunet.errors import UsageError
from job.config import TrainConfig
from job.distributed.rendezvous import ProcessSpec
from job.distributed.strategy import check_batch, check_devices


def test_devices_are_checked_without_the_batch_that_others_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("job.distributed.strategy.was_used", lambda: False)  # a process of its own
    # Of processes that see 1 and 4 GPUs, one would end alone, and the other wait for it.
    spec = ProcessSpec(1, ("localhost:1", "localhost:2"))
    seen = len(tf.config.list_physical_devices("GPU"))
    assert check_devices(TrainConfig(global_batch_size=3), spec, None) == seen


def test_micro_batches_divide_what_each_replica_holds() -> None:
    config = TrainConfig(global_batch_size=8, accumulate=4)
    check_batch(config, 2, 0)
    check_batch(config, 1, 2)
    with pytest.raises(UsageError, match=r"--accumulate=4 does not divide 2, .* 4 repl"):
        check_batch(config, 2, 2)
