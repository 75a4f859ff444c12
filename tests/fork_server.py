"""Starts Python commands by forking a process that has already imported TensorFlow.

Importing TensorFlow takes some seconds of CPU time, and the suite starts a hundred commands. This
process imports once, runs no operation, and forks for each request of `tests/commands.py`.

A fork is not a process start: the start of a command (its path, its first signals, its imports) is
tested with real starts. Forking is safe only before TensorFlow's first operation, so this process
only imports.

python -m tests.fork_server SOCKET PID [MODULE ...]    ends with process PID
"""

import atexit
import contextlib
import ctypes
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping
from typing import Any

import numpy as np

from tests import commands

_PR_SET_PDEATHSIG = 1  # Linux: the signal that a process gets when its parent ends
_REQUEST_S = 30.0  # limit for receiving a request: others wait for it
NUM_FILES = 3  # files sent with a request: stdin, stdout, stderr


def main() -> None:
    """Serves requests until the process PID has ended."""
    path, owner, *names = sys.argv[1:]
    os.fsync = commands.checked_descriptor  # type: ignore[assignment]
    for name in names:
        importlib.import_module(name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.new")
    listener.listen(64)
    os.rename(f"{path}.new", path)
    if os.fork():
        os._exit(0)  # the starter waits for this, and can connect now
    with listener, selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        selector.register(os.pidfd_open(int(owner)), selectors.EVENT_READ)
        _serve(listener, selector)


def _serve(listener: socket.socket, selector: selectors.BaseSelector) -> None:
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                connection = listener.accept()[0]
                connection.settimeout(_REQUEST_S)
                # The client may have ended, or no process could start; serve the next one.
                try:
                    _start(connection, selector)
                except Exception:
                    traceback.print_exc()
                    connection.close()
            elif key.data is None:
                return  # the owner has ended; what still runs ends with this process
            else:
                _report(key, selector)


def _start(connection: socket.socket, selector: selectors.BaseSelector) -> None:
    """Forks the process of a request; answers with its id, and later with its exit status."""
    size = int.from_bytes(_received(connection, 4), "big")
    data, files, _, _ = socket.recv_fds(connection, 1, NUM_FILES)
    try:
        request = json.loads(data + _received(connection, size - 1))
        pid = os.fork()
        if pid == 0:
            try:
                _become(request, files)
            finally:
                os._exit(1)
    finally:
        for file in files:
            os.close(file)
    selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, connection))
    connection.sendall(pid.to_bytes(4, "big"))


def _received(connection: socket.socket, size: int) -> bytes:
    data = connection.recv(size, socket.MSG_WAITALL)
    if len(data) < size:
        raise EOFError("a request was cut off")
    return data


def _report(key: selectors.SelectorKey, selector: selectors.BaseSelector) -> None:
    """Sends the exit status of a process to its client, if the client still exists."""
    pid, connection = key.data
    _, status = os.waitpid(pid, 0)
    selector.unregister(key.fileobj)
    os.close(key.fd)
    with contextlib.suppress(OSError), connection:
        connection.sendall(status.to_bytes(4, "big"))


def _become(request: Mapping[str, Any], files: list[int]) -> None:
    """Turns this process into `python -m MODULE ARGUMENTS`; never returns."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for target, file in enumerate(files):
        os.dup2(file, target)
    os.closerange(NUM_FILES, max(int(name) for name in os.listdir("/proc/self/fd")) + 1)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    tempfile.tempdir = None
    np.random.seed()  # Python reseeds its own generator after a fork
    signal.signal(signal.SIGINT, signal.default_int_handler)
    module = request["module"]
    sys.argv = [module, *request["arguments"]]
    sys.modules.pop(module, None)  # runs again, as `__main__`
    try:
        code = _code_of(module)
    except KeyboardInterrupt:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        raise
    os._exit(code)


def _code_of(module: str) -> int:
    """Runs a module to its end, with the steps of a real exit, and returns the exit code."""
    code: Any = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        code = error.code
    except Exception:
        traceback.print_exc()
        code = 1
    if code is not None and not isinstance(code, int):
        sys.stderr.write(f"{code}\n")
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code or 0


if __name__ == "__main__":
    main()
