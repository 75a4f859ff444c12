"""Runs commands of the project as processes of the suite's fork server.

`run` and `start` are for tests of what a command does. They take the arguments of `python -m`, and
behave like `subprocess.run` and `subprocess.Popen` with text. Tests of a process start (its path,
its imports, a signal in its first second) use `subprocess` instead.
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

PROJECT = Path(__file__).resolve().parents[1]

SERVER_VARIABLE = "FLEXUNET_FORK_SERVER"  # folder of the server's socket, and its owner
_START_TIMEOUT_S = 300.0  # a busy machine may need minutes
_NUM_SERVERS = 2
IMPORTED = (  # what the servers import
    "tensorflow",
    "keras",
    "h5py",
    "scipy.spatial",
    "matplotlib.figure",
    "google.cloud.storage",
    "tensorboard",
    "job.train",
    "job.evaluate",
    "job.infer",
    "job.report",
)
_calls = itertools.count()
_OUTPUTS = ("stdout", "stderr")


def checked_descriptor(descriptor: int) -> None:
    """Stands in for `os.fsync` in the suite, which cannot cut the power; a call takes 3 ms."""
    os.fstat(descriptor)


def run(
    *words: str,
    folder: Path | str = PROJECT,
    environment: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m WORDS` to its end, like `subprocess.run` with captured text.

    Args:
        folder: its working folder.
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
    """Starts `python -m WORDS`, like `subprocess.Popen` with pipes for stdout and stderr."""
    pipes = [os.pipe() for _ in _OUTPUTS]
    with open(os.devnull, "rb") as nothing:
        theirs = [nothing.fileno(), *(write for _, write in pipes)]
        pid, connection = fork(words, theirs, folder, environment)
    for _, write in pipes:
        os.close(write)
    return Process(words, pid, connection, *(os.fdopen(read) for read, _ in pipes))


def fork(
    words: Sequence[str],
    files: Sequence[int],
    folder: Path | str = PROJECT,
    environment: Mapping[str, str] | None = None,
) -> tuple[int, socket.socket]:
    """Starts `python -m WORDS` with its own stdin, stdout and stderr.

    Args:
        files: descriptors of the three, which stay open here.

    Returns:
        The id of the process, and a connection from which `exit_code` reads.
    """
    connection = _connected()
    request = {
        "module": words[0],
        "arguments": words[1:],
        "folder": str(folder),
        "environment": dict(os.environ if environment is None else environment),
    }
    data = json.dumps(request).encode()
    connection.sendall(len(data).to_bytes(4, "big"))
    socket.send_fds(connection, [data[:1]], files)
    connection.sendall(data[1:])
    answer = connection.recv(4, socket.MSG_WAITALL)
    assert len(answer) == 4, "the fork server could not start it; see its log"
    return int.from_bytes(answer, "big"), connection


def exit_code(connection: socket.socket) -> int:
    """Waits for the end of a forked process; returns minus N if signal N ended it."""
    data = connection.recv(4)
    connection.close()
    # A process is killed if its server ends.
    status = int.from_bytes(data, "big") if data else signal.SIGKILL
    return os.waitstatus_to_exitcode(status)


class Process:
    """A process of the fork server, with the interface of `subprocess.Popen`."""

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
        """Waits for the end and returns the exit code; minus N if signal N ended the process."""
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(list(self.args), timeout or 0.0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for the end and returns the text of stdout and stderr."""
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
        """Sends a signal, if the process still runs."""
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
                self.returncode = exit_code(self._connection)
            except (BlockingIOError, TimeoutError):
                return None
        return self.returncode


def _connected() -> socket.socket:
    """Returns a connection to one of the suite's fork servers, which the first call starts.

    The servers are used in turns. Each has another hash seed, so that a run that one starts and
    the other resumes must not depend on the order of a set.
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
    """Starts a server and waits until it listens; its output is in a log next to its socket."""
    variables = {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONHASHSEED": str(number + 1)}
    with open(f"{path}.log", "a") as log:
        subprocess.run(
            [sys.executable, "-m", "tests.fork_server", str(path), str(owner), *IMPORTED],
            cwd=PROJECT,
            env=os.environ | variables,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            timeout=_START_TIMEOUT_S,
            check=True,
        )
