"""Shows our log lines while the API works, where the program has set up no logging."""

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TypeVar

T = TypeVar("T")

_PACKAGES = ("flexunet", "data_prep", "job")


class _Shared:
    """Enters a block for the first of several threads or nested calls; the last one leaves it."""

    def __init__(self, block: Callable[[], AbstractContextManager[None]]) -> None:
        self._block = block
        self._lock = threading.Lock()
        self._depth = 0
        self._entered = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._depth == 0:
                self._entered.enter_context(self._block())
            self._depth += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                self._entered.close()


@contextmanager
def shown_log(is_shown: bool) -> Iterator[None]:
    """Writes our log lines to stderr inside the block, as the commands do.

    A program that has set up logging decides itself what is shown. TensorFlow's hints are not: they
    are about code that the user cannot change. Calls may be nested, and made in several threads.
    """
    with _QUIET_TENSORFLOW, _OUR_LINES if is_shown else nullcontext():
        yield


def each_with_log(items: Iterator[T], is_shown: bool) -> Iterator[T]:
    """Yields `items`, each made inside `shown_log`; between two, the log is the program's own."""
    while True:
        with shown_log(is_shown):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


@contextmanager
def _quiet_tensorflow() -> Iterator[None]:
    tensorflow = logging.getLogger("tensorflow")
    level = tensorflow.level
    tensorflow.setLevel(logging.ERROR)
    try:
        yield
    finally:
        tensorflow.setLevel(level)


@contextmanager
def _our_lines() -> Iterator[None]:
    if logging.getLogger().handlers:
        yield
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    loggers = [logging.getLogger(name) for name in _PACKAGES]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


_QUIET_TENSORFLOW = _Shared(_quiet_tensorflow)
_OUR_LINES = _Shared(_our_lines)
