"""Commands of the project as processes, started by the suite's fork server.

`run` and `start` are for tests of what a command does. They take the words of `python -m`, and
behave as `subprocess.run` and `subprocess.Popen` with text. Tests of how a process begins (its
path, what it imports, a signal in its first second) start it with `subprocess`.
"""

import fcntl
import itertools
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO

PROJECT = Path(__file__).resolve().parents[1]

SERVER_VARIABLE = "FLEXUNET_FORK_SERVER"  # folder of the server's socket, and whose it is
_START_TIMEOUT_S = 120.0
_NUM_SERVERS = 2
_calls = itertools.count()
_OUTPUTS = ("stdout", "stderr")


def run(
    *words: str,
    folder: Path | str = PROJECT,
    environment: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m WORDS` to its end, as `subprocess.run` with captured text.

    Args:
        folder: where it works.
        environment: its variables; None: those of this process.
        timeout: seconds after which it is killed.

    Raises:
        subprocess.TimeoutExpired: it took longer.
    """
    with start(*words, folder=folder, environment=environment) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(list(words), process.wait(), output, errors)


def start(
    *words: str,
    folder: Path | str = PROJECT,
    environment: Mapping[str, str] | None = None,
) -> "Process":
    """Starts `python -m WORDS`, as `subprocess.Popen` with pipes for stdout and stderr."""
    pipes = [os.pipe() for _ in _OUTPUTS]
    with open(os.devnull, "rb") as nothing:
        theirs = [nothing.fileno(), *(write for _, write in pipes)]
        connection = _connected()
        request = {
            "module": words[0],
            "arguments": words[1:],
            "folder": str(folder),
            "environment": dict(os.environ if environment is None else environment),
        }
        data = json.dumps(request).encode()
        connection.sendall(len(data).to_bytes(4, "big"))
        socket.send_fds(connection, [data[:1]], theirs)
        connection.sendall(data[1:])
    for _, write in pipes:
        os.close(write)
    answer = connection.recv(4, socket.MSG_WAITALL)
    assert len(answer) == 4, "the fork server could not start it; see its log"
    pid = int.from_bytes(answer, "big")
    return Process(words, pid, connection, *(os.fdopen(read) for read, _ in pipes))


class Process:
    """A process of the fork server; what is here is as of `subprocess.Popen`."""

    def __init__(
        self,
        args: tuple[str, ...],
        pid: int,
        connection: socket.socket,
        stdout: IO[str],
        stderr: IO[str],
    ) -> None:
        self.args, self.pid, self.stdout, self.stderr = args, pid, stdout, stderr
        self.returncode: int | None = None
        self._connection = connection

    def __enter__(self) -> "Process":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.wait()
        self.stdout.close()
        self.stderr.close()

    def poll(self) -> int | None:
        """Returns the exit code, None while it runs."""
        return self._ended(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Returns the exit code when it has ended; minus N where signal N ended it."""
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(list(self.args), timeout or 0.0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Returns what it writes to stdout and stderr until its end."""
        found: dict[str, bytes] = dict.fromkeys(_OUTPUTS, b"")
        deadline = None if timeout is None else time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            for name in found:
                selector.register(getattr(self, name), selectors.EVENT_READ, name)
            while selector.get_map():
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                ready = selector.select(left)
                if not ready:
                    raise subprocess.TimeoutExpired(list(self.args), timeout or 0.0)
                for key, _ in ready:
                    data = os.read(key.fd, 1 << 16)
                    found[key.data] += data
                    if not data:
                        selector.unregister(key.fileobj)
        self.stdout.close()
        self.stderr.close()
        self.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        output, errors = (text.decode(errors="replace") for text in found.values())
        return output, errors

    def send_signal(self, number: int) -> None:
        """Sends it a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Sends SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                data = self._connection.recv(4)
            except (BlockingIOError, TimeoutError):
                return None
            self._connection.close()
            # Without its server a process is killed.
            status = int.from_bytes(data, "big") if data else signal.SIGKILL
            self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def _connected() -> socket.socket:
    """Returns a connection to one of the suite's fork servers, which the first call starts.

    They take turns. Each hashes text in another way, so that a run that is begun by one and resumed
    by the other must not depend on the order of a set.
    """
    number = next(_calls) % _NUM_SERVERS
    folder = Path(os.environ[SERVER_VARIABLE])
    path = folder / f"server-{number}"
    connection = socket.socket(socket.AF_UNIX)
    with open(folder / f"lock-{number}", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            _start_server(path, int((folder / "owner").read_text()), number)
            connection.connect(str(path))
    return connection


def _start_server(path: Path, owner: int, number: int) -> None:
    """Returns when the server listens; what it writes is in a log beside its socket."""
    variables = {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONHASHSEED": str(number + 1)}
    with open(f"{path}.log", "a") as log:
        subprocess.run(
            [sys.executable, "-m", "tests.fork_server", str(path), str(owner)],
            cwd=PROJECT,
            env=os.environ | variables,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            timeout=_START_TIMEOUT_S,
            check=True,
        )
