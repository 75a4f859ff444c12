"""Runs calls that upload, in order and in a thread of their own, while training continues.

Knows nothing of what is stored. An outage is waited out up to a budget; whatever else fails ends
the deliveries, and the owner is told at its next question. Whoever waits is told as long as bytes
move: a slow line is no outage.
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
_LAST_CALL_S = 5.0  # for the call that is running when the rest is dropped
_MOST_BUDGETS = 10  # for one call, however often bytes moved
_LOOK_S = 1.0  # between two looks, while waiting, at whether bytes have moved


class UploadQueue:
    """Runs the calls that are posted, one after the other, in a thread; a context manager.

    Leaving the block waits for all of them, whatever error it is left by, unless by an interrupt.
    """

    def __init__(self, *, budget_s: float, heartbeat: Heartbeat = no_heartbeat) -> None:
        """Starts the thread.

        Args:
            budget_s: seconds for which one call is repeated while storage is out of reach.
            heartbeat: called while the block is left and bytes still move.
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
        self._thread = threading.Thread(target=self._deliver, name="outbox", daemon=True)
        self._thread.start()

    def __enter__(self) -> "UploadQueue":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is None or issubclass(kind, Exception):
            self._wait_until(lambda: not self._calls, self._alive)
            if kind is not None and self._failure is not None:
                logger.warning("what was on its way to storage is lost: %s", self._failure)
        # Calls that are left would run beside the next owner of whatever they write.
        self._drop()
        self._thread.join(_LAST_CALL_S)

    @property
    def has_failed(self) -> bool:
        """Whether a call failed for good, those after it are dropped, or the owner failed."""
        return self._failure is not None or self._refusal is not None

    def post(self, call: Callable[[], Any], *, is_large: bool = False) -> None:
        """Lets `call` run after those posted before.

        Args:
            is_large: counts for `wait_for_capacity`.
        """
        with self._changed:
            if not self.has_failed:
                self._calls.append((call, is_large))
                self._changed.notify_all()

    @property
    def has_capacity(self) -> bool:
        """Whether at most one large call is on its way."""
        with self._changed:
            return sum(is_large for _, is_large in self._calls) < 2

    def moved(self) -> None:
        """Tells that bytes of the running call have moved; called by that call, often."""
        self._num_moves += 1
        self._moved_at = time.monotonic()

    def wait_for_capacity(self, heartbeat: Heartbeat = no_heartbeat) -> None:
        """Waits until at most one large call is on its way.

        Args:
            heartbeat: called while bytes move.

        Raises:
            Exception: the one that ended the deliveries.
        """
        self._wait_until(lambda: self.has_capacity, heartbeat)
        self._raise_failure()

    def flush(self, heartbeat: Heartbeat = no_heartbeat) -> None:
        """Waits until every call is done.

        Args:
            heartbeat: called while bytes move.

        Raises:
            Exception: the one that ended the deliveries, at every call from then on.
        """
        self._wait_until(lambda: not self._calls, heartbeat)
        self._raise_failure()

    def fail(self, error: Exception) -> None:
        """Takes no more calls; `flush` raises `error` after those that were posted before."""
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
        """Repeats `call` while storage is out of reach, up to the budget since bytes last moved.

        A line that breaks again and again after some bytes has ten times as long, all in all.
        """
        begin = looked_at = time.monotonic()
        since: float | None = None  # storage is out of reach
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
                        f"storage was out of reach for {past_s:.0f} s: {error}"
                    ) from error
                logger.warning("storage is out of reach, training goes on: %s", error)
            if self._dropped.wait(pause_s):
                return
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
