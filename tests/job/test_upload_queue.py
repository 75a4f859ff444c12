"""The outbox: order, outages, failures."""

import sys
import threading
import time

import pytest

from flexunet.errors import LockedError, StorageError
from flexunet.storage import Unavailable
from job.distributed.watchdog import Watchdog
from job.runs import upload_queue
from job.runs.upload_queue import UploadQueue


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_queue, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(upload_queue, "_LONGEST_PAUSE_S", 0.02)


def test_calls_run_in_order_while_the_owner_goes_on() -> None:
    gate, done = threading.Event(), []
    with UploadQueue(budget_s=1) as box:
        box.post(gate.wait)
        for number in range(20):
            box.post(lambda number=number: done.append(number))
        assert done == []
        gate.set()
        box.flush()
        assert done == list(range(20))


def test_leaving_waits_for_what_was_posted() -> None:
    done = []
    with UploadQueue(budget_s=1) as box:
        box.post(lambda: time.sleep(0.1))
        box.post(lambda: done.append(1))
    assert done == [1]


def test_an_error_of_ours_waits_for_what_was_posted() -> None:
    done: list[int] = []
    with pytest.raises(StorageError), UploadQueue(budget_s=1) as box:
        box.post(lambda: time.sleep(0.2))
        box.post(lambda: done.append(1))
        raise StorageError
    assert done == [1]


def test_an_error_that_is_not_ours_waits_for_what_was_posted() -> None:
    """Of a step that ran out of memory, say: the checkpoint of the epoch before is stored."""
    done: list[str] = []
    with pytest.raises(MemoryError), UploadQueue(budget_s=1) as box:
        box.post(lambda: time.sleep(0.2))
        box.post(lambda: done.append("checkpoint"), is_large=True)
        raise MemoryError
    assert done == ["checkpoint"]


def test_what_an_error_leaves_unstored_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    def call() -> None:
        raise StorageError("the disk is full")

    with pytest.raises(MemoryError), UploadQueue(budget_s=1) as box:
        box.post(call)
        raise MemoryError
    assert caplog.messages == [
        "the uploads in progress are lost; the same command resumes from the last stored "
        "checkpoint: the disk is full"
    ]


def test_an_interrupt_drops_what_has_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_queue, "_LAST_CALL_S", 0.0)
    done: list[int] = []
    gate = threading.Event()
    with pytest.raises(KeyboardInterrupt), UploadQueue(budget_s=1) as box:
        box.post(gate.wait)
        box.post(lambda: done.append(1))
        raise KeyboardInterrupt
    gate.set()
    box._thread.join(60)
    assert (done, box._thread.is_alive()) == ([], False)


def test_an_outage_is_waited_out() -> None:
    tries = []

    def call() -> None:
        tries.append(1)
        if len(tries) < 4:
            raise Unavailable("no network")

    with UploadQueue(budget_s=5) as box:
        box.post(call)
        box.flush()
    assert len(tries) == 4


def test_an_outage_beyond_the_budget_ends_the_deliveries() -> None:
    done: list[int] = []

    def call() -> None:
        raise Unavailable("no network")

    with UploadQueue(budget_s=0.1) as box:
        box.post(call)
        box.post(lambda: done.append(1))
        with pytest.raises(StorageError, match=r"could not be reached for .* no network"):
            box.flush()
        assert box.has_failed
        with pytest.raises(StorageError):
            box.flush()
    assert done == []


def break_off_at_the_end(box: UploadQueue) -> None:
    """Moves bytes for longer than the budget of these tests, and fails then."""
    for _ in range(6):
        time.sleep(0.1)
        box.moved()
    raise Unavailable("broken off at its end")


def test_a_long_call_whose_bytes_moved_until_it_failed_is_repeated() -> None:
    """The budget is for an outage, and not for a slow line."""
    tries = []

    def call() -> None:
        tries.append(1)
        if len(tries) == 1:
            break_off_at_the_end(box)

    with UploadQueue(budget_s=0.3) as box:
        box.post(call)
        box.flush()
    assert len(tries) == 2


