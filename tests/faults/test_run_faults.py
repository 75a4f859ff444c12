"""The run protocol under faults: stops at every change, damage, storms, outages, races, pauses.

The bucket is a real server behind the fault proxy; the processes that die, race and sleep are real.
Tests that take minutes are marked `faults` and run with `make test-faults`.
"""

import functools
import logging
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flexunet.errors import LockedError
from flexunet.storage import LocalStore, ObjectStore, Unavailable, join_url, open_store
from job.runs.checkpoints import download_checkpoint, find_checkpoints
from job.runs.layout import checkpoint_prefix
from job.runs.lease import LeaseTiming
from job.runs.run import Run
from tests.conftest import FaultyBucket
from tests.faults.proxy import Action, Fault
from tests.faults.worker import (
    MEMBERS,
    Worker,
    commit_step,
    own_run,
    restored_step,
    started_worker,
)

pytestmark = pytest.mark.cluster

QUICK = LeaseTiming(renew_s=0.1, expire_s=1.0)
RACING = LeaseTiming(renew_s=0.1, expire_s=30)  # seen at once, and kept by a starved process
STILL = LeaseTiming(renew_s=1e3, expire_s=1e3)  # a lease that nobody renews while a test runs
Record = Callable[[str, int, int, str], None]


@pytest.fixture
def worker(faulty_bucket: FaultyBucket) -> Iterator[Worker]:
    with started_worker() as worker:
        yield worker


def committed_steps(store: ObjectStore) -> list[int]:
    """Returns the steps that have a COMMIT.json, without using the run protocol."""
    names = [stat.name for stat in store.list("checkpoints/")]
    return sorted(int(name[17:25]) for name in names if name.endswith("/COMMIT.json"))


def check_after_stop(store: ObjectStore, acknowledged: list[int], folder: Path) -> int | None:
    """Returns the step that the next attempt restores after the owner died, after all checks."""
    before = store.list("checkpoints/")
    committed = committed_steps(store)
    for place in find_checkpoints(store):  # one that is half deleted is no commit any more
        download_checkpoint(store, place, str(folder / "all"))
    with own_run(store, STILL, launch="launch") as run:
        found = restored_step(run, str(folder))
        assert store.list("checkpoints/") == before
        assert found == (committed[-1] if committed else None)
        assert not acknowledged or (found is not None and found >= acknowledged[-1])
        step = (found or 0) + 10
        commit_step(run, str(folder), step)
        run.collect_garbage(2)
    assert len(committed_steps(store)) <= 2
    with own_run(store, STILL, launch="launch") as run:
        assert restored_step(run, str(folder)) == step
    for name in ("staging", "all"):
        shutil.rmtree(folder / name, ignore_errors=True)
    return found


def die_at(worker: Worker, url: str, *, steps: list[int], **stop: int) -> tuple[list[int], int]:
    """Lets a fork work until it dies; returns the steps that it reported as committed."""
    worker.send("work", url=url, steps=steps, keep_last=1, **stop)
    acknowledged = []
    while "committed" in (answer := worker.hear()):
        acknowledged.append(answer["committed"])
    return acknowledged, answer.get("died", 0)


def stop_bucket_at_every_change(
    bucket: FaultyBucket, worker: Worker, folder: Path, steps: list[int]
) -> list[int | None]:
    """Returns the steps restored after a stop at each change that a run makes."""
    found: list[int | None] = []
    while True:
        pid = worker.ask("fork")["pid"]
        url = f"{bucket.url}/{len(found)}"
        kill = functools.partial(os.kill, pid, signal.SIGKILL)
        bucket.proxy.stop_after(len(found) + 1, kill)
        acknowledged, died = die_at(worker, url, steps=steps)
        bucket.proxy.clear()
        if died == 0:  # it made no more changes than that
            return found
        assert died == -signal.SIGKILL
        found.append(check_after_stop(open_store(url), acknowledged, folder))


def expected_after_stops(found: list[int | None], steps: list[int]) -> None:
    """Checks that the restored step grows by one at a time, from none to the last."""
    order = [None, *steps]
    indices = [order.index(step) for step in found]
    assert indices == sorted(indices)
    assert set(indices) == set(range(len(order)))


