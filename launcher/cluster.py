"""The Ray cluster that a command works on: reached or started, and fit for the work.

Ray's own lines stay out of the terminal where it has an option for that. This module must not know
what the workers do.
"""

import contextlib
import functools
import importlib.metadata
import json
import logging
import os
import pickle
import re
import secrets
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from flexunet.errors import FlexUNetError, UsageError
from flexunet.native_stderr import held_back_stderr
from flexunet.process_pool import available_cores
from flexunet.python_path import unsafe_folders
from flexunet.storage import Store, open_source, open_store
from flexunet.text import counted

logger = logging.getLogger(__name__)

# Endpoints that every process must share. Credentials are each machine's own: they are never sent.
PASSED_ON = ("STORAGE_EMULATOR_HOST",)

_TICK_S = 0.1
_NODES_TICK_S = 0.5
_SOCKET_BYTES = 107
_LONGEST_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_{pid}/sockets/plasma_store"
_PATIENCE_S = 10.0  # with a start of Ray that is no longer wanted
_CONNECT_TIMEOUT_S = 10.0
_PROBE_TIMEOUT_S = 120.0  # a worker process may have to start, and import from a slow disk
_OBJECT_STORE_BYTES = 100 * 2**20  # results are small; Ray's minimum is 75 MB
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
# What Ray prints of workers that it replaces; an error that matters reaches the user as ours.
_NOISE = r"A worker died or was killed while executing|retries remaining, so the task will be"


@dataclass(frozen=True)
class Demand:
    """What one worker takes of one node."""

    num_cpus: float = 1
    num_gpus: float = 0
    memory_bytes: int = 0

    def __str__(self) -> str:
        parts = [counted(self.num_cpus, "CPU"), counted(self.num_gpus, "GPU")]
        if self.memory_bytes:
            parts.append(f"{self.memory_bytes / 1e9:.1f} GB")
        return ", ".join(parts)


