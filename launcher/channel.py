"""The channel between the driver and its workers: a Ray actor, and each worker's line to it."""

import contextlib
import logging
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from flexunet.errors import FlexUNetError, kind_of

_TICK_S = 0.5
_PACKAGES = ("flexunet", "data_prep", "job")  # whose log records a worker sends
_MEET_S = 5.0  # in which the other workers end with the same error, when they all do


class RunCoordinator:
    """An actor on which driver and workers leave what the other should know."""

    def __init__(self) -> None:
        self._stop_request: str | None = None
        self._seen: dict[int, str] = {}
        self._events: list[dict[str, Any]] = []
        self._ends: dict[int, dict[str, Any]] = {}

    def send(self, rank: int, node: str, events: list[dict[str, Any]]) -> str | None:
        """Takes the events of a worker; returns why it should stop, None to go on."""
        self._seen[rank] = node
        self._events += events
        return self._stop_request

    def end(self, rank: int, kind: str, text: str) -> None:
        """Takes the error that ended a worker."""
        self._ends[rank] = {"rank": rank, "kind": kind, "text": text}

    def num_ends(self) -> int:
        """Returns how many workers have ended with an error."""
        return len(self._ends)

    def stop_request(self, reason: str) -> None:
        """Asks all workers to store a checkpoint and stop."""
        self._stop_request = self._stop_request or reason

    def take(self) -> tuple[list[dict[str, Any]], dict[int, str], list[dict[str, Any]]]:
        """Returns new events, the node of each rank seen, and the errors of those that ended."""
        events, self._events = self._events, []
        return events, self._seen, [self._ends[rank] for rank in sorted(self._ends)]


class WorkerChannel:
    """A worker's line to the board: a thread that carries events there and the wish to stop back.

    Log records of ours travel as events, because the driver shows nothing else of a worker.
    """

    def __init__(self, coordinator: Any, rank: int) -> None:
        self._coordinator = coordinator
        self._rank = rank
        self._mutex = threading.Lock()
        self._events: list[dict[str, Any]] = []
        self._stop_request: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._carry, name="link", daemon=True)
        self._handler = _ChannelHandler(self._add)

    def __enter__(self) -> "WorkerChannel":
        for name in _PACKAGES:
            logging.getLogger(name).addHandler(self._handler)
            logging.getLogger(name).setLevel(logging.INFO if self._rank == 0 else logging.WARNING)
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        for name in _PACKAGES:
            logging.getLogger(name).removeHandler(self._handler)
        self._stop.set()
        self._thread.join(_MEET_S)

    def report(self, event: Mapping[str, Any]) -> None:
        """Sends an event of the first worker; the others have the same."""
        if self._rank == 0:
            self._add(dict(event))

    def should_stop(self) -> bool:
        """Returns whether the driver wishes it."""
        return self._stop_request is not None

    def is_shared(self, error: Exception, size: int) -> bool:
        """Tells the driver of `error`; returns whether all workers soon ended with one."""
        import ray

        kind = kind_of(error) if isinstance(error, FlexUNetError) else FlexUNetError.__name__
        text = (
            str(error) if isinstance(error, FlexUNetError) else f"{type(error).__name__}: {error}"
        )
        if not isinstance(error, FlexUNetError):
            self._add({"event": "log", "level": logging.ERROR, "text": traceback.format_exc()})
        end = time.monotonic() + _MEET_S
        with contextlib.suppress(ray.exceptions.RayError):  # it must not hide the error itself
            ray.get(self._coordinator.end.remote(self._rank, kind, " ".join(text.split())))
            while time.monotonic() < end:
                if ray.get(self._coordinator.num_ends.remote()) == size:
                    return isinstance(error, FlexUNetError)
                time.sleep(_TICK_S / 5)
        return False

    def _add(self, event: dict[str, Any]) -> None:
        with self._mutex:
            self._events.append(event)

    def _carry(self) -> None:
        import ray

        node = ray.get_runtime_context().get_node_id()
        is_last = False
        while not is_last:
            is_last = self._stop.wait(_TICK_S)
            with self._mutex:
                events, self._events = self._events, []
            try:
                stop_request = ray.get(self._coordinator.send.remote(self._rank, node, events))
            except ray.exceptions.ActorUnavailableError:
                with self._mutex:  # the network broke for a moment
                    self._events[:0] = events
                continue
            except ray.exceptions.RayError:
                return  # without its driver this worker is about to be ended
            self._stop_request = stop_request or self._stop_request


class _ChannelHandler(logging.Handler):
    def __init__(self, add: Callable[[dict[str, Any]], None]) -> None:
        super().__init__()
        self._add = add

    def emit(self, record: logging.LogRecord) -> None:
        self._add({"event": "log", "level": record.levelno, "text": record.getMessage()})