def test_time_in_which_bytes_move_is_no_outage_in_whatever_try() -> None:
    tries = []

    def call() -> None:
        tries.append(1)
        if len(tries) == 1:
            raise Unavailable("a short outage")
        if len(tries) == 2:
            break_off_at_the_end(box)

    with UploadQueue(budget_s=0.3) as box:
        box.post(call)
        box.flush()
    assert len(tries) == 3


def test_a_line_that_breaks_for_ever_after_some_bytes_ends_the_deliveries() -> None:
    def call() -> None:
        box.moved()
        time.sleep(0.01)
        raise Unavailable("broken off")

    with UploadQueue(budget_s=0.1) as box:
        box.post(call)
        with pytest.raises(StorageError, match="could not be reached"):
            box.flush()


class Upload:
    """A call whose bytes move for a while, and then stand still until the test ends."""

    def __init__(self, box: UploadQueue, seconds: float) -> None:
        self._box, self._seconds = box, seconds
        self.stalled, self.gate = threading.Event(), threading.Event()

    def __call__(self) -> None:
        end = time.monotonic() + self._seconds
        while time.monotonic() < end:
            time.sleep(0.02)
            self._box.moved()
        self.stalled.set()
        self.gate.wait()


@pytest.mark.parametrize("wait", ["room", "flush", "leave"])
def test_only_an_upload_that_stands_still_lets_a_waiting_process_expire(
    wait: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload_queue, "_LOOK_S", 0.05)
    monkeypatch.setattr("job.distributed.watchdog._TICK_S", 0.02)
    limit_s = 0.3
    seen: list[tuple[bool, str]] = []

    def expired(problem: str) -> None:
        seen.append((upload.stalled.is_set(), problem))
        upload.gate.set()

    with Watchdog(phase_s=limit_s, step_s=0, expired=expired) as dog:
        dog.enter("end of epoch 3")
        with UploadQueue(budget_s=1, heartbeat=dog.heartbeat) as box:
            upload = Upload(box, seconds=3 * limit_s)
            box.post(upload, is_large=True)
            box.post(lambda: None, is_large=True)
            if wait != "leave":
                {"room": box.wait_for_capacity, "flush": box.flush}[wait](dog.heartbeat)
    assert [stalled for stalled, _ in seen] == [True]
    assert "in: end of epoch 3" in seen[0][1]


def test_another_error_is_not_repeated() -> None:
    tries = []

    def call() -> None:
        tries.append(1)
        raise LockedError("taken over")

    with UploadQueue(budget_s=5) as box:
        box.post(call)
        with pytest.raises(LockedError):
            box.flush()
    assert tries == [1]


def test_an_error_of_the_owner_lets_earlier_calls_end_and_takes_no_more() -> None:
    done: list[int] = []
    with UploadQueue(budget_s=1) as box:
        box.post(lambda: time.sleep(0.2))
        box.post(lambda: done.append(1))
        box.fail(StorageError("the disk is full"))
        assert box.has_failed
        box.post(lambda: done.append(2))
        with pytest.raises(StorageError, match="the disk is full"):
            box.flush()
    assert done == [1]


def test_room_is_for_two_large_calls() -> None:
    gate = threading.Event()
    with UploadQueue(budget_s=1) as box:
        box.post(gate.wait, is_large=True)
        box.wait_for_capacity()
        box.post(lambda: None, is_large=True)
        timer = threading.Timer(0.3, gate.set)
        begin = time.monotonic()
        timer.start()
        box.wait_for_capacity()
        assert time.monotonic() - begin > 0.2


def test_room_can_be_asked_for_while_calls_come_and_go() -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with UploadQueue(budget_s=1) as box:
            end = time.monotonic() + 1
            while time.monotonic() < end:
                box.post(lambda: None, is_large=True)
                assert box.has_capacity in (True, False)
    finally:
        sys.setswitchinterval(interval)
