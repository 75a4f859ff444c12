"""Suppresses warnings and logs of decoders, which would quote values of a file.

These settings are global, but several threads decode at once: the first thread that enters changes
a setting, and the last one that leaves restores it. `warnings.catch_warnings` is not safe in
threads: it may leave a filter for the rest of the process.
"""

import contextlib
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Restore = Callable[[], None]


class SharedChange:
    """A change of global state that lasts while at least one thread needs it.

    Args:
        change: changes the state and returns a function that restores it.
    """

    def __init__(self, change: Callable[[], Restore]) -> None:
        self._change = change
        self._lock = threading.Lock()
        self._num_users = 0
        self._restore: Restore | None = None

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Applies the change inside the block."""
        with self._lock:
            if self._restore is None:
                self._restore = self._change()
            self._num_users += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_users -= 1
                if self._num_users == 0:
                    restore, self._restore = self._restore, None
                    if restore is not None:
                        restore()


def _ignore_warnings(module: str) -> Restore:
    """Ignores warnings of the modules that match a pattern."""
    pattern = f"(?#flexunet){module}"  # no other filter has this text
    # Do not replace the list of filters: another thread may hold it in `catch_warnings`.
    filters = warnings.filters
    warnings.filterwarnings("ignore", module=pattern)

    def restore() -> None:
        # A block of `catch_warnings` that began or ended meanwhile has replaced the list.
        for current in (filters, warnings.filters):
            for entry in [each for each in current if getattr(each[3], "pattern", "") == pattern]:
                current.remove(entry)  # type: ignore[attr-defined]

    return restore


def _ignore_pillow() -> Restore:
    return _ignore_warnings(r"PIL\.")


def _ignore_pydicom() -> Restore:
    import pydicom

    # pydicom also warns in the name of its caller.
    show_warnings = _ignore_warnings("")
    settings, logger = pydicom.config.settings, logging.getLogger("pydicom")
    mode, level = settings.reading_validation_mode, logger.level
    settings.reading_validation_mode = pydicom.config.IGNORE
    logger.setLevel(logging.CRITICAL)

    def restore() -> None:
        show_warnings()
        # Keep a value that the user's program has set meanwhile.
        if settings.reading_validation_mode == pydicom.config.IGNORE:
            settings.reading_validation_mode = mode
        if logger.level == logging.CRITICAL:
            logger.setLevel(level)

    return restore


_PILLOW, _PYDICOM = SharedChange(_ignore_pillow), SharedChange(_ignore_pydicom)


def quiet_pillow() -> contextlib.AbstractContextManager[None]:
    """Suppresses the warnings of Pillow inside the block."""
    return _PILLOW.applied()


def quiet_pydicom() -> contextlib.AbstractContextManager[None]:
    """Suppresses validation, warnings and logs of pydicom inside the block."""
    return _PYDICOM.applied()