@contextmanager
def connected(address: str | None, *, worker_logs: bool = True) -> Iterator[None]:
    """Connects this process to a Ray cluster for the time of the block.

    Args:
        address: `HOST:PORT` of the head; `auto`: the cluster that was started on this machine;
            `local`: a Ray of this block's own. None: the cluster of RAY_ADDRESS, which Ray Jobs
            sets, else as `local`.
        worker_logs: show what the workers print.

    Raises:
        UsageError: the address is malformed or of another kind, or the cluster has other versions
            of Ray or Python, or asks for a token.
        FlexUNetError: nothing answers there.
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
        # With a wrong token Ray's C++ part writes a line a second for 20 s.
        with _one_line_errors(name), held_back_stderr(shown_on_error=False):
            _init({"address": address} | _init_options(is_local, worker_logs))
        try:
            yield
        finally:
            ray.shutdown()


def places(demand: Demand) -> dict[str, int]:
    """Returns how many workers fit on each alive node that holds at least one, by node id."""
    import ray

    counts = {}
    for node in ray.nodes():
        if node["Alive"] and (count := _fitting(node["Resources"], demand)):
            counts[node["NodeID"]] = count
    return counts


def require_places(demand: Demand, num_workers: int = 1) -> dict[str, int]:
    """Returns `places(demand)`, which hold at least `num_workers`.

    Raises:
        UsageError: they do not; without this, Ray would wait for such nodes for ever.
    """
    found = places(demand)
    total = sum(found.values())
    if total < num_workers:
        raise UsageError(
            f"{counted(num_workers, 'worker')} of {demand} each, and the cluster has room for "
            f"{total}: {_described_nodes()}; ask for less, add nodes, or "
            "give --wait-for-nodes"
        )
    return found


def wait_for_places(demand: Demand, num_workers: int, timeout_s: float) -> None:
    """Waits until the cluster has room for `num_workers`; its autoscaler is told of them.

    Raises:
        FlexUNetError: there is none within `timeout_s`.
    """
    from ray.autoscaler.sdk import request_resources

    if sum(places(demand).values()) >= num_workers:
        return
    logger.warning(
        "the cluster has no room for %s of %s each (%s); waiting for %g s (--join-timeout)",
        *(counted(num_workers, "worker"), demand, _described_nodes() or "no node", timeout_s),
    )
    # Ray's autoscaler counts only what tasks ask for, and none is submitted yet.
    needs = {"CPU": demand.num_cpus, "GPU": demand.num_gpus, "memory": demand.memory_bytes}
    asked = {name: amount for name, amount in needs.items() if amount}
    with contextlib.suppress(Exception):  # a cluster without an autoscaler
        request_resources(bundles=[asked] * num_workers)
    end = time.monotonic() + timeout_s
    try:
        while sum(places(demand).values()) < num_workers:
            if time.monotonic() > end:
                raise FlexUNetError(
                    f"no room for {counted(num_workers, 'worker')} of {demand} each within "
                    f"{timeout_s:g} s (--join-timeout): {_described_nodes() or 'no node'}; the "
                    "same command tries again"
                )
            time.sleep(_NODES_TICK_S)
    finally:
        with contextlib.suppress(Exception):
            request_resources(bundles=[])


def described_shortage(demand: Demand, num_workers: int) -> str | None:
    """Returns in words what is free now, None where `num_workers` workers could start at once."""
    import ray

    free = ray.available_resources()
    needs = {"CPU": demand.num_cpus, "GPU": demand.num_gpus, "memory": demand.memory_bytes}
    if all(free.get(name, 0.0) + 1e-6 >= num_workers * amount for name, amount in needs.items()):
        return None
    return ", ".join(
        f"{free.get(name, 0.0):g} of {counted(total(name), name)}" for name in ("CPU", "GPU")
    )


def total(resource: str) -> float:
    """Returns how much of `resource` (CPU, GPU, ...) all nodes have together."""
    import ray

    return float(ray.cluster_resources().get(resource, 0.0))


def widest(num_workers: int, *, num_gpus: float = 0) -> Demand:
    """Returns the demand of `num_workers` workers that have as many whole cores as all can have.

    At least one core each, where there is room for fewer workers too.
    """
    num_cpus = 1
    while sum(places(Demand(num_cpus + 1, num_gpus)).values()) >= num_workers:
        num_cpus += 1
    return Demand(num_cpus, num_gpus)


def check_nodes(demand: Demand, *, reads: Sequence[str] = (), writes: Sequence[str] = ()) -> None:
    """Checks that every node where a worker fits has this flexunet, and sees our local folders.

    Args:
        reads: URLs that hold something already. writes: URLs where workers put something. Those
            that are not local folders are not looked at.

    Raises:
        UsageError: a node is unfit, or there is none; names the node.
    """
    version = importlib.metadata.version("flexunet")
    with _witnesses(reads, writes) as witnesses:
        problems = _ask_nodes(list(require_places(demand)), version, witnesses)
    for node, problem in problems:
        if problem:
            raise UsageError(f"Ray node {node}: {problem}")


def described_resources() -> str:
    """Returns what the cluster has in all, in words: `8 CPUs, 1 GPU on 2 nodes`."""
    import ray

    total = ray.cluster_resources()
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    parts = counted(total.get("CPU", 0), "CPU"), counted(total.get("GPU", 0), "GPU")
    return f"{', '.join(parts)} on {counted(num_nodes, 'node')}"


# Connecting


def _resolved(address: str | None) -> tuple[str, str]:
    """Returns the address that Ray is given, and what errors call it."""
    name = f"--address {address}"
    if address is None:
        address = os.environ.get("RAY_ADDRESS") or "local"
        name = f"RAY_ADDRESS={address}"
    if address in ("auto", "local"):
        return address, name
    scheme, found, _ = address.partition("://")
    if found and scheme in ("http", "https"):
        raise UsageError(
            f"{name}: that is the address of the job server; use it with `flexunet submit`, or "
            "give HOST:PORT of the cluster's head (port 6379)"
        )
    if found:
        raise UsageError(
            f"{name}: {scheme}:// addresses are not supported; hand the command to the cluster "
            "with `flexunet submit --address http://HOST:8265`"
        )
    match = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:/\s]+):(\d{1,5})", address)
    if match is None or not 0 < int(match[2]) < 2**16:
        raise UsageError(f"{name}: not HOST:PORT, auto or local; Ray's usual port is 6379")
    return address, name


def _settings_of_ray(is_local: bool) -> dict[str, str]:
    """Returns the environment variables that Ray reads and that the user has not set."""
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS_SKIP_REGEX": _NOISE,
    }
    if is_local and "RAY_AUTH_MODE" not in os.environ:
        # A new Ray asks for a token; without one it would put one into the home folder.
        settings["RAY_AUTH_TOKEN"] = _own_token()
    return {key: value for key, value in settings.items() if key not in os.environ}


def _check_temporary_folder() -> None:
    """Refuses a folder whose name leaves no room for those of Ray's sockets in it.

    Source: unix(7): the path of a socket is at most 107 bytes.

    Raises:
        UsageError: names the variable that says where it is.
    """
    name = next((each for each in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(each)), None)
    if name is None:
        return
    folder = os.environ[name]
    limit = _SOCKET_BYTES - len(_LONGEST_SOCKET.format(pid=os.getpid()))
    if len(os.fsencode(folder.rstrip("/"))) > limit:
        raise UsageError(
            f"{name}={folder} is too long for the names of Ray's sockets: {limit} bytes at most; "
            "set RAY_TMPDIR to a shorter folder of this machine, as /tmp"
        )


@functools.cache
def _own_token() -> str:
    # One for each process: Ray reads it once.
    return secrets.token_hex(32)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        # Ray adds variables of its own.
        for key in os.environ.keys() - before.keys():
            if key.startswith("RAY_"):
                del os.environ[key]


def _check_answers(address: str, name: str) -> None:
    """Tells in seconds that nothing listens; Ray itself takes minutes and prints its retries."""
    if address == "auto":
        return
    import ray

    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    # Ray replaces the loopback address by that of the machine.
    host = ray.util.get_node_ip_address() if host in _LOOPBACK else host
    try:
        with socket.create_connection((host, int(port)), _CONNECT_TIMEOUT_S) as connection:
            if "RAY_USE_TLS" not in os.environ and not _speaks_grpc(connection):
                raise ConnectionError("another kind of server listens there")
    except OSError as error:
        raise FlexUNetError(
            f"{name}: no Ray cluster answers at {host}:{port} ({error}); start one with "
            "`ray start --head`, or correct the address (Ray's usual port is 6379)"
        ) from error


def _speaks_grpc(connection: socket.socket) -> bool:
    """Returns whether the server greets as HTTP/2 does: the dashboard's, on port 8265, does not.

    Source: RFC 9113, 3.4: each side starts with a SETTINGS frame (4), the client's after 24 bytes.
    """
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
    return connection.recv(4, socket.MSG_WAITALL)[3:] == b"\x04"


def _init_options(is_local: bool, worker_logs: bool) -> dict[str, Any]:
    from ray.job_config import JobConfig

    # The job of a "client" is one for which Ray does not put the working folder before all others
    # on the path of the workers; the name has no other effect here, and there is no public form.
    job = JobConfig(_client_job=True, _py_driver_sys_path=unsafe_folders())
    options: dict[str, Any] = {
        "job_config": job,
        "logging_level": logging.ERROR,
        "log_to_driver": worker_logs,
        "runtime_env": {"env_vars": _passed_on()},
    }
    if is_local:
        options |= {
            "include_dashboard": False,
            "num_cpus": available_cores(),
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
    return options


def _passed_on() -> dict[str, str]:
    # A job's own variables reach its workers already, and Ray refuses to be told them twice.
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    known = (job.get("runtime_env") or {}).get("env_vars") or {}
    names = [name for name in PASSED_ON if name in os.environ and name not in known]
    return {name: os.environ[name] for name in names}


def _init(options: dict[str, Any]) -> None:
    """Calls `ray.init` in a thread of its own: in the main one Ray takes SIGTERM for itself.

    The thread stays, as the processes that Ray starts end with it.
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

    logging.getLogger("ray._private.worker").setLevel(logging.ERROR)  # it warns of just that
    threading.Thread(target=work, name="ray", daemon=True).start()
    try:
        while not started.done():
            wait([started], _TICK_S)
            _take_sigterm_back()
        started.result()
    except BaseException:
        # Stopped half-way, it would leave processes behind; but it may also hang.
        wait([started], _PATIENCE_S)
        ray.shutdown()
        raise


