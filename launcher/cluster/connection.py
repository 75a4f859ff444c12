"""Connects to a Ray cluster, or starts Ray on this machine.

Hides Ray's own output where Ray has an option for it. Must not depend on what the workers do.
"""

import functools
import json
import logging
import os
import re
import secrets
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any

from flexunet.errors import FlexUNetError, UsageError
from flexunet.native_stderr import suppress_native_stderr
from flexunet.paths import has_secret
from flexunet.process_pool import available_cores
from flexunet.python_path import unsafe_folders

logger = logging.getLogger(__name__)

# Endpoints that all processes must share. Credentials stay on each machine and are never sent.
_PASSED_ON = (
    *("STORAGE_EMULATOR_HOST", "MLFLOW_TRACKING_URI"),
    *("MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"),
)

_TICK_S = 0.1
_SOCKET_BYTES = 107
_LONGEST_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_{pid}/sockets/plasma_store"

_PATIENCE_S = 10.0  # to wait for a start of Ray that was interrupted
_CONNECT_TIMEOUT_S = 10.0

_OBJECT_STORE_BYTES = 100 * 2**20  # results are small; Ray's minimum is 75 MB
_LOOPBACK = ("localhost", "127.0.0.1", "::1")

# Ray's messages about workers that it replaces; errors that matter become a FlexUNetError.
_NOISE = r"A worker died or was killed while executing|retries remaining, so the task will be"


@contextmanager
def connected(address: str | None, *, worker_logs: bool = True) -> Iterator[None]:
    """Connects this process to a Ray cluster for the duration of the block.

    Args:
        address: `HOST:PORT` of the head; `auto`: the cluster that was started on this machine;
            `local`: a new Ray for this block. None: the cluster of RAY_ADDRESS, which Ray Jobs
            sets, else as `local`.
        worker_logs: show the output of the workers.

    Raises:
        UsageError: the address is malformed or has another scheme, or the cluster has other
            versions of Ray or Python, or requires a token.
        FlexUNetError: no cluster answers.
    """
    address, name = _resolved(address)
    is_local = address == "local"
    with _environment(_settings_of_ray(is_local)):
        if is_local:
            _check_temporary_folder()
        else:
            _check_answers(address, name)
        import ray

        logger.info("starting Ray on this machine" if is_local else f"joining Ray at {address}")
        # With a wrong token, Ray's C++ code writes one line per second for 20 s.
        with _one_line_errors(name), suppress_native_stderr(shown_on_error=False):
            _init({"address": address} | _init_options(is_local, worker_logs))
        try:
            yield
        finally:
            ray.shutdown()


def _resolved(address: str | None) -> tuple[str, str]:
    """Returns the address for Ray, and its name in error messages."""
    name = f"--address {address}"
    if address is None:
        address = os.environ.get("RAY_ADDRESS") or "local"
        name = f"RAY_ADDRESS={address}"
    if address in ("auto", "local"):
        return address, name
    scheme, found, _ = address.partition("://")
    if found and scheme in ("http", "https"):
        raise UsageError(
            f"{name}: this is the address of the job server; use it with `flexunet submit`, or "
            "give HOST:PORT of the cluster's head (port 6379)"
        )
    if found:
        raise UsageError(
            f"{name}: {scheme}:// addresses are not supported; submit the command with "
            "`flexunet submit --address http://HOST:8265`"
        )
    match = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:/\s]+):(\d{1,5})", address)
    if match is None or not 0 < int(match[2]) < 2**16:
        raise UsageError(f"{name}: not HOST:PORT, auto or local; Ray's usual port is 6379")
    return address, name


def _settings_of_ray(is_local: bool) -> dict[str, str]:
    """Returns environment variables for Ray, without those that the user has set."""
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS_SKIP_REGEX": _NOISE,
    }
    if is_local and "RAY_AUTH_MODE" not in os.environ:
        # A new Ray requires a token; without this one it would write one into the home folder.
        settings["RAY_AUTH_TOKEN"] = _own_token()
    return {key: value for key, value in settings.items() if key not in os.environ}


def _check_temporary_folder() -> None:
    """Rejects a temporary folder whose path is too long for Ray's sockets in it.

    Source: unix(7): the path of a socket is at most 107 bytes.

    Raises:
        UsageError: the path is too long; names the variable that sets it.
    """
    name = next((each for each in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(each)), None)
    if name is None:
        return
    folder = os.environ[name]
    limit = _SOCKET_BYTES - len(_LONGEST_SOCKET.format(pid=os.getpid()))
    if len(os.fsencode(folder.rstrip("/"))) > limit:
        raise UsageError(
            f"{name}={folder} is too long for the paths of Ray's sockets: {limit} bytes at most; "
            "set RAY_TMPDIR to a shorter path on this machine, such as /tmp"
        )


