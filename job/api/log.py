"""Shows our log lines while the API works, where the program has set up no logging."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

T = TypeVar("T")

_PACKAGES = ("flexunet", "data_prep", "job")


@contextmanager
def shown_log(is_shown: bool) -> Iterator[None]:
    """Writes our log lines to stderr inside the block, as the commands do.

    A program that has set up logging decides itself what is shown. TensorFlow's hints are not: they
    are about code that the user cannot change.
    """
    tensorflow = logging.getLogger("tensorflow")
    level = tensorflow.level
    tensorflow.setLevel(logging.ERROR)
    try:
        with _our_lines() if is_shown and not logging.getLogger().handlers else nullcontext():
            yield
    finally:
        tensorflow.setLevel(level)


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
def _our_lines() -> Iterator[None]:
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
