"""Executors whose workers are Ray's: tasks for short calls, processes that stay for long ones.

A call whose worker dies runs again, so it must be of a kind that may run twice. Errors of the call
itself come back as they were raised.
"""

import functools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from typing import Any

from flexunet.errors import FlexUNetError
from launcher.cluster.resources import Resources, require_slots, worker_slots

_MAX_RETRIES = 3
_MAX_DETAIL_WIDTH = 200  # characters of Ray's own words in an error


class RayExecutor(Executor):
    """Runs each call as a task on whichever node has room; needs a connection to a cluster."""

    def __init__(self, per_worker: Resources, *, max_retries: int = _MAX_RETRIES) -> None:
        """Takes what one call needs, and how often it is tried again when its worker is lost.

        Raises:
            UsageError: no node has room for one.
        """
        import ray

        require_slots(per_worker)
        self._demand = per_worker
        self._remote = ray.remote(
            max_retries=max_retries, scheduling_strategy="SPREAD", **_options(per_worker)
        )(_call)

    def num_workers(self) -> int:
        """Returns how many calls the cluster can run at once, as it is now; at least 1."""
        return max(1, sum(worker_slots(self._demand).values()))

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """See `Executor.submit`; arguments and results are pickled."""
        ref = self._remote.options(name=_name_of(fn)).remote(fn, args, kwargs)
        future = _TaskFuture(ref)
        ref.future().add_done_callback(functools.partial(_deliver, future))
        return future


class RayProcesses(Executor):
    """Runs calls in processes that stay, one at a time in each; needs a connection to a cluster.

    What a call leaves in its process (a model, a GPU's memory) the next one finds. A process that
    dies is started again.
    """

    def __init__(
        self, per_worker: Resources, num_processes: int, *, max_retries: int = _MAX_RETRIES
    ) -> None:
        """Starts no process yet; each starts with the first call that finds the others busy.

        Raises:
            UsageError: there is no room for so many.
        """
        import ray

        require_slots(per_worker, num_processes)
        options = _options(per_worker)
        self._remote = ray.remote(
            max_restarts=max_retries, max_task_retries=max_retries, **options
        )(_Process)
        self._demand = per_worker
        self._own = threading.local()
        self._processes: list[Any] = []
        # A thread waits for each process; calls wait for a thread.
        self._threads = ThreadPoolExecutor(num_processes, initializer=self._start)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """See `Executor.submit`; arguments and results are pickled."""
        return self._threads.submit(self._run, fn, args, kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Ends the processes, in mid-work too; unlike the base class it waits for no call."""
        import ray

        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            ray.kill(process)
        self._threads.shutdown(wait=wait)

    def _start(self) -> None:
        import ray

        process = self._remote.remote(self._demand)
        self._processes.append(process)
        self._own.process = process
        # Takes no call before there is room for it: another thread may do it now. An error of the
        # start comes out of the first call.
        ray.wait([process.call.remote(abs, (0,), {})])

    def _run(self, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        import ray

        try:
            return ray.get(self._own.process.call.remote(fn, args, kwargs))
        except Exception as error:
            raise _plain(error) from error


class _Process:
    """What runs in a process that stays."""

    def __init__(self, per_worker: Resources) -> None:
        # Read by TensorFlow when it is imported, which the first call may do.
        os.environ["TF_NUM_INTRAOP_THREADS"] = str(max(1, int(per_worker.num_cpus)))
        if not per_worker.num_gpus:
            # Ray hides no GPU from those that asked for none.
            os.environ["CUDA_VISIBLE_DEVICES"] = ""

    def call(self, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return fn(*args, **kwargs)


class _TaskFuture(Future[Any]):
    """The result of a task; to cancel it interrupts the task."""

    def __init__(self, ref: Any) -> None:
        super().__init__()
        self._ref = ref

    def cancel(self) -> bool:
        import ray

        is_cancelled = super().cancel()
        if is_cancelled:
            ray.cancel(self._ref)
        return is_cancelled


def _call(fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return fn(*args, **kwargs)


def _name_of(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__name__", type(fn).__name__)


def _options(per_worker: Resources) -> dict[str, Any]:
    options = {"num_cpus": per_worker.num_cpus, "num_gpus": per_worker.num_gpus}
    return options | ({"memory": per_worker.memory_bytes} if per_worker.memory_bytes else {})


def _deliver(future: Future[Any], done: Future[Any]) -> None:
    # Ray calls this in a thread of its own, where little may be done.
    if not future.set_running_or_notify_cancel():
        return
    error = done.exception()
    if error is None:
        future.set_result(done.result())
    else:
        future.set_exception(_plain(error))


def _plain(error: BaseException) -> BaseException:
    """Returns the error of the call itself; an error of Ray's becomes one line for the user."""
    from ray.exceptions import RayError, RayTaskError, TaskCancelledError

    if isinstance(error, TaskCancelledError):
        return CancelledError()
    if isinstance(error, RayTaskError) and not isinstance(error.cause, RayError):
        cause: BaseException = error.cause
        cause.__cause__ = error  # its text is the traceback in the worker
        return cause
    if not isinstance(error, RayError):
        return error
    lines = str(error).strip().splitlines() or [""]
    lost = FlexUNetError(
        f"a Ray worker was lost again and again ({type(error).__name__}: "
        f"{lines[0][:_MAX_DETAIL_WIDTH]}), perhaps for want of memory; the same "
        "command continues"
    )
    lost.__cause__ = error
    return lost
