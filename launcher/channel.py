"""The channel between the driver and its workers: a Ray actor, and a thread in each worker."""

import contextlib
import logging
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from flexunet.errors import FlexUNetError, kind_of
from flexunet.progress import sent_by

_TICK_S = 0.5
_PACKAGES = ("flexunet", "data_prep", "job")  # a worker sends their log records
_MEET_S = 5.0  # for the other workers to end with the same error


class RunCoordinator:
    """Passes messages between the driver and its workers; runs as a Ray actor."""

    def __init__(self) -> None:
        self._stop_request: str | None = None
        self._seen: dict[int, str] = {}
        self._events: list[dict[str, Any]] = []
        self._ends: dict[int, dict[str, Any]] = {}

    def send(self, rank: int, node: str, events: list[dict[str, Any]]) -> str | None:
        """Receives the events of a worker; returns the reason to stop, or None to continue."""
        self._seen[rank] = node
        self._events += events
        return self._stop_request

    def end(self, rank: int, kind: str, text: str) -> None:
        """Records the error that ended a worker."""
        self._ends[rank] = {"rank": rank, "kind": kind, "text": text}

    def num_ends(self) -> int:
        """Returns the number of workers that ended with an error."""
        return len(self._ends)

    def request_stop(self, reason: str) -> None:
        """Asks all workers to store a checkpoint and stop."""
        self._stop_request = self._stop_request or reason

    def take(self) -> tuple[list[dict[str, Any]], dict[int, str], list[dict[str, Any]]]:
        """Returns the new events, the node of each known rank, and the errors of ended workers."""
        events, self._events = self._events, []
        return events, self._seen, [self._ends[rank] for rank in sorted(self._ends)]


class WorkerChannel:
    """Connects a worker to the coordinator: sends events and receives stop requests in a thread.

    Log records of this project's packages, and the progress of rank 0, are sent as events, because
    the driver shows no other output of a worker.
    """

    def __init__(self, coordinator: Any, rank: int) -> None:
        self._coordinator = coordinator
        self._rank = rank
        self._mutex = threading.Lock()
        self._events: list[dict[str, Any]] = []
        self._stop_request: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._carry, name="worker-channel", daemon=True)
        self._handler = _ChannelHandler(self._add)
        self._sent = sent_by(self.report)

    def __enter__(self) -> "WorkerChannel":
        for name in _PACKAGES:
            logging.getLogger(name).addHandler(self._handler)
            logging.getLogger(name).setLevel(logging.INFO if self._rank == 0 else logging.WARNING)
        self._sent.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        for name in _PACKAGES:
            logging.getLogger(name).removeHandler(self._handler)
        self._sent.__exit__(None, None, None)
        self._stop.set()
        self._thread.join(_MEET_S)

    def report(self, event: Mapping[str, Any]) -> None:
        """Sends an event of rank 0; drops it on other ranks, which have the same events."""
        if self._rank == 0:
            self._add(dict(event))

    def should_stop(self) -> bool:
        """Returns whether the driver asked to stop."""
        return self._stop_request is not None

    def is_shared(self, error: Exception, size: int) -> bool:
        """Reports `error` to the driver; returns whether all workers soon ended with an error."""
        import ray

        kind = kind_of(error) if isinstance(error, FlexUNetError) else FlexUNetError.__name__
        text = (
            str(error) if isinstance(error, FlexUNetError) else f"{type(error).__name__}: {error}"
        )
        if not isinstance(error, FlexUNetError):
            self._add({"event": "log", "level": logging.ERROR, "text": traceback.format_exc()})
        end = time.monotonic() + _MEET_S
        with contextlib.suppress(ray.exceptions.RayError):  # must not hide `error`
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
                with self._mutex:  # a short network failure
                    self._events[:0] = events
                continue
            except ray.exceptions.RayError:
                return  # the driver is gone; Ray is about to end this worker
            self._stop_request = stop_request or self._stop_request


class _ChannelHandler(logging.Handler):
    def __init__(self, add: Callable[[dict[str, Any]], None]) -> None:
        super().__init__()
        self._add = add

    def emit(self, record: logging.LogRecord) -> None:
        self._add({"event": "log", "level": record.levelno, "text": record.getMessage()})
