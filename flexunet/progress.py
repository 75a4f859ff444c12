"""Shows the progress of long work: a bar on a terminal, a log line every 15 s elsewhere.

A worker on another machine sends its progress to the process that shows it: see `sent_by`.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")
Heartbeat = Callable[[], None]  # called regularly while long work makes progress

logger = logging.getLogger(__name__)

_LINE_EVERY_S = 15.0
_SEND_EVERY_S = 0.5

# Takes what `Progress.follow` needs, as an event of JSON types.
Sender = Callable[[Mapping[str, Any]], None]
_sender: Sender | None = None


@contextlib.contextmanager
def sent_by(sender: Sender) -> Iterator[None]:
    """Sends the progress of this process by `sender` inside the block, instead of showing it.

    In all threads of the process: long work often has its own.
    """
    global _sender
    _sender, before = sender, _sender
    try:
        yield
    finally:
        _sender = before


def is_watched() -> bool:
    """Returns whether a bar is seen: on a terminal here, or where `sent_by` sends it."""
    return _sender is not None or (sys.stderr is not None and sys.stderr.isatty())


def no_heartbeat() -> None:
    """Does nothing: the `Heartbeat` when no watchdog is running."""


class Progress:
    """Counts finished items of one task; shows the rate and the time left.

    Draws a bar on a terminal. Without a terminal, logs a line every 15 s and one at the end; inside
    `sent_by` sends events instead.
    """

    def __init__(
        self,
        title: str,
        total: int | None,
        *,
        done: int = 0,
        unit: str = "images",
        shown: bool = True,
    ) -> None:
        """Starts at `done` of `total`, if that is known; shows nothing if `shown` is False."""
        self._title = title
        self._total = total
        self._unit = unit
        self._done = self._begin = done
        self._started = self._last_line = time.monotonic()
        self._shown = shown
        self._bar: Any = None
        self._task: Any = None
        self._note = ""
        self._num_reported = -1  # items done when the last line was logged
        self._sender = _sender if shown else None

    def __enter__(self) -> "Progress":
        if self._sender is not None:
            self._send(is_over=False)
        elif self._shown and sys.stderr.isatty():
            self._open_bar()
        return self

    @classmethod
    def of(cls, event: Mapping[str, Any], *, shown: bool = True) -> "Progress":
        """Returns the progress whose first event is `event`; `follow` takes it and the others."""
        return cls(
            event["title"], event["total"], done=event["begin"], unit=event["unit"], shown=shown
        )

    def follow(self, event: Mapping[str, Any]) -> None:
        """Shows what `event` of another process says."""
        self.advance(event["done"] - self._done, event["note"])

    def advance(self, count: int = 1, note: str = "") -> None:
        """Adds `count` finished items; shows `note` at the end of the bar."""
        self._done += count
        self._note = note
        if self._bar is not None:
            self._bar.update(self._task, advance=count, speed=self._speed(), note=note)
        elif self._sender is not None:
            if time.monotonic() - self._last_line > _SEND_EVERY_S:
                self._send(is_over=False)
        elif self._shown and time.monotonic() - self._last_line > _LINE_EVERY_S:
            self._last_line = time.monotonic()
            self._num_reported = self._done
            logger.info("%s", self._line())

    def note(self, text: str) -> None:
        """Shows `text` beside the count, such as the progress within a slow item."""
        self.advance(0, text)

    def line(self, text: str) -> None:
        """Shows `text` on a separate line, above the bar if one is drawn."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self._shown:
            logger.info("%s", text)

    def tracked(self, items: Iterable[T]) -> Iterator[T]:
        """Yields `items`; counts an item as finished when the next one is requested."""
        for item in items:
            yield item
            self.advance()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._sender is not None:
            self._send(is_over=True)
        elif self._shown and kind is None and self._num_reported != self._done:
            logger.info("%s", self._line())

    def _send(self, *, is_over: bool) -> None:
        assert self._sender is not None  # noqa: S101 - only called where it is set
        self._last_line = time.monotonic()
        self._sender(
            {
                "event": "progress",
                "title": self._title,
                "total": self._total,
                "unit": self._unit,
                "begin": self._begin,
                "done": self._done,
                "note": self._note,
                "is_over": is_over,
            }
        )

    def _open_bar(self) -> None:
        from rich import progress
        from rich.console import Console

        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=None),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[speed]}"),
            progress.TimeRemainingColumn(compact=True),
            progress.TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            expand=True,
        )
        self._task = self._bar.add_task(
            self._title, total=self._total, completed=self._done, speed="", note=""
        )
        self._bar.start()

    def _speed(self) -> str:
        elapsed = time.monotonic() - self._started
        if elapsed <= 0.5:
            return ""
        return f"{(self._done - self._begin) / elapsed:.1f} {self._unit}/s"

    def _line(self) -> str:
        count = f"{self._done}" if self._total is None else f"{self._done}/{self._total}"
        parts = [
            f"{self._title}: {count} {self._unit}",
            self._speed(),
            self._note,
        ]
        return ", ".join(part for part in parts if part)


@contextlib.contextmanager
def waiting(text: str, *, shown: bool = True) -> Iterator[None]:
    """Shows `text` and the seconds so far on a terminal while the block runs, then removes them.

    For work of unknown length before a `Progress` can count; shows nothing without a terminal.
    """
    if not (shown and sys.stderr.isatty()):
        yield
        return
    from rich import progress
    from rich.console import Console

    with progress.Progress(
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description}"),
        progress.TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        refresh_per_second=4,
    ) as display:
        display.add_task(text, total=None)
        yield


def load_bar() -> None:
    """Imports rich's progress bar if stderr is a terminal."""
    if sys.stderr.isatty():
        import rich.progress  # noqa: F401