def test_stop_at_every_change_of_a_bucket(
    faulty_bucket: FaultyBucket, worker: Worker, tmp_path: Path
) -> None:
    found = stop_bucket_at_every_change(faulty_bucket, worker, tmp_path, [10, 20])
    # Probe, its deletion, lease, identity; then per step the lease, two members, lease, COMMIT.json
    # and the lease; three deletions after the second step; the lease given back.
    assert len(found) == 4 + 2 * 6 + 3 + 1
    expected_after_stops(found, [10, 20])


@pytest.mark.faults
def test_stop_at_every_change_of_a_long_run_in_a_bucket(
    faulty_bucket: FaultyBucket, worker: Worker, tmp_path: Path, record_fault: Record
) -> None:
    steps = [10, 20, 30, 40, 50, 60]
    found = stop_bucket_at_every_change(faulty_bucket, worker, tmp_path, steps)
    expected_after_stops(found, steps)
    record_fault("R6", len(found), 0, "bucket: killed at every change, newest commit restored")


@pytest.mark.parametrize("is_after", [False, True])
def test_stop_at_every_change_of_a_folder(
    is_after: bool, worker: Worker, tmp_path: Path, record_fault: Record
) -> None:
    steps = [10, 20, 30]
    found: list[int | None] = []
    while True:
        worker.ask("fork")
        folder = str(tmp_path / f"run-{len(found)}")
        stop = {"stop_at": len(found) + 1, "is_after": is_after}
        acknowledged, died = die_at(worker, folder, steps=steps, **stop)
        if died == 0:
            break
        assert died == 100
        found.append(check_after_stop(LocalStore(folder), acknowledged, tmp_path))
    # The lease, the identity, three changes per step and three deletions after two of them.
    assert len(found) == 2 + 3 * 3 + 2 * 3
    expected_after_stops(found, steps)
    record_fault("R6", len(found), 0, "folder: killed at every change, newest commit restored")


def damaged(data: bytes, kind: str) -> bytes:
    if kind == "flip":
        return data[:-2] + bytes([data[-2] ^ 1]) + data[-1:]
    return {"truncate": data[:-1], "zero": bytes(len(data)), "empty": b""}[kind]


