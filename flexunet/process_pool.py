"""Runs functions in worker processes, and requests in threads, with bounded queues and cleanup.

Works with any `concurrent.futures.Executor`. The executor made here spawns its workers, because
forking a process that has threads may deadlock.
"""

import collections
import concurrent.futures
import contextlib
import functools
import itertools
import math
import multiprocessing
import os
import queue
import signal
import sys
import threading
import types
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any, TypeVar

from flexunet.errors import FlexUNetError
from flexunet.python_path import safe_path
from flexunet.storage import ObjectStore

T = TypeVar("T")
R = TypeVar("R")

MAX_REQUESTS = 16  # to a bucket at once, by all processes of a command, if they are few
MAX_BYTES_AHEAD = 64 << 20  # that one process reads before it needs them

_MANAGER_S = 10.0  # seconds for the thread of a pool whose workers are killed
_CGROUP_ROOT = "/sys/fs/cgroup"
_CGROUP_MEMBERSHIP = "/proc/self/cgroup"
_starting = threading.Lock()


class InlineExecutor(Executor):
    """Runs each call in the caller's process when its result is requested."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """See `Executor.submit`; only `result()` runs the call, so do not wait for the future."""
        return _Deferred(functools.partial(fn, *args, **kwargs))


class _Deferred(Future[Any]):
    """A future that runs its call when the result is requested."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__()
        self._call = call

    def result(self, timeout: float | None = None) -> Any:
        if not self.done() and self.set_running_or_notify_cancel():
            try:
                self.set_result(self._call())
            except Exception as error:
                self.set_exception(error)
        return super().result(timeout)


