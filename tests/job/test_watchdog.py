"""The watchdog: what it takes for a stand-still, and what it leaves behind."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from job.distributed import watchdog
from job.distributed.watchdog import Watchdog, unreachable

pytestmark = pytest.mark.cluster

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_TICK_S", 0.02)


class Calls:
    def __init__(self) -> None:
        self.seen: list[str] = []
        self.came = threading.Event()

    def __call__(self, problem: str) -> None:
        self.seen.append(problem)
        self.came.set()


def test_steps_that_come_are_progress(quick: None) -> None:
    calls = Calls()
    with Watchdog(phase_s=1, step_s=1, expired=calls) as dog:
        dog.enter("training")
        for _ in range(15):
            time.sleep(0.1)
            dog.beat()
    time.sleep(1.1)
    assert calls.seen == []


def test_a_hung_step_is_reported_once_with_its_phase(quick: None) -> None:
    calls = Calls()
    with Watchdog(phase_s=30, step_s=0.2, expired=calls) as dog:
        dog.enter("epoch 3")
        dog.beat()
        assert calls.came.wait(60)
        time.sleep(0.3)
    assert calls.seen == ["no progress for 0 s in: epoch 3 (--phase-timeout, --step-timeout)"]


def test_a_pause_counts_for_no_limit_and_no_step(quick: None) -> None:
    calls = Calls()
    with Watchdog(phase_s=30, step_s=0.3, expired=calls) as dog:
        dog.beat()
        with dog.paused():
            assert not calls.came.wait(0.6)
        dog.beat()
        assert list(dog._steps)[-1:] in ([], pytest.approx([0], abs=0.2))
        assert calls.came.wait(60)  # it watches again


def test_after_a_report_the_next_stall_is_reported_too(quick: None) -> None:
    calls = Calls()
    with Watchdog(phase_s=30, step_s=0.1, expired=calls) as dog:
        for _ in range(2):
            calls.came.clear()
            dog.enter("epoch 3")
            dog.beat()
            assert calls.came.wait(10)
    assert len(calls.seen) == 2


def test_the_first_step_of_a_phase_has_the_time_of_a_phase(quick: None) -> None:
    calls = Calls()
    with Watchdog(phase_s=0.5, step_s=0.1, expired=calls) as dog:
        dog.beat()
        dog.enter("validation")
        assert not calls.came.wait(0.3)
        assert calls.came.wait(60)


def test_without_a_limit_a_step_may_take_ten_times_the_usual(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls()
    with Watchdog(phase_s=30, step_s=0, expired=calls) as dog:
        for _ in range(4):
            dog.beat()
            time.sleep(0.06)
        monkeypatch.setattr(watchdog, "_MIN_STEP_S", 0.1)  # not before steps have been measured
        dog.beat()
        assert not calls.came.wait(0.4)
        assert calls.came.wait(60)


def test_a_step_of_many_parts_may_take_longer_than_its_limit(quick: None) -> None:
    calls = Calls()
    with Watchdog(phase_s=30, step_s=1, expired=calls) as dog:
        dog.enter("evaluation")
        dog.beat()
        for _ in range(15):
            time.sleep(0.1)
            dog.heartbeat()
        assert calls.seen == []
        assert calls.came.wait(60)  # a part that never ends


def test_the_usual_step_is_all_of_its_parts(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls()
    with Watchdog(phase_s=30, step_s=0, expired=calls) as dog:
        dog.beat()
        for i in range(3):
            for _ in range(4):
                time.sleep(0.05)
                dog.heartbeat()
            if i == 2:  # not before steps have been measured
                monkeypatch.setattr(watchdog, "_MIN_STEP_S", 0.1)
            dog.beat()
        # Ten times 0.2 s; of parts it would be 0.5 s.
        assert not calls.came.wait(1.2)
        assert calls.came.wait(60)


HANGS = """
import sys, time
from flexunet.storage import open_store
from job.distributed import watchdog
from job.distributed.watchdog import Watchdog, end_process

watchdog._TICK_S = 0.1  # a longer pause than 1 s does not count

def hang_here():
    time.sleep(60)

def end(problem):
    end_process(open_store(sys.argv[1]), "stacks/rank-0.txt", f"rank 0: {problem}")

with Watchdog(phase_s=float(sys.argv[2]), step_s=0, expired=end) as dog:
    dog.enter("the test")
    print("ready", flush=True)
    hang_here()
"""


def test_a_process_that_hangs_ends_and_leaves_its_stacks(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANGS, str(tmp_path), "0.5"],
        cwd=PROJECT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "(--phase-timeout, --step-timeout); the same command resumes (stacks: " in done.stderr
    text = (tmp_path / "stacks" / "rank-0.txt").read_text()
    assert re.match(r"rank 0: no progress for \d+ s in: the test \(", text)
    assert "in hang_here" in text


def test_a_paused_process_does_not_count_the_pause(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HANGS, str(tmp_path), "3"],
        cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(4)
    os.kill(process.pid, signal.SIGCONT)
    time.sleep(0.7)
    assert process.poll() is None
    assert not (tmp_path / "stacks").exists()
    process.kill()
    process.communicate()


def test_a_peer_that_is_gone_is_reported_long_before_a_hung_step(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "_QUIET_S", 0.2)
    calls = Calls()
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        peers = {1: f"127.0.0.1:{listening.getsockname()[1]}"}
        with Watchdog(phase_s=60, step_s=0, expired=calls, peers=peers) as dog:
            dog.enter("epoch 3")
            assert not calls.came.wait(1.0)
            listening.close()
            dog.enter("storing the outcome", needs_peers=False)
            assert not calls.came.wait(1.0)
            dog.enter("epoch 3")
            assert calls.came.wait(60)
    assert calls.seen == [f"cannot connect to rank 1 ({peers[1]})"]


def test_only_an_address_at_which_nothing_listens_is_unreachable() -> None:
    with socket.socket() as listening, socket.socket() as silent:
        for each in (listening, silent):
            each.bind(("127.0.0.1", 0))
        listening.listen()
        addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in (listening, silent)]
        assert unreachable(dict(enumerate(addresses))) == [f"rank 1 ({addresses[1]})"]