@pytest.mark.parametrize("kind", ["flip", "truncate", "zero", "empty", "delete"])
@pytest.mark.parametrize("name", [*MEMBERS, "COMMIT.json"])
def test_damaged_object_of_a_bucket_is_passed_over_with_one_warning(
    name: str, kind: str, bucket_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(bucket_url)
    with own_run(store, STILL, launch="launch") as run:
        for step in (10, 20):
            commit_step(run, str(tmp_path), step)
    victim = f"{checkpoint_prefix(20, 1)}/{name}"
    if kind == "delete":
        store.delete(victim)
    else:
        store.put(victim, damaged(store.get(victim), kind))
    with own_run(store, STILL, launch="launch") as run, caplog.at_level(logging.WARNING):
        assert restored_step(run, str(tmp_path)) == 10
    if (name, kind) == ("COMMIT.json", "delete"):  # then it is no commit
        assert not caplog.messages
    else:
        assert len(caplog.messages) == 1
        assert f"{bucket_url}/{victim}" in caplog.messages[0]


def commit_under_faults(
    store: ObjectStore, folder: Path, num_commits: int, timing: LeaseTiming
) -> int:
    """Commits in one thread while others write tables; returns the valid commits."""
    acknowledged: list[int] = []
    failures: list[BaseException] = []

    def work(run: Run) -> None:
        try:
            for step in range(1, num_commits + 1):
                acknowledged.append(commit_step(run, str(folder), step).step)
                run.collect_garbage(num_commits)
        except BaseException as error:
            failures.append(error)

    with own_run(store, timing) as run:
        thread = threading.Thread(target=work, args=(run,))
        thread.start()
        while thread.is_alive():
            run.put_text("metrics/history.csv", f"{len(acknowledged)}\n")
            thread.join(0.05)
        run.put_text("metrics/history.csv", f"{len(acknowledged)}\n")
        assert not failures
        assert not run.lost
    for place in find_checkpoints(store):
        download_checkpoint(store, place, str(folder / "all"))
    assert store.get("metrics/history.csv") == f"{num_commits}\n".encode()
    with own_run(store, timing) as run:
        assert restored_step(run, str(folder)) == num_commits
    return len({place.step for place in find_checkpoints(store)} & set(acknowledged))


def storm(probability: float) -> list[Fault]:
    """Returns rules that hit this share of requests, a tenth of them after the request is done."""
    actions: list[tuple[Action, int]] = [
        ("status", 429), ("status", 503), ("reset-early", 0), ("lose-answer", 0),
    ]  # fmt: skip
    faults, left = [], 1.0
    for (action, status), share in zip(actions, (0.3, 0.3, 0.3, 0.1), strict=True):
        # A rule only sees what those before it have left.
        faults.append(Fault(action, status=status, probability=probability * share / left))
        left -= probability * share
    return faults


def test_storm_loses_no_commit(faulty_bucket: FaultyBucket, tmp_path: Path) -> None:
    faulty_bucket.proxy.add(*storm(0.3))
    store = open_store(faulty_bucket.url).with_limits(retry_s=120, timeout_s=1)
    assert commit_under_faults(store, tmp_path, 3, LeaseTiming(renew_s=0.5, expire_s=30)) == 3
    assert faulty_bucket.proxy.count(status=503) > 1


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_long_storm_loses_no_commit(
    faulty_bucket: FaultyBucket, tmp_path: Path, record_fault: Record
) -> None:
    faulty_bucket.proxy.add(*storm(0.3))
    kept = commit_under_faults(open_store(faulty_bucket.url), tmp_path, 100, LeaseTiming(1, 30))
    num_faults = sum(bool(entry.fault) for entry in faulty_bucket.proxy.log)
    note = f"30 % of {len(faulty_bucket.proxy.log)} requests failed ({num_faults})"
    record_fault("R8", 100, 100 - kept, note)
    assert kept == 100


@pytest.mark.parametrize("kind", ["outage", "stall"])
def test_outage_and_stall_lose_no_commit(
    kind: str, faulty_bucket: FaultyBucket, tmp_path: Path
) -> None:
    proxy = faulty_bucket.proxy

    def begin() -> None:
        proxy.down = kind == "outage"
        if kind == "stall":
            proxy.add(Fault("stall", seconds=2, probability=0.2, count=6))

    timers = [threading.Timer(0.3, begin), threading.Timer(2.3, setattr, (proxy, "down", False))]
    for timer in timers:
        timer.start()
    kept = commit_under_faults(open_store(faulty_bucket.url), tmp_path, 20, LeaseTiming(0.5, 5))
    assert kept == 20
    for timer in timers:
        timer.join()
    expected = "reset-early" if kind == "outage" else "stall"
    assert sum(entry.fault == expected for entry in proxy.log) > 1


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["outage", "stall"])
def test_long_outage_and_stall_lose_no_commit(
    kind: str, faulty_bucket: FaultyBucket, tmp_path: Path, record_fault: Record
) -> None:
    """A minute without storage, or half a minute without an answer, with the default limits."""
    proxy = faulty_bucket.proxy

    def begin() -> None:
        proxy.down = kind == "outage"
        if kind == "stall":
            proxy.add(Fault("stall", seconds=30, count=10))

    timers = [threading.Timer(1, begin), threading.Timer(61, setattr, (proxy, "down", False))]
    for timer in timers:
        timer.start()
    kept = commit_under_faults(open_store(faulty_bucket.url), tmp_path, 100, LeaseTiming())
    for timer in timers:
        timer.join()
    note = "60 s of outage" if kind == "outage" else "ten requests stalled for 30 s"
    record_fault("R8", 100, 100 - kept, note)
    assert kept == 100


