"""Handles the signals that end a command: Ctrl-C, SIGTERM, and SIGHUP of a closed terminal.

Imports little, so that signals are handled while other modules load.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

Handler = Callable[[int, Any], None]


@contextlib.contextmanager
def handled(numbers: tuple[signal.Signals, ...], handler: Handler) -> Iterator[None]:
    """Handles these signals with `handler` inside the block; keeps SIGHUP ignored under `nohup`.

    Works in the main thread only; in other threads the block changes nothing.
    """

    def answer(number: int, frame: Any) -> None:
        if number == signal.SIGHUP:
            _leave_terminal()
        handler(number, frame)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, answer)
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


@contextlib.contextmanager
def quiet_interrupts() -> Iterator[None]:
    """Raises KeyboardInterrupt on SIGTERM and SIGHUP inside the block, as Ctrl-C does."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    with handled((signal.SIGTERM, signal.SIGHUP), interrupt):
        yield


def ignore_interrupts_at_exit() -> None:
    """Ignores Ctrl-C while the interpreter removes its modules.

    Python would have no handler any more, and the process would end by the signal, although its
    work is done. To be called first: functions of `atexit` run in reverse order.
    """
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


def exit_on_interrupt(code: int) -> None:
    """Ends the process with `code` at Ctrl-C: its work is done, and only threads may still run."""
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(code))


def end_process(code: int) -> NoReturn:
    """Ends the process as the interpreter does, but removes no modules.

    Threads finish, and functions of `atexit` run. To remove the modules of TensorFlow takes about
    a second.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


def _leave_terminal() -> None:
    """Redirects stdout and stderr to /dev/null if the terminal is closed.

    A write to a closed terminal raises an error, which would abort work still to be stored.
    """
    for number in (1, 2):
        try:
            os.write(number, b"")
        except OSError:
            with contextlib.suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)
