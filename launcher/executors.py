"""Executors on a Ray cluster: tasks for short calls, long-lived processes for long ones.

If a worker dies, its call runs again; calls must be safe to run twice. An error that a call raises
reaches the caller unchanged.
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
_MAX_DETAIL_WIDTH = 200  # characters of Ray's message in an error


class RayExecutor(Executor):
    """Runs each call as a task on any node with free resources; needs a connected cluster."""

    def __init__(self, per_worker: Resources, *, max_retries: int = _MAX_RETRIES) -> None:
        """Sets the resources of one call, and how often it is retried if its worker is lost.

        Raises:
            UsageError: no node has the resources of one call.
        """
        import ray

        require_slots(per_worker)
        self._demand = per_worker
        self._remote = ray.remote(
            max_retries=max_retries, scheduling_strategy="SPREAD", **_options(per_worker)
        )(_call)

    def num_workers(self) -> int:
        """Returns how many calls the cluster can run at once now; at least 1."""
        return max(1, sum(worker_slots(self._demand).values()))

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """See `Executor.submit`; arguments and results are pickled."""
        ref = self._remote.options(name=_name_of(fn)).remote(fn, args, kwargs)
        future = _TaskFuture(ref)
        ref.future().add_done_callback(functools.partial(_deliver, future))
        return future


class RayProcesses(Executor):
    """Runs calls in long-lived processes, one call at a time in each; needs a connected cluster.

    The state of a process (a model, GPU memory) stays for its next call. Ray restarts a process
    that dies.
    """

    def __init__(
        self, per_worker: Resources, num_processes: int, *, max_retries: int = _MAX_RETRIES
    ) -> None:
        """Starts no process yet; a call starts one if all started processes are busy.

        Raises:
            UsageError: the cluster does not fit so many processes.
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
        # Each thread waits for one process; calls wait for a thread.
        self._threads = ThreadPoolExecutor(num_processes, initializer=self._start)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """See `Executor.submit`; arguments and results are pickled."""
        return self._threads.submit(self._run, fn, args, kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Ends the processes, even during a call; unlike the base class, waits for no call."""
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
        # Wait for the process to start before taking a call: another thread may be free now.
        # The first real call raises an error of the start.
        ray.wait([process.call.remote(abs, (0,), {})])

    def _run(self, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        import ray

        try:
            return ray.get(self._own.process.call.remote(fn, args, kwargs))
        except Exception as error:
            raise _plain(error) from error


class _Process:
    """The Ray actor of a long-lived process."""

    def __init__(self, per_worker: Resources) -> None:
        # TensorFlow reads this at import, which may happen in the first call.
        os.environ["TF_NUM_INTRAOP_THREADS"] = str(max(1, int(per_worker.num_cpus)))
        if not per_worker.num_gpus:
            # Ray does not hide GPUs from an actor that asked for none.
            os.environ["CUDA_VISIBLE_DEVICES"] = ""

    def call(self, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return fn(*args, **kwargs)


class _TaskFuture(Future[Any]):
    """The result of a task; cancelling it interrupts the task."""

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
    # Ray calls this in its own thread, which must not be blocked.
    if not future.set_running_or_notify_cancel():
        return
    error = done.exception()
    if error is None:
        future.set_result(done.result())
    else:
        future.set_exception(_plain(error))


def _plain(error: BaseException) -> BaseException:
    """Returns the error that the call raised; turns a Ray error into one line for the user."""
    from ray.exceptions import RayError, RayTaskError, TaskCancelledError

    if isinstance(error, TaskCancelledError):
        return CancelledError()
    if isinstance(error, RayTaskError) and not isinstance(error.cause, RayError):
        cause: BaseException = error.cause
        cause.__cause__ = error  # its text has the worker's traceback
        return cause
    if not isinstance(error, RayError):
        return error
    lines = str(error).strip().splitlines() or [""]
    lost = FlexUNetError(
        f"a Ray worker was lost repeatedly ({type(error).__name__}: "
        f"{lines[0][:_MAX_DETAIL_WIDTH]}), perhaps out of memory; the same command continues"
    )
    lost.__cause__ = error
    return lost