def test_outage_beyond_the_retries_is_unavailable_and_resumable(
    faulty_bucket: FaultyBucket, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(faulty_bucket.url, retry_s=0.5)
    run = own_run(store, QUICK)
    commit_step(run, str(tmp_path), 10)
    faulty_bucket.proxy.down = True
    with pytest.raises(Unavailable):
        commit_step(run, str(tmp_path), 20)
    with pytest.raises(Unavailable):
        run.put_text("table.csv", "")
    assert not run.lost
    faulty_bucket.proxy.down = False
    assert commit_step(run, str(tmp_path), 20).step == 20
    faulty_bucket.proxy.down = True
    start = time.monotonic()
    run.close()
    assert time.monotonic() - start < 10
    assert "could not be released" in caplog.text
    faulty_bucket.proxy.down = False
    with own_run(store, QUICK) as run:
        assert (run.attempt, restored_step(run, str(tmp_path))) == (2, 20)


def test_newcomer_does_not_take_a_run_because_of_an_outage(
    faulty_bucket: FaultyBucket, tmp_path: Path
) -> None:
    """The owner could not renew its lease; the time of the outage does not count."""
    proxy = faulty_bucket.proxy
    timing = LeaseTiming(renew_s=0.2, expire_s=4)
    with own_run(open_store(faulty_bucket.url), timing) as run:
        # After the outage the newcomer sees the lease at once, the owner renews it a second later;
        # the time before is not time in which the owner was silent.
        proxy.add(Fault("status", name="lease", kinds=("put",)))
        timers = [
            threading.Timer(0.1, setattr, (proxy, "down", True)),
            threading.Timer(6, setattr, (proxy, "down", False)),
            threading.Timer(7, proxy.clear),
        ]
        for timer in timers:
            timer.start()
        newcomer = open_store(faulty_bucket.url).with_limits(retry_s=60, timeout_s=0.5)
        with pytest.raises(LockedError, match="is owned by"):
            Run.acquire(newcomer, timing=timing)
        for timer in timers:
            timer.join()
        assert not run.lost


@pytest.fixture
def jumping_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the wall clock of this process jump, up to a day off, at every reading."""
    choice = random.Random(0).choice
    now, now_ns = time.time, time.time_ns
    hours = [-24, -1, 0, 1, 24]
    monkeypatch.setattr(time, "time", lambda: now() + choice(hours) * 3600)
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() + choice(hours) * 3600 * 10**9)


@pytest.mark.usefixtures("jumping_clock")
@pytest.mark.parametrize("kind", ["bucket", "folder"])
def test_order_of_commits_comes_from_storage_and_not_from_clocks(
    kind: str, faulty_bucket: FaultyBucket, tmp_path: Path, record_fault: Record
) -> None:
    url = faulty_bucket.url if kind == "bucket" else str(tmp_path / "run")
    for attempt in range(1, 11):
        with own_run(open_store(url), QUICK, by_lease=True) as run:
            assert run.attempt == attempt
            assert restored_step(run, str(tmp_path)) == (20 * (attempt - 1) or None)
            for step in (20 * attempt - 10, 20 * attempt):
                commit_step(run, str(tmp_path), step)
                run.collect_garbage(2)
    assert committed_steps(open_store(url)) == [190, 200]
    record_fault("R12", 10, 0, f"{kind}: resumed with a clock up to a day off at every look")


@pytest.mark.usefixtures("jumping_clock")
def test_lease_expires_by_a_clock_that_does_not_jump(
    faulty_bucket: FaultyBucket, worker: Worker, tmp_path: Path
) -> None:
    store = open_store(faulty_bucket.url)
    pid = worker.ask("fork")["pid"]
    worker.ask("open", url=store.url, renew_s=QUICK.renew_s, expire_s=QUICK.expire_s)
    with pytest.raises(LockedError, match="is owned by"):
        own_run(store, RACING)
    os.kill(pid, signal.SIGKILL)
    assert "died" in worker.hear()
    start = time.monotonic()
    with own_run(store, QUICK) as run:
        assert run.attempt == 2
        assert QUICK.expire_s <= time.monotonic() - start < 20


def race(
    workers: tuple[Worker, Worker], url: str, timing: LeaseTiming, *, by_lease: bool | None
) -> float:
    """Lets both open one run; returns the seconds that the loser took."""
    for worker in workers:
        worker.send(
            "open", url=url, renew_s=timing.renew_s, expire_s=timing.expire_s, by_lease=by_lease
        )
    answers = [worker.hear() for worker in workers]
    won = [answer for answer in answers if "attempt" in answer]
    lost = [answer for answer in answers if answer.get("error") == "LockedError"]
    assert (len(won), len(lost)) == (1, 1), answers
    store = open_store(url)
    # Of the loser there is nothing; what is there, the winner wrote.
    assert {stat.name for stat in store.list()} <= {"lease.json", "identity.json", ".lock"}
    for worker in workers:
        worker.ask("close")
    return float(lost[0]["seconds"])


def race_often(url: str, num_races: int, timing: LeaseTiming, by_lease: bool | None) -> float:
    with started_worker() as first, started_worker() as second:
        # Every run is raced for twice: a new one, and one that was given back.
        return max(
            race((first, second), join_url(url, f"run-{i // 2}"), timing, by_lease=by_lease)
            for i in range(num_races)
        )


@pytest.mark.parametrize("kind", ["bucket", "folder"])
def test_one_of_two_processes_wins_each_race(
    kind: str, faulty_bucket: FaultyBucket, tmp_path: Path
) -> None:
    url = faulty_bucket.url if kind == "bucket" else str(tmp_path)
    assert race_often(url, 10, RACING, by_lease=None) < RACING.expire_s / 2  # it waits for none


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["bucket", "folder"])
def test_one_of_two_processes_wins_each_of_a_hundred_races(
    kind: str, faulty_bucket: FaultyBucket, tmp_path: Path, record_fault: Record
) -> None:
    url = faulty_bucket.url if kind == "bucket" else str(tmp_path)
    slowest = race_often(url, 90, RACING, by_lease=None)
    slowest = max(slowest, race_often(url + "/real", 10, LeaseTiming(), by_lease=None))
    record_fault("R13", 100, 0, f"{kind}: one winner each, loser after {slowest:.1f} s at most")
    assert slowest < 5


def test_newcomer_is_refused_within_five_seconds(
    faulty_bucket: FaultyBucket, worker: Worker
) -> None:
    """With the default timing; the loser has written only its probe."""
    store = open_store(faulty_bucket.url)
    with own_run(store, LeaseTiming()):
        before = {stat.name for stat in store.list()}
        faulty_bucket.proxy.log.clear()
        answer = worker.ask("open", url=faulty_bucket.url, renew_s=2, expire_s=15)
        assert (answer["error"], answer["seconds"] < 5) == ("LockedError", True)
        changed = {e.name for e in faulty_bucket.proxy.log if e.kind in ("put", "delete")}
        folder = faulty_bucket.url.removeprefix("gs://test-bucket/")
        probes = {name for name in changed if f"{folder}/flexunet-probe-" in name}
        assert changed - probes == {f"{folder}/lease.json"}  # the owner's renewals
        assert {stat.name for stat in store.list()} == before


def pause_and_take_over(
    worker: Worker, store: ObjectStore, folder: Path, timing: LeaseTiming, by_lease: bool | None
) -> None:
    """Pauses an owner until another process has its run, wakes it, and lets it commit."""
    pid = worker.ask("fork")["pid"]
    opened = worker.ask(
        "open", url=store.url, renew_s=timing.renew_s, expire_s=timing.expire_s, by_lease=by_lease
    )
    assert opened["attempt"] == 1
    assert "prefix" in worker.ask("commit", step=10)
    os.kill(pid, signal.SIGSTOP)
    try:
        with own_run(store, timing, by_lease=by_lease) as run:
            assert restored_step(run, str(folder)) == 10
            commit_step(run, str(folder), 15)
            os.kill(pid, signal.SIGCONT)
            assert worker.ask("commit", step=20) == {"error": "LockedError"}
            assert worker.ask("commit", step=30) == {"error": "LockedError"}
            assert committed_steps(store) == [10, 15]
            commit_step(run, str(folder), 18)
            assert not run.lost
        with own_run(store, timing, by_lease=by_lease) as run:
            assert restored_step(run, str(folder)) == 18
    finally:
        os.kill(pid, signal.SIGKILL)
    assert worker.hear() == {"died": -signal.SIGKILL}


@pytest.mark.parametrize("kind", ["bucket", "folder"])
def test_owner_that_wakes_after_a_takeover_cannot_commit(
    kind: str, faulty_bucket: FaultyBucket, worker: Worker, tmp_path: Path
) -> None:
    url = faulty_bucket.url if kind == "bucket" else str(tmp_path / "run")
    pause_and_take_over(worker, open_store(url), tmp_path, QUICK, by_lease=True)


@pytest.mark.faults
def test_no_owner_that_wakes_after_a_takeover_can_commit(
    faulty_bucket: FaultyBucket, worker: Worker, tmp_path: Path, record_fault: Record
) -> None:
    num_quick, num_real = 40, 2
    for i in range(num_quick + num_real):
        timing = QUICK if i < num_quick else LeaseTiming()
        store = open_store(f"{faulty_bucket.url}/{i}")
        pause_and_take_over(worker, store, tmp_path, timing, by_lease=True)
    note = "owners paused past expiry, both of their commits refused"
    record_fault("R13", num_quick + num_real, 0, note)


def test_owner_that_is_paused_within_a_commit_learns_of_the_loss(
    faulty_bucket: FaultyBucket, worker: Worker, tmp_path: Path
) -> None:
    """COMMIT.json itself is too late: it is stored, but never used."""
    proxy = faulty_bucket.proxy
    store = open_store(faulty_bucket.url)
    pid = worker.ask("fork")["pid"]
    worker.ask("open", url=store.url, renew_s=QUICK.renew_s, expire_s=QUICK.expire_s)
    worker.ask("commit", step=10)
    fault = Fault("stall", kinds=("put",), name=r"step-00000020/a1/COMMIT\.json", seconds=60)
    proxy.add(fault)
    worker.send("commit", step=20)
    proxy.wait_for_stall()  # the lease is confirmed, COMMIT.json is on its way
    os.kill(pid, signal.SIGSTOP)
    try:
        with own_run(store, QUICK) as run:
            assert restored_step(run, str(tmp_path)) == 10
            proxy.clear()
            os.kill(pid, signal.SIGCONT)
            assert worker.hear() == {"error": "LockedError"}
            commit_step(run, str(tmp_path), 15)
        with own_run(store, QUICK) as run:
            assert restored_step(run, str(tmp_path)) == 15
    finally:
        os.kill(pid, signal.SIGKILL)
    assert worker.hear() == {"died": -signal.SIGKILL}


def test_launcher_that_is_wrong_about_a_death_still_gets_the_run(
    faulty_bucket: FaultyBucket, tmp_path: Path
) -> None:
    """The owner renews its lease; the next process of the launch takes over at once."""
    store = open_store(faulty_bucket.url)
    # The stall holds a renewal for certain; the newcomer's next look and write seldom do.
    slow = LeaseTiming(renew_s=0.25, expire_s=60)
    with own_run(store, slow, launch="one") as zombie:
        commit_step(zombie, str(tmp_path), 10)
        # Between the newcomer's look at the lease and its own, the owner renews it.
        faulty_bucket.proxy.add(Fault("stall", kinds=("list",), seconds=0.5, count=1))
        start = time.monotonic()
        with own_run(store, slow, launch="one") as run:
            assert time.monotonic() - start < slow.expire_s / 2  # it waited for no expiry
            assert (run.attempt, restored_step(run, str(tmp_path))) == (2, 10)
            with pytest.raises(LockedError, match="has taken the run over"):
                commit_step(zombie, str(tmp_path), 20)
            with pytest.raises(LockedError, match="is owned by"):
                own_run(store, slow, launch="other")
            assert commit_step(run, str(tmp_path), 20).attempt == 2