def _take_sigterm_back() -> None:
    """Puts Python's handler of SIGTERM back in place of that of Ray's C++ part, which aborts."""
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
                f"{name}: the cluster asks for another token than ours; set RAY_AUTH_MODE=token "
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
            "install the same"
        ) from error


# Nodes


def _fitting(resources: dict[str, float], demand: Demand) -> int:
    needs = {"CPU": demand.num_cpus, "GPU": demand.num_gpus, "memory": demand.memory_bytes}
    counts = [resources.get(name, 0.0) / amount for name, amount in needs.items() if amount]
    return int(min(counts, default=1) + 1e-6)  # 1 / 0.1 may be 9.999...


def _described_nodes() -> str:
    import ray

    described = [
        f"{node['NodeManagerAddress']} has {counted(node['Resources'].get('CPU', 0), 'CPU')}, "
        f"{counted(node['Resources'].get('GPU', 0), 'GPU')}, "
        f"{node['Resources'].get('memory', 0) / 1e9:.1f} GB"
        for node in ray.nodes()
        if node["Alive"]
    ]
    more = f" and {len(described) - 3} more" if len(described) > 3 else ""
    return "; ".join(described[:3]) + more


@dataclass(frozen=True)
class _Witness:
    """An object by which a node can tell that its folder is ours."""

    url: str
    name: str
    size: int


