"""How many workers a process may have, and how they are used."""

import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexunet.errors import FlexUNetError
from flexunet.process_pool import (
    InlineExecutor,
    Workers,
    available_cores,
    cgroup_cores,
    cgroup_memory_bytes,
    in_order,
    in_order_ahead,
    num_requests,
    open_pool,
    request_threads,
)
from flexunet.storage import open_store


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def test_cgroup_limits_of_version_2_are_the_smallest_up_to_the_root(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "membership": "0::/pod/container",
            "root/memory.max": "max",
            "root/pod/memory.max": "4294967296",
            "root/pod/container/memory.max": "8589934592",
            "root/pod/cpu.max": "max 100000",
            "root/pod/container/cpu.max": "150000 100000",
        },
    )
    where = {"root": str(tmp_path / "root"), "membership": str(tmp_path / "membership")}
    assert cgroup_memory_bytes(**where) == 4 * 2**30  # the pod's, not the container's
    assert cgroup_cores(**where) == 1.5  # 150000 of 100000 microseconds


def test_cgroup_limits_of_version_1_are_read_from_the_controllers(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "membership": "4:memory:/box\n1:cpu,cpuacct:/box\n0::/",
            "root/memory/box/memory.limit_in_bytes": "1073741824",
            "root/cpu/box/cpu.cfs_quota_us": "50000",
            "root/cpu/box/cpu.cfs_period_us": "100000",
            "root/cpu/cpu.cfs_quota_us": "-1",
            "root/cpu/cpu.cfs_period_us": "100000",
        },
    )
    where = {"root": str(tmp_path / "root"), "membership": str(tmp_path / "membership")}
    assert cgroup_memory_bytes(**where) == 2**30
    assert cgroup_cores(**where) == 0.5


def test_cgroup_limits_without_cgroups_are_infinite(tmp_path: Path) -> None:
    where = {"root": str(tmp_path), "membership": str(tmp_path / "missing")}
    assert cgroup_memory_bytes(**where) == math.inf
    assert cgroup_cores(**where) == math.inf


def test_available_cores_follows_the_affinity() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert 1 <= available_cores() <= len(before)


def test_inline_executor_runs_one_call_for_each_result() -> None:
    calls = []

    def record(number: int) -> int:
        calls.append(number)
        return -number

    results = in_order(InlineExecutor(), record, range(9), num_waiting=4)
    assert calls == []
    assert (next(results), calls) == (0, [0])
    assert (next(results), calls) == (-1, [0, 1])


def test_inline_executor_raises_the_error_of_the_call_and_forgets_cancelled_ones() -> None:
    failing = InlineExecutor().submit(int, "x")
    for _ in range(2):
        with pytest.raises(ValueError, match="invalid literal"):
            failing.result()
    cancelled = InlineExecutor().submit(int, "x")
    assert cancelled.cancel()
    with pytest.raises(CancelledError):
        cancelled.result()


def test_workers_keep_two_calls_for_each_as_their_number_changes() -> None:
    number, taken = [1], []

    def tasks() -> Iterator[int]:
        for task in range(100):
            taken.append(task)
            yield task

    results = Workers(InlineExecutor(), lambda: number[0]).in_order(abs, tasks())
    counts = []
    for number[0] in (1, 3, 1):
        next(results)
        counts.append(len(taken))
    # 2 and one more; then 6 wait beside the 2 that were yielded; 1 worker needs no more of them.
    assert counts == [3, 8, 8]


def _square(value):
    return value * value


def _die(value):
    os.kill(os.getpid(), signal.SIGKILL)


def _sleep(seconds):
    time.sleep(seconds)


def test_in_order_submits_no_more_than_it_may():
    submitted = []

    class Counting(InlineExecutor):
        def submit(self, fn, /, *args, **kwargs):
            submitted.append(args[0])
            return super().submit(fn, *args, **kwargs)

    results = in_order(Counting(), _square, range(100), num_waiting=3)
    assert next(results) == 0
    assert submitted == [0, 1, 2, 3]
    assert list(results) == [i * i for i in range(1, 100)]


