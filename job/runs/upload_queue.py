"""Runs uploads in order in a background thread while training continues.

A storage outage is waited out up to a time limit. Any other error stops the uploads, and the owner
gets it at its next call. Waiting calls report progress while bytes move: a slow connection is no
outage.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from flexunet.errors import StorageError
from flexunet.progress import Heartbeat, no_heartbeat
from flexunet.storage import Unavailable

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0
_LAST_CALL_S = 5.0  # for the running call, when the others are dropped
_MOST_BUDGETS = 10  # for one call, regardless of its progress
_LOOK_S = 1.0  # between two checks, while waiting, for moved bytes


class UploadQueue:
    """Runs posted calls one after the other in a thread; a context manager.

    Leaving the block waits for all calls, also after an error, but not after an interrupt.
    """

    def __init__(self, *, budget_s: float, heartbeat: Heartbeat = no_heartbeat) -> None:
        """Starts the thread.

        Args:
            budget_s: seconds for which one call is repeated while storage cannot be reached.
            heartbeat: called while leaving the block waits and bytes move.
        """
        self._budget_s = budget_s
        self._alive = heartbeat
        self._num_moves = 0
        self._moved_at = time.monotonic()
        self._calls: deque[tuple[Callable[[], Any], bool]] = deque()  # the first one is running
        self._changed = threading.Condition()
        self._failure: Exception | None = None
        self._refusal: Exception | None = None
        self._dropped = threading.Event()
        self._thread = threading.Thread(target=self._deliver, name="upload-queue", daemon=True)
        self._thread.start()

    def __enter__(self) -> "UploadQueue":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is None or issubclass(kind, Exception):
            self._wait_until(lambda: not self._calls, self._alive)
            if kind is not None and self._failure is not None:
                logger.warning(
                    "the uploads in progress are lost; the same command resumes from the last "
                    "stored checkpoint: %s",
                    self._failure,
                )
        # Remaining calls could write at the same time as the next owner.
        self._drop()
        self._thread.join(_LAST_CALL_S)

    @property
    def has_failed(self) -> bool:
        """Whether a call failed permanently, which drops later calls, or the owner failed."""
        return self._failure is not None or self._refusal is not None

    def post(self, call: Callable[[], Any], *, is_large: bool = False) -> None:
        """Queues `call` after those posted before.

        Args:
            is_large: counts for `wait_for_capacity`.
        """
        with self._changed:
            if not self.has_failed:
                self._calls.append((call, is_large))
                self._changed.notify_all()

    @property
    def has_capacity(self) -> bool:
        """Whether at most one large call is queued or running."""
        with self._changed:
            return sum(is_large for _, is_large in self._calls) < 2

    def moved(self) -> None:
        """Notes that the running call has moved bytes; that call calls it often."""
        self._num_moves += 1
        self._moved_at = time.monotonic()

    def wait_for_capacity(self, heartbeat: Heartbeat = no_heartbeat) -> None:
        """Waits until at most one large call is queued or running.

        Args:
            heartbeat: called while bytes move.

        Raises:
            Exception: the error that stopped the uploads.
        """
        self._wait_until(lambda: self.has_capacity, heartbeat)
        self._raise_failure()

    def flush(self, heartbeat: Heartbeat = no_heartbeat) -> None:
        """Waits until every call is done.

        Args:
            heartbeat: called while bytes move.

        Raises:
            Exception: the error that stopped the uploads, at every later call, too.
        """
        self._wait_until(lambda: not self._calls, heartbeat)
        self._raise_failure()

    def fail(self, error: Exception) -> None:
        """Accepts no more calls; `flush` raises `error` after the calls posted before."""
        with self._changed:
            self._refusal = self._refusal or error

    def _wait_until(self, predicate: Callable[[], bool], heartbeat: Heartbeat) -> None:
        num_moves = self._num_moves
        while True:
            with self._changed:
                if self._changed.wait_for(
                    lambda: self._failure is not None or self._dropped.is_set() or predicate(),
                    timeout=_LOOK_S,
                ):
                    return
            if self._num_moves != num_moves:
                num_moves = self._num_moves
                heartbeat()

    def _raise_failure(self) -> None:
        error = self._failure or self._refusal
        if error is not None:
            raise error

    def _drop(self) -> None:
        self._dropped.set()
        with self._changed:
            self._changed.notify_all()

    def _deliver(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._dropped.is_set() or bool(self._calls))
                if self._dropped.is_set():
                    return
                call = self._calls[0][0]
            try:
                self._repeat(call)
            except Exception as error:
                self._failure = error
                self._drop()
            self.moved()
            with self._changed:
                self._calls.popleft()
                self._changed.notify_all()

    def _repeat(self, call: Callable[[], Any]) -> None:
        """Repeats `call` while storage cannot be reached, up to the limit since bytes last moved.

        A connection that breaks repeatedly after some bytes has ten times the limit in total.
        """
        begin = looked_at = time.monotonic()
        since: float | None = None  # start of the outage
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                call()
                return
            except Unavailable as error:
                if since is None or self._moved_at > looked_at:
                    since = max(begin, self._moved_at)
                looked_at = time.monotonic()
                past_s = looked_at - since
                is_over = past_s + pause_s > self._budget_s
                if is_over or looked_at - begin > _MOST_BUDGETS * self._budget_s:
                    raise StorageError(
                        f"storage could not be reached for {past_s:.0f} s: {error}"
                    ) from error
                logger.warning("storage cannot be reached, training continues: %s", error)
            if self._dropped.wait(pause_s):
                return
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
