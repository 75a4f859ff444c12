"""Detects a stalled process, writes its stacks and ends it.

A collective waits for its peers for ever; so does a process with a dead disk or a deadlock. No
scheduler can distinguish a process that computes from one that waits.
"""

import faulthandler
import logging
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flexunet.errors import FlexUNetError
from flexunet.storage import ObjectStore

logger = logging.getLogger(__name__)

STACKS_FOLDER = "stacks"  # in a run's folder
_NUM_STEPS = 50  # latest steps, whose median is the usual duration
_MIN_STEP_S = 120.0
_FACTOR = 10.0
_TICK_S = 0.5
_CONNECT_S = 2.0
_QUIET_S = 10.0  # without a step until peers are checked, and between two checks
_END_S = 60.0  # to write the stacks; then the process ends in any case
_GRACE_S = 5.0  # for the other processes to write their stacks before this process ends them


class Watchdog:
    """Calls `expired` if there is no progress for too long or a peer is gone; a context manager.

    A collective does not always notice that a peer has died.
    """

    def __init__(
        self,
        *,
        phase_s: float,
        step_s: float,
        expired: Callable[[str], None],
        peers: Mapping[int, str] | None = None,
    ) -> None:
        """Sets the limits; watching starts when the block is entered.

        Args:
            phase_s: longest time to the first step of a phase, which may compile or wait.
            step_s: longest time of the other steps; 0: ten times their median, at least 120 s.
            expired: called once for each stall, from another thread, with the problem.
            peers: host:port of each other process, by rank.
        """
        self._peers = dict(peers or {})
        self._phase_s = phase_s
        self._step_s = step_s
        self._expired = expired
        self._phase = "starting"
        self._needs_peers = True
        self._limit_s = phase_s
        self._begin = self._last = (
            time.monotonic()
        )  # start of the step in progress; its last progress
        self._steps: deque[float] = deque(maxlen=_NUM_STEPS)
        self._num_signs = 0  # of progress
        self._is_paused = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._begin = self._last = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop.set()

    def enter(self, phase: str, *, needs_peers: bool = True) -> None:
        """Begins a phase; its name is in the error message of a stall.

        Args:
            needs_peers: whether to end this process, too, if another one is gone.
        """
        self._phase = phase
        self._needs_peers = needs_peers
        self._limit_s, self._begin = self._phase_s, time.monotonic()
        self._last = self._begin
        self._num_signs += 1

    def beat(self) -> None:
        """Notes that a step of the phase is done."""
        now = time.monotonic()
        if self._limit_s != self._phase_s:
            self._steps.append(now - self._begin)
        usual = statistics.median(self._steps) if self._steps else 0.0
        limit_s = self._step_s or max(_MIN_STEP_S, _FACTOR * usual)
        self._limit_s, self._begin, self._last = limit_s, now, now
        self._num_signs += 1

    def heartbeat(self) -> None:
        """Notes progress within a step and restarts its time limit.

        Only `beat` measures the duration of steps.
        """
        self._last = time.monotonic()
        self._num_signs += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Does not watch inside the block: its time counts for no step and no limit."""
        begin, self._is_paused = time.monotonic(), True
        try:
            yield
        finally:
            pause_s = time.monotonic() - begin
            self._begin, self._last = self._begin + pause_s, self._last + pause_s
            self._is_paused = False

    def _watch(self) -> None:
        before = looked = time.monotonic()
        missing: set[str] = set()
        reported = -1  # signs of progress before the stall that was reported
        while not self._stop.wait(_TICK_S):
            now = time.monotonic()
            # Time in which the whole process is paused (Ctrl-Z, docker pause) does not count.
            pause_s = max(0.0, now - before - 10 * _TICK_S)
            before = now
            if self._is_paused or reported == self._num_signs:
                continue
            self._begin, self._last = self._begin + pause_s, self._last + pause_s
            past_s = now - self._last
            if past_s > self._limit_s:
                reported = self._num_signs
                self._expired(
                    f"no progress for {past_s:.0f} s in: {self._phase} "
                    "(--phase-timeout, --step-timeout)"
                )
                continue
            if self._needs_peers and past_s > _QUIET_S and now - looked > _QUIET_S:
                # Only after two checks: one refused connection may be an accident.
                gone, missing = missing, set(unreachable(self._peers))
                looked = before = time.monotonic()
                if self._needs_peers and gone & missing:
                    reported = self._num_signs
                    self._expired(f"cannot connect to {', '.join(sorted(gone & missing))}")


def end_process(store: ObjectStore, name: str, title: str) -> None:
    """Writes the stacks of all threads to `name` in `store`, prints a line, ends this process.

    Args:
        title: the first line: which process stalled, and where.
    """
    # The calls below may block on a lock that the stalled thread holds.
    faulthandler.dump_traceback_later(_END_S, exit=True, file=2)
    try:
        where = _store_stacks(store, name, title)
        # Logging could block for the same reason.
        print(f"{title}; the same command resumes (stacks: {where})", file=sys.stderr)  # noqa: T201
        sys.stderr.flush()
        time.sleep(_GRACE_S)
    finally:
        # A thread in a collective cannot be interrupted.
        os._exit(FlexUNetError.exit_code)


def report_stall(store: ObjectStore, name: str, problem: str) -> None:
    """Writes the stacks of all threads to `name` in `store` and logs an error.

    For a process that must not be ended: a notebook, or a program that calls the Python API.
    """
    where = _store_stacks(store, name, problem)
    logger.error(
        "%s; if training does not continue, end this process; the same call resumes (stacks: %s)",
        problem,
        where,
    )


def _store_stacks(store: ObjectStore, name: str, title: str) -> str:
    try:
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = file.read()
        store.put(name, f"{title}\n\n".encode() + stacks)
    except (FlexUNetError, OSError) as error:
        return f"not written ({error})"
    return f"{store.url}/{name}"


def unreachable(addresses: Mapping[int, str]) -> list[str]:
    """Returns `rank R (host:port)` of each address that accepts no connection."""
    missing = []
    for rank, address in addresses.items():
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
        except OSError:
            missing.append(f"rank {rank} ({address})")
    return missing
