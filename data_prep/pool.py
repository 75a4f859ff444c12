"""Worker processes for data preparation: start, bounded use, and a certain end.

Knows nothing of images. Work goes to any `concurrent.futures.Executor`; the one made here spawns
its workers, because a fork of a process that has threads may lock up.
"""

import collections
import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

from data_prep.errors import FlexUNetError

T = TypeVar("T")
R = TypeVar("R")


class InlineExecutor(Executor):
    """Runs each call at once, in the caller's process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """See `Executor.submit`; the returned future is done."""
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@contextlib.contextmanager
def open_pool(num_processes: int) -> Iterator[Executor]:
    """Yields an executor of `num_processes`; 1 works in this process.

    The workers are gone when the block ends, in mid-work too when it ends by an error.
    """
    if num_processes == 1:
        yield InlineExecutor()
        return
    others = set(multiprocessing.active_children())
    pool = concurrent.futures.ProcessPoolExecutor(
        num_processes, multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        workers = set(multiprocessing.active_children()) - others
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join()
        raise
    finally:
        pool.shutdown()


def in_order(
    executor: Executor, function: Callable[[T], R], tasks: Iterable[T], *, num_waiting: int
) -> Iterator[R]:
    """Yields `function(task)` of each task, in the order of `tasks`.

    Args:
        num_waiting: at most so many calls are submitted and not yet yielded, which bounds memory.

    Raises:
        FlexUNetError: a worker process died.
    """
    queue: collections.deque[Future[R]] = collections.deque()
    rest = iter(tasks)
    try:
        for task in itertools.islice(rest, num_waiting):
            queue.append(executor.submit(function, task))
        while queue:
            result = queue.popleft().result()
            for task in itertools.islice(rest, 1):
                queue.append(executor.submit(function, task))
            yield result
    except concurrent.futures.BrokenExecutor as error:
        raise FlexUNetError(
            "a worker process was killed, perhaps for want of memory; use fewer with "
            "--num-processes; the same command continues"
        ) from error
    finally:
        for future in queue:
            future.cancel()


def _start_worker() -> None:
    # Ctrl-C reaches every process of the terminal; the parent alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    # A worker whose parent was killed would wait for work for ever.
    parent.join()
    os._exit(1)
