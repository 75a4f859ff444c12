"""Defines the errors that end a command, and the exit code of each.

`EXIT_CODES` says what each code means; `flexunet --help` shows it.

The message of each says, in one line: what is wrong, the value, where, and what to do. It is the
same each time: what a library quotes of its objects is kept without their addresses.
"""

import re

EXIT_CODES = {
    0: "done",
    1: "an error of unknown kind; a retry may help",
    2: "wrong option or config; missing or empty source",
    3: "a file that cannot be read, or contradicts another",
    4: "another process owns the run",
    5: "storage unavailable, unwritable or full; a retry may help",
    6: "stopped; the same command continues",
    7: "training diverged: the loss became NaN or infinite",
}

_ADDRESS = re.compile(r"(?: object)? at 0x[0-9a-fA-F]+(?=[>\s,;)]|$)")


class FlexUNetError(Exception):
    """An error whose message is written for the user."""

    exit_code = 1

    def __init__(self, *args: object):
        super().__init__(
            *(_ADDRESS.sub("", each) if isinstance(each, str) else each for each in args)
        )


class UsageError(FlexUNetError):
    """The command, its config or its source is wrong; running it again changes nothing."""

    exit_code = 2


class ContentError(FlexUNetError):
    """A file cannot be read or contradicts another."""

    exit_code = 3


class LockedError(FlexUNetError):
    """Another process owns the run."""

    exit_code = 4


class StorageError(FlexUNetError):
    """Storage is unavailable, refuses to be written, or is full."""

    exit_code = 5


class StoppedError(FlexUNetError):
    """The work was stopped and can be resumed by the same command."""

    exit_code = 6


class DivergedError(FlexUNetError):
    """Training produced a loss that is not finite."""

    exit_code = 7


def kind_of(error: FlexUNetError) -> str:
    """Returns the name of the class of this module that `error` is of, to be sent elsewhere."""
    return next(each.__name__ for each in type(error).__mro__ if each.__module__ == __name__)


def error_of(kind: str, text: str) -> FlexUNetError:
    """Returns the error of a name that `kind_of` gave."""
    found = globals().get(kind)
    if not (isinstance(found, type) and issubclass(found, FlexUNetError)):
        return FlexUNetError(text)
    return found(text)