def test_pool_ends_with_its_block_even_in_mid_work():
    with pytest.raises(KeyboardInterrupt), open_pool(2) as executor:
        started = time.monotonic()
        assert list(in_order(executor, _square, [3, 4], num_waiting=2)) == [9, 16]
        executor.submit(_sleep, 600)
        raise KeyboardInterrupt
    assert time.monotonic() - started < 60
    # Asked of the operating system: multiprocessing's own list keeps a child that another thread
    # has waited for.
    commands = [" ".join(child.cmdline()) for child in psutil.Process().children()]
    assert not [each for each in commands if "spawn_main" in each]


def test_pool_that_fails_leaves_other_children_alone():
    child = multiprocessing.get_context("spawn").Process(target=_sleep, args=(600,))
    try:
        with pytest.raises(KeyboardInterrupt), open_pool(2) as executor:
            assert list(in_order(executor, _square, [3], num_waiting=2)) == [9]
            child.start()  # of another thread of the user's program
            raise KeyboardInterrupt
        assert child.is_alive()
    finally:
        child.kill()
        child.join()


def test_death_of_a_worker_is_one_line():
    with (
        pytest.raises(FlexUNetError, match="a worker process was killed"),
        open_pool(2) as executor,
    ):
        list(in_order(executor, _die, [1], num_waiting=2))


class CountingExecutor(InlineExecutor):
    """An executor that keeps the tasks it was given and the futures it returned."""

    def __init__(self) -> None:
        self.tasks: list[int] = []
        self.futures: list[Future[int]] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.tasks += args
        self.futures.append(super().submit(fn, *args, **kwargs))
        return self.futures[-1]


@given(
    sizes=st.lists(st.integers(0, 30), max_size=20),
    max_waiting=st.integers(1, 5),
    max_bytes=st.integers(1, 40),
)
def test_calls_ahead_are_bounded_in_number_and_bytes(
    sizes: list[int], max_waiting: int, max_bytes: int
) -> None:
    executor = CountingExecutor()
    tasks = range(len(sizes))
    results = in_order_ahead(
        executor,
        lambda i: -i,
        tasks,
        size_of=lambda i: sizes[i],
        max_waiting=max_waiting,
        max_bytes=max_bytes,
    )
    for done, result in enumerate(results):
        assert result == -done
        ahead = executor.tasks[done:]  # also the one that was yielded just now
        assert len(ahead) <= max_waiting
        assert sum(sizes[i] for i in ahead) <= max_bytes or len(ahead) == 1
        # No more could have been started.
        rest = sizes[len(executor.tasks) :]
        is_full = len(ahead) == max_waiting
        assert not rest or is_full or sum(sizes[i] for i in ahead) + rest[0] > max_bytes
    assert executor.tasks == list(tasks)


def test_calls_ahead_are_cancelled_when_the_caller_stops() -> None:
    executor = CountingExecutor()
    results = in_order_ahead(executor, abs, range(100), size_of=lambda _: 1, max_waiting=4)
    assert next(results) == 0
    results.close()
    assert [future.cancelled() for future in executor.futures] == [False, True, True, True]


def test_request_threads_run_at_once_and_pass_errors_on() -> None:
    both = threading.Barrier(2, timeout=10)

    def wait_for_both(number: int) -> int:
        both.wait()
        if number:
            raise ValueError("second")
        return 7

    with request_threads(2) as threads:
        first, second = threads.submit(wait_for_both, 0), threads.submit(wait_for_both, 1)
        assert first.result() == 7
        with pytest.raises(ValueError, match="second"):
            second.result()


def test_an_unfinished_request_does_not_delay_the_end_of_the_process() -> None:
    code = (
        "import time; from flexunet.process_pool import RequestThreads;"
        "RequestThreads(1).submit(time.sleep, 60); print('end')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30, text=True)
    assert (done.returncode, done.stdout) == (0, "end\n")


def test_requests_are_shared_by_the_processes_and_only_for_buckets(tmp_path: Path) -> None:
    local, bucket = open_store(str(tmp_path)), open_store("gs://some-bucket/a")
    assert num_requests(local, local, num_processes=2) == 1
    assert [num_requests(local, bucket, num_processes=n) for n in (1, 2, 5, 64)] == [16, 8, 3, 2]
