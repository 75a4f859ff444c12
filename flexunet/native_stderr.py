"""Suppresses the stderr output of C and C++ libraries that have no option for it."""

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def suppress_native_stderr(*, shown_on_error: bool) -> Iterator[None]:
    """Drops output to file descriptor 2 inside the block, except that of Python itself.

    Args:
        shown_on_error: show the dropped output if the block raises.
    """
    sys.stderr.flush()
    original = os.dup(2)
    with tempfile.TemporaryFile() as held, open(original, "w", buffering=1) as shown:
        os.dup2(held.fileno(), 2)
        try:
            with _lines_of_python(shown):
                yield
        except Exception:
            if shown_on_error:
                held.seek(0)
                os.write(original, held.read())
            raise
        finally:
            os.dup2(original, 2)


@contextmanager
def _lines_of_python(shown: object) -> Iterator[None]:
    """Redirects log records and `sys.stderr` to `shown` if they write to descriptor 2."""
    before = sys.stderr
    if not _is_descriptor_2(before):
        yield
        return
    with contextlib.redirect_stderr(shown):  # type: ignore[type-var]
        _move_handlers(before, shown)
        try:
            yield
        finally:
            # Also handlers that an imported library has just made: `shown` is closed soon.
            _move_handlers(shown, before)


def _move_handlers(old: object, new: object) -> None:
    """Redirects all log handlers that write to the stream `old` to `new`."""
    for logger in [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]:
        for handler in getattr(logger, "handlers", []):  # a placeholder has none
            if isinstance(handler, logging.StreamHandler) and handler.stream is old:
                handler.setStream(new)


def _is_descriptor_2(stream: object) -> bool:
    try:
        return stream.fileno() == 2  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return False
