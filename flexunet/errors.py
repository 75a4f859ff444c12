"""Defines the errors that end a command, and their exit codes.

`EXIT_CODES` explains each code; `flexunet --help` shows it.

An error message is one line: what is wrong, the value, where, and what to do. Memory addresses that
a library puts into its messages are removed, so that the same error always has the same text.
"""

import re

EXIT_CODES = {
    0: "done",
    1: "unknown error; a retry may help",
    2: "wrong option or config; missing or empty source",
    3: "a file is unreadable or contradicts another file",
    4: "another process owns the run",
    5: "storage is unavailable, read-only or full; a retry may help",
    6: "stopped; run the same command again to continue",
    7: "training diverged: the loss became NaN or infinite",
}

_ADDRESS = re.compile(r"(?: object)? at 0x[0-9a-fA-F]+(?=[>\s,;)]|$)")


class FlexUNetError(Exception):
    """Base class of errors whose message is written for the user."""

    exit_code = 1

    def __init__(self, *args: object):
        super().__init__(
            *(_ADDRESS.sub("", each) if isinstance(each, str) else each for each in args)
        )


class UsageError(FlexUNetError):
    """The command, its config or its source is wrong; a retry does not help."""

    exit_code = 2


class ContentError(FlexUNetError):
    """A file is unreadable or contradicts another file."""

    exit_code = 3


class LockedError(FlexUNetError):
    """Another process owns the run."""

    exit_code = 4


class StorageError(FlexUNetError):
    """Storage is unavailable, read-only or full."""

    exit_code = 5


class StoppedError(FlexUNetError):
    """The work was stopped; the same command resumes it."""

    exit_code = 6


class DivergedError(FlexUNetError):
    """Training produced a loss that is NaN or infinite."""

    exit_code = 7


def kind_of(error: FlexUNetError) -> str:
    """Returns the name of the error's class in this module, to send to another process."""
    return next(each.__name__ for each in type(error).__mro__ if each.__module__ == __name__)


def error_of(kind: str, text: str) -> FlexUNetError:
    """Returns an error of the class named `kind`, as returned by `kind_of`."""
    found = globals().get(kind)
    if not (isinstance(found, type) and issubclass(found, FlexUNetError)):
        return FlexUNetError(text)
    return found(text)
