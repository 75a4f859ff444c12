"""Shows our log lines while the API works, where the program has set up no logging."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

from data_prep.imaging.quiet import Restore, SharedChange

T = TypeVar("T")

_PACKAGES = ("flexunet", "data_prep", "job")


@contextmanager
def shown_log(is_shown: bool) -> Iterator[None]:
    """Writes our log lines to stderr inside the block, as the commands do.

    A program that has set up logging decides itself what is shown. TensorFlow's hints are not: they
    are about code that the user cannot change. Calls may be nested, and made in several threads.
    """
    with _QUIET_TENSORFLOW.applied(), _OUR_LINES.applied() if is_shown else nullcontext():
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


def _quiet_tensorflow() -> Restore:
    tensorflow = logging.getLogger("tensorflow")
    level = tensorflow.level
    tensorflow.setLevel(logging.ERROR)
    return lambda: tensorflow.setLevel(level)


def _show_our_lines() -> Restore:
    if logging.getLogger().handlers:
        return lambda: None
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    loggers = [logging.getLogger(name) for name in _PACKAGES]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)

    def restore() -> None:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)

    return restore


_QUIET_TENSORFLOW, _OUR_LINES = SharedChange(_quiet_tensorflow), SharedChange(_show_our_lines)
