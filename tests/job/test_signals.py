"""Signals that stop training."""

import os
import signal
import time

import pytest

from job.training.process import stop_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_asks_to_stop_and_a_second_one_ends(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), stop_signals() as should_stop:
        assert not should_stop()
        os.kill(os.getpid(), number)
        time.sleep(0.1)
        assert should_stop()
        os.kill(os.getpid(), number)
        time.sleep(1)
    assert signal.getsignal(number) == before