@functools.cache
def _own_token() -> str:
    # One token per process: Ray reads it once.
    return secrets.token_hex(32)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        # Ray adds its own variables.
        for key in os.environ.keys() - before.keys():
            if key.startswith("RAY_"):
                del os.environ[key]


def _check_answers(address: str, name: str) -> None:
    """Fails within seconds if nothing listens; Ray itself takes minutes and prints its retries."""
    if address == "auto":
        return
    import ray

    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    # Ray replaces a loopback address with the machine's address.
    host = ray.util.get_node_ip_address() if host in _LOOPBACK else host
    try:
        with socket.create_connection((host, int(port)), _CONNECT_TIMEOUT_S) as connection:
            if "RAY_USE_TLS" not in os.environ and not _speaks_grpc(connection):
                raise ConnectionError("the server there is not a Ray head")
    except OSError as error:
        raise FlexUNetError(
            f"{name}: no Ray cluster answers at {host}:{port} ({error}); start one with "
            "`ray start --head`, or correct the address (Ray's usual port is 6379)"
        ) from error


def _speaks_grpc(connection: socket.socket) -> bool:
    """Returns whether the server answers as HTTP/2; the dashboard on port 8265 does not.

    Source: RFC 9113, 3.4: each side starts with a SETTINGS frame (4), the client's after 24 bytes.
    """
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
    return connection.recv(4, socket.MSG_WAITALL)[3:] == b"\x04"


def _init_options(is_local: bool, worker_logs: bool) -> dict[str, Any]:
    from ray.job_config import JobConfig

    # With `_client_job`, Ray does not put the working folder first on the path of the workers.
    # It has no other effect here, and there is no public option.
    job = JobConfig(_client_job=True, _py_driver_sys_path=unsafe_folders())
    options: dict[str, Any] = {
        "job_config": job,
        "logging_level": logging.ERROR,
        "log_to_driver": worker_logs,
        "runtime_env": {"env_vars": _passed_to_workers(is_local)},
    }
    if is_local:
        options |= {
            "include_dashboard": False,
            "num_cpus": available_cores(),
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
    return options


def passed_on(*, is_local: bool = False) -> dict[str, str]:
    """Returns the environment variables that the processes of a cluster get from this one.

    Ray shows and logs them, so an address with a password is not among them. Logs its name.

    Args:
        is_local: whether Ray starts on this machine, where its processes inherit all variables.
    """
    values = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    kept = {name: value for name, value in values.items() if not has_secret(value)}
    if not is_local and "MLFLOW_TRACKING_URI" in values.keys() - kept.keys():
        logger.warning(
            "MLFLOW_TRACKING_URI has a user, a password or a query, so the workers do not get it; "
            "leave them out of the address, and set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD on the workers"
        )
    return kept


def _passed_to_workers(is_local: bool) -> dict[str, str]:
    # The variables of a Ray job already reach its workers, and Ray rejects duplicates.
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    known = (job.get("runtime_env") or {}).get("env_vars") or {}
    return {
        name: value for name, value in passed_on(is_local=is_local).items() if name not in known
    }


def _init(options: dict[str, Any]) -> None:
    """Calls `ray.init` in a separate thread: in the main thread, Ray replaces the SIGTERM handler.

    The thread stays alive, because the processes that Ray starts end with it.
    """
    import ray

    started: Future[None] = Future()

    def work() -> None:
        try:
            ray.init(**options)
        except BaseException as error:
            started.set_exception(error)
        else:
            started.set_result(None)
            threading.Event().wait()

    logging.getLogger("ray._private.worker").setLevel(logging.ERROR)  # it warns about the thread
    threading.Thread(target=work, name="ray", daemon=True).start()
    try:
        while not started.done():
            wait([started], _TICK_S)
            _take_sigterm_back()
        started.result()
    except BaseException:
        # An interrupted start would leave processes behind; but the start may also hang.
        wait([started], _PATIENCE_S)
        ray.shutdown()
        raise


def _take_sigterm_back() -> None:
    """Restores Python's SIGTERM handler; Ray's C++ code replaces it with one that aborts."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


@contextmanager
def _one_line_errors(name: str) -> Iterator[None]:
    from ray.exceptions import AuthenticationError

    try:
        yield
    except (AuthenticationError, ConnectionError) as error:
        if isinstance(error, AuthenticationError) or "InvalidAuthToken" in str(error.__cause__):
            raise UsageError(
                f"{name}: the cluster requires another token; set RAY_AUTH_MODE=token "
                "and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
            ) from error
        raise FlexUNetError(
            f"{name}: no Ray cluster answers ({error}); start one with `ray start --head`, or "
            "correct the address"
        ) from error
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise
        raise UsageError(
            f"{name}: the cluster has other versions of Ray or Python than this machine ({error}); "
            "install the same versions"
        ) from error
