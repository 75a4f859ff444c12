"""Sends a run to a tracker in a thread, so that training never waits for the tracker.

The function that sends compares the tracker with the files of the run and sends what is missing. So
a notification holds only the number of finished epochs, a newer one replaces it, and nothing is
lost when a call fails: the next one sends more.
"""

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Literal

from flexunet.errors import LockedError
from job.trackers.target import without_secrets

logger = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]
# Called with the number of finished epochs, at the end with the status, and with a function that
# raises if no more may be sent.
Send = Callable[[int, Status | None, Callable[[], None]], None]

_END_S = 30.0  # most that the end of a training waits
_END_AFTER_FAILURE_S = 5.0  # likewise, if the tracker has failed before, or the process is stopped
_PAUSE_S = 1.0  # before the last call is repeated
_MAX_DETAIL_WIDTH = 200  # characters of a library's error


class AbandonedError(Exception):
    """This process must not send any more."""


class BackgroundTracker:
    """Calls a function in a thread after each notification; a context manager.

    A failure is logged once, until a call succeeds again.

    Attributes:
        status: how the run ended; None: leaving the block with an error means FAILED.
    """

    def __init__(self, send: Send, name: str, is_lost: Callable[[], bool]) -> None:
        """Prepares the thread.

        Args:
            send: see `Send`.
            name: of the tracker, for messages.
            is_lost: whether another process has taken the run over.
        """
        self.status: Status | None = None
        self._send = send
        self._name = name
        self._is_lost = is_lost
        self._num_epochs = 0
        self._is_last = False
        self._is_closed = False
        self._has_failed = False
        self._changed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)

    def __enter__(self) -> "BackgroundTracker":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None or (issubclass(kind, Exception) and not issubclass(kind, LockedError)):
            if kind is not None and self.status is None:
                self.status = "FAILED"
            self._wait_for_last()
        self._is_closed = True
        self._changed.set()

    def notify(self, num_epochs: int) -> None:
        """Sends soon that `num_epochs` epochs are stored; returns at once."""
        self._num_epochs = num_epochs
        self._changed.set()

    def check(self) -> None:
        """Raises AbandonedError if this process must not send any more."""
        if self._is_closed or self._is_lost():
            raise AbandonedError

    def _wait_for_last(self) -> None:
        self._is_last = True
        self._changed.set()
        # A preempted machine has only about 30 s until it is killed.
        is_short = self._has_failed or self.status == "KILLED"
        wait_s = _END_AFTER_FAILURE_S if is_short else _END_S
        self._thread.join(wait_s)
        if self._thread.is_alive():
            self._warn(f"no answer within {wait_s:g} s")

    def _work(self) -> None:
        while True:
            self._changed.wait()
            self._changed.clear()
            is_last = self._is_last
            try:
                self.check()
                is_sent = self._try() or (is_last and self._try_again())
            except AbandonedError:
                return
            if is_sent and self._has_failed:
                logger.info("%s: everything is sent", self._name)
                self._has_failed = False
            if is_last:
                return

    def _try_again(self) -> bool:
        time.sleep(_PAUSE_S)
        return self._try()

    def _try(self) -> bool:
        try:
            self._send(self._num_epochs, self.status if self._is_last else None, self.check)
        except AbandonedError:
            raise
        except Exception as error:
            lines = without_secrets(str(error)).strip().splitlines() or [type(error).__name__]
            self._warn(lines[0][:_MAX_DETAIL_WIDTH])
            return False
        return True

    def _warn(self, problem: str) -> None:
        if not self._has_failed:
            logger.warning(
                "%s: %s. Training does not need it; what is missing is sent after a later epoch, "
                "or by the same command later",
                self._name,
                problem,
            )
        self._has_failed = True