class RequestThreads(Executor):
    """Runs calls in threads that never delay the end of the process.

    The threads of `ThreadPoolExecutor` are joined when the process ends: after Ctrl-C it would wait
    for requests that are repeated during an outage.
    """

    def __init__(self, num_threads: int) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]
        self._calls = queue.SimpleQueue()
        self._num_threads = num_threads
        for _ in range(num_threads):
            threading.Thread(target=self._run, name="requests", daemon=True).start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """See `Executor.submit`."""
        future: Future[Any] = Future()
        self._calls.put((future, functools.partial(fn, *args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Ends the threads after the submitted calls, without waiting for them."""
        for _ in range(self._num_threads):
            self._calls.put(None)

    def _run(self) -> None:
        while (entry := self._calls.get()) is not None:
            future, call = entry
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
            del entry, future, call  # or an idle thread would keep the result in memory


def num_requests(*stores: ObjectStore, num_processes: int = 1) -> int:
    """Returns how many requests each of `num_processes` sends at once; 1 for local folders.

    Each of many processes sends 2, so that it computes during requests.
    """
    if all(store.local_root is not None for store in stores):
        return 1
    return max(2, MAX_REQUESTS // num_processes)


@contextlib.contextmanager
def request_threads(number: int) -> Iterator[Executor]:
    """Yields an executor with `number` threads for requests; 1 runs calls in this thread.

    If the block raises, running requests end later, on their own.
    """
    if number == 1:
        yield InlineExecutor()
        return
    threads = RequestThreads(number)
    try:
        yield threads
    finally:
        threads.shutdown()


@dataclass(frozen=True)
class Workers:
    """An executor whose workers can access the source and the output.

    Attributes:
        num_workers: returns how many calls run at once, at least 1; a cluster may grow.
    """

    executor: Executor
    num_workers: Callable[[], int]

    def in_order(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """See `in_order`; queues a second call per worker, so that no worker is idle."""
        return in_order(self.executor, function, tasks, num_waiting=lambda: 2 * self.num_workers())


OpenWorkers = Callable[[], AbstractContextManager[Workers]]


@contextlib.contextmanager
def local_workers(num_processes: int) -> Iterator[Workers]:
    """Yields workers that are processes of this machine; see `open_pool`."""
    with open_pool(num_processes) as executor:
        yield Workers(executor, lambda: num_processes)


@contextlib.contextmanager
def open_pool(num_processes: int) -> Iterator[Executor]:
    """Yields an executor with `num_processes` workers; 1 runs calls in this process.

    All workers have ended when the block ends; if it raises, they are killed during their work.
    """
    if num_processes == 1:
        yield InlineExecutor()
        return
    with safe_path():
        yield from _spawned(num_processes)


class _Process(SpawnProcess):
    """A spawned process that does not import the program's main module.

    What runs in it is defined elsewhere. A user's script would do its work again in each worker,
    unless it has `if __name__ == "__main__"`.
    """

    @staticmethod
    def _Popen(process: Any) -> Any:
        with _starting:
            main = sys.modules["__main__"]
            sys.modules["__main__"] = types.ModuleType("__main__")
            try:
                return SpawnProcess._Popen(process)
            finally:
                sys.modules["__main__"] = main


class _Context(SpawnContext):
    Process = _Process


def _spawned(num_processes: int) -> Iterator[Executor]:
    """Yields an executor with `num_processes` spawned workers; ends them with the generator."""
    pool = concurrent.futures.ProcessPoolExecutor(
        num_processes, _Context(), initializer=_start_worker
    )
    try:
        yield pool
    except BaseException:
        # Not all children: other threads of a user's program may have their own. `shutdown` forgets
        # the processes.
        workers = list((pool._processes or {}).values())
        manager: Any = getattr(pool, "_executor_manager_thread", None)
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join()
        if manager is not None:
            # This thread waits for the workers too. Whoever comes second sees them alive until the
            # first one has noted their exit codes.
            manager.join(_MANAGER_S)
        raise
    finally:
        pool.shutdown()


def in_order(
    executor: Executor,
    function: Callable[[T], R],
    tasks: Iterable[T],
    *,
    num_waiting: int | Callable[[], int],
    remedy: str = "use fewer with --num-processes; the same command continues",
) -> Iterator[R]:
    """Yields `function(task)` for each task, in the order of `tasks`.

    Args:
        num_waiting: the most calls that are submitted and not yet yielded, to bound memory; a
            function is called again for each result.
        remedy: what to do if memory ran out, for the error message.

    Raises:
        FlexUNetError: a worker process died.
    """
    queue: collections.deque[Future[R]] = collections.deque()
    rest = iter(tasks)

    def fill() -> None:
        limit = num_waiting if isinstance(num_waiting, int) else num_waiting()
        for task in itertools.islice(rest, max(0, limit - len(queue))):
            queue.append(executor.submit(function, task))

    try:
        fill()
        while queue:
            result = queue.popleft().result()
            fill()
            yield result
    except concurrent.futures.BrokenExecutor as error:
        raise FlexUNetError(
            f"a worker process was killed, perhaps because memory ran out; {remedy}"
        ) from error
    finally:
        for future in queue:
            future.cancel()


def in_order_ahead(
    executor: Executor,
    function: Callable[[T], R],
    tasks: Iterable[T],
    *,
    size_of: Callable[[T], int],
    max_waiting: int = 2 * MAX_REQUESTS,
    max_bytes: int = MAX_BYTES_AHEAD,
) -> Generator[R, None, None]:
    """Yields `function(task)` for each task, in the order of `tasks`; bounds also their bytes.

    Args:
        size_of: bytes of the task's result, as known before the call.
        max_waiting: the most calls that are submitted and not yet yielded.
        max_bytes: the most bytes of these calls' results; a larger result is alone.
    """
    waiting: collections.deque[tuple[Future[R], int]] = collections.deque()
    rest = ((task, size_of(task)) for task in tasks)
    upcoming = next(rest, None)
    num_bytes = 0
    try:
        while waiting or upcoming is not None:
            while upcoming is not None and len(waiting) < max_waiting:
                task, size = upcoming
                if waiting and num_bytes + size > max_bytes:
                    break
                waiting.append((executor.submit(function, task), size))
                num_bytes += size
                upcoming = next(rest, None)
            future, size = waiting.popleft()
            num_bytes -= size
            yield future.result()
    finally:
        for future, _ in waiting:
            future.cancel()


def available_cores() -> int:
    """Returns how many workers keep all cores of this process busy, at least 1."""
    return max(1, math.ceil(usable_cores()))


def usable_cores() -> float:
    """Returns the cores that this process may use, from its CPU affinity and its cgroups' quota."""
    # os.cpu_count() counts the machine's cores; a container may have fewer.
    return min(len(os.sched_getaffinity(0)), cgroup_cores())


def cgroup_cores(*, root: str = _CGROUP_ROOT, membership: str = _CGROUP_MEMBERSHIP) -> float:
    """Returns the smallest CPU quota of this process's cgroups, in cores; inf without one.

    Source: Linux, admin-guide/cgroup-v2.rst (cpu.max) and scheduler/sched-bwc.rst (version 1).
    """
    limits = [math.inf]
    for folder in _cgroup_folders("cpu", root, membership):
        both = _text_of(folder / "cpu.max")
        quota, _, period = (both or "").partition(" ")
        if both is None:
            quota = _text_of(folder / "cpu.cfs_quota_us") or ""
            period = _text_of(folder / "cpu.cfs_period_us") or ""
        # Unlimited is "max" in version 2 and "-1" in version 1.
        if quota.isdecimal() and period.isdecimal():
            limits.append(int(quota) / int(period))
    return min(limits)


def cgroup_memory_bytes(*, root: str = _CGROUP_ROOT, membership: str = _CGROUP_MEMBERSHIP) -> float:
    """Returns the smallest memory limit of this process's cgroups, in bytes; inf without one.

    Source: Linux, admin-guide/cgroup-v2.rst (memory.max) and cgroup-v1/memory.rst.
    """
    limits = [math.inf]
    for folder in _cgroup_folders("memory", root, membership):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _text_of(folder / name)
            if text is not None and text.isdecimal():
                limits.append(int(text))
    return min(limits)


def _start_worker() -> None:
    # Ctrl-C and a closed terminal signal every process of the terminal; only the parent handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    # If the parent was killed, the worker would wait for work forever.
    parent.join()
    os._exit(1)


def _cgroup_folders(controller: str, root: str, membership: str) -> Iterator[Path]:
    """Yields the folders of this process's cgroups with `controller`, and their parents."""
    for line in (_text_of(Path(membership)) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2: one tree for all controllers
            top = Path(root)
        elif controller in controllers.split(","):
            top = Path(root) / controller
        else:
            continue
        own = top / path.lstrip("/")
        yield from (each for each in (own, *own.parents) if each.is_relative_to(top))


def _text_of(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