@contextmanager
def _witnesses(reads: Sequence[str], writes: Sequence[str]) -> Iterator[list[_Witness]]:
    """Yields one witness for each local folder; where we write, one of a name nobody else has."""
    found = [witness for url in reads if (witness := _first_object(open_source(url)))]
    put: list[tuple[Store, str]] = []
    try:
        for store in (open_store(url) for url in writes):
            if store.local_root is not None:
                name = f"flexunet-probe-{uuid.uuid4().hex}"
                put.append((store, name))
                found.append(_Witness(store.url, name, store.put(name, name.encode()).size))
        yield found
    finally:
        for store, name in put:
            store.delete(name)


def _first_object(store: Store) -> _Witness | None:
    if store.local_root is None:
        return None
    stats = store.list()
    return _Witness(store.url, stats[0].name, stats[0].size) if stats else None


def folder_problem(witnesses: Sequence[_Witness]) -> str | None:
    """Returns why this machine does not see the folders of the command's, None when it does."""
    for witness in witnesses:
        stat = open_source(witness.url).stat(witness.name)
        if stat is None or stat.size != witness.size:
            return (
                f"{witness.url} is not the folder that this machine has there; use gs:// or a "
                "folder that all nodes mount at this path"
            )
    return None


def _probe() -> Callable[[str, bytes], str | None]:
    """Returns what is run on each node; a closure is sent whole, as the package may be missing."""

    def probe(version: str, witnesses: bytes) -> str | None:
        import importlib.metadata
        import pickle

        try:
            found = importlib.metadata.version("flexunet")
            from launcher.cluster import folder_problem
        except ImportError as error:
            return f"flexunet cannot be imported there ({error}); install flexunet {version}"
        if found != version:
            return f"flexunet {found} is installed there and {version} here; install the same"
        return folder_problem(pickle.loads(witnesses))  # noqa: S301 (of our own driver)

    return probe


def _ask_nodes(
    node_ids: Sequence[str], version: str, witnesses: Sequence[_Witness]
) -> list[tuple[str, str | None]]:
    """Returns the address of each node and what is wrong with it; all are asked at once."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote = ray.remote(num_cpus=0, max_retries=1)(_probe())
    refs = {
        node_id: remote.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
        ).remote(version, pickle.dumps(witnesses))
        for node_id in node_ids
    }
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    return [(addresses[node_id], _answer(ref)) for node_id, ref in refs.items()]


def _answer(ref: Any) -> str | None:
    import ray
    from ray.exceptions import GetTimeoutError, RayError, RayTaskError

    try:
        problem: str | None = ray.get(ref, timeout=_PROBE_TIMEOUT_S)
    except GetTimeoutError:
        return f"no worker process started there within {_PROBE_TIMEOUT_S:g} s; look at its logs"
    except RayTaskError as error:
        return f"it cannot work ({error.cause})"
    except RayError as error:
        return f"it was lost ({error})"
    return problem
