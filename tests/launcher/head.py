"""Starts a Ray cluster and its job server with `ray start`, as a user does by hand."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import requests

from tests.launcher.conftest import PROJECT

# Starts a job with a command that no user could submit.
_START = """
import sys
from launcher.jobs.client import JobsConfig, connect, start
address, job_id, entrypoint, seconds = sys.argv[1:]
client = connect(JobsConfig(address=address))
start(client, job_id=job_id, entrypoint=entrypoint, stop_timeout_s=int(seconds))
"""


@dataclass
class Head:
    """A running Ray head.

    Attributes:
        address: URL of its job server.
        token: the token that it requires, None if it is open.
        environment: the variables that a user sets for access.
    """

    address: str
    token: str | None
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    def start(self, entrypoint: str, *, stop_timeout_s: int) -> str:
        """Starts a job as `flexunet submit` does, and returns its id."""
        job_id = f"test-{secrets.token_hex(4)}"
        words = [self.address, job_id, entrypoint, str(stop_timeout_s)]
        command = [sys.executable, "-c", _START, *words]
        subprocess.run(command, cwd=PROJECT, env=os.environ | self.environment, check=True)
        return job_id

    def post(self, entrypoint: str) -> str:
        """Starts a job with a plain HTTP request, which is faster, and returns its id."""
        job = {"entrypoint": entrypoint}
        answer = requests.post(
            f"{self.address}/api/jobs/", json=job, headers=self.headers, timeout=60
        )
        answer.raise_for_status()
        return str(answer.json()["submission_id"])

    def ask(self, path: str) -> Any:
        """Returns the answer of the job server."""
        answer = requests.get(f"{self.address}{path}", headers=self.headers, timeout=30)
        answer.raise_for_status()
        return answer.json()

    def num_nodes(self) -> int:
        """Returns how many nodes are alive."""
        nodes = self.ask("/nodes?view=summary")["data"]["summary"]
        return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)

    def wait_for(self, job_id: str, text: str) -> None:
        """Waits until the log of a job has `text`."""
        deadline = time.monotonic() + 60
        while text not in self.ask(f"/api/jobs/{job_id}/logs")["logs"]:
            assert time.monotonic() < deadline
            time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def ray_head(token: str | None, *, num_nodes: int = 1) -> Iterator[Head]:
    """Yields a head that `ray start` started, possibly with more nodes.

    Args:
        token: the token that it requires; None: it is open.
        num_nodes: nodes of one CPU each, the head included.
    """
    # Not under pytest's folder: the path of a Unix socket is 107 bytes at most.
    folder = Path(tempfile.mkdtemp(prefix="flexunet-ray-"))
    try:
        head, nodes = _started_after_all(folder, token, num_nodes)
        try:
            yield head
        finally:
            _end(nodes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _started_after_all(
    folder: Path, token: str | None, num_nodes: int
) -> tuple[Head, list[psutil.Popen]]:
    """Returns the result of `_started`, with up to three tries."""
    for number in range(2):
        with contextlib.suppress(AssertionError):
            return _started(folder / str(number), token, num_nodes)
    return _started(folder / "2", token, num_nodes)


def _started(folder: Path, token: str | None, num_nodes: int) -> tuple[Head, list[psutil.Popen]]:
    """Returns a head and the processes of `ray start`, which use the new folder `folder`.

    Raises:
        AssertionError: one of them ended, or did not answer; contains their log.
    """
    folder.mkdir()
    access = {"RAY_AUTH_MODE": "disabled"}
    if token is not None:
        (folder / "token").write_text(token)
        access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    port, gcs = free_port(), free_port()  # other programs may take them before Ray does
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    others = {
        "node-ip-address": "127.0.0.1",
        "dashboard-agent-listen-port": 0,
        "num-cpus": 1,
        "object-store-memory": 80_000_000,
    }
    first = {
        "port": gcs,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": port,
        "ray-client-server-port": free_port(),
        "min-worker-port": 0,
        "max-worker-port": 0,
        "temp-dir": folder / "ray",
    }
    environment = os.environ | access | {"RAY_USAGE_STATS_ENABLED": "0", "PATH": programs}
    environment.pop("STORAGE_EMULATOR_HOST", None)

    def start(*words: str, **settings: Any) -> psutil.Popen:
        words += tuple(f"--{name}={value}" for name, value in settings.items())
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *words]
        return psutil.Popen(command, env=environment, stdout=log, stderr=log)

    head = Head(f"http://127.0.0.1:{port}", token, access)
    with (folder / "log").open("wb") as log:
        nodes = [start("--head", **others, **first)]
        try:
            _wait_for(head, lambda: head.ask("/api/version"), nodes, folder / "log")
            nodes += [start(**others, address=f"127.0.0.1:{gcs}") for _ in range(num_nodes - 1)]
            _wait_for(head, lambda: head.num_nodes() == num_nodes, nodes, folder / "log")
            return head, nodes
        except BaseException:
            _end(nodes)
            raise


def _end(nodes: list[psutil.Popen]) -> None:
    processes: list[psutil.Process] = []
    for node in reversed(nodes):
        with contextlib.suppress(psutil.NoSuchProcess):  # a node that could not start
            processes += [node, *node.children(recursive=True)]
            node.terminate()
    psutil.wait_procs(processes, timeout=15)
    for each in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(nodes, timeout=15)


def _wait_for(
    head: Head, is_there: Callable[[], Any], nodes: list[psutil.Popen], log: Path
) -> None:
    deadline = time.monotonic() + 180
    while True:
        running = all(node.poll() is None for node in nodes)
        assert running and time.monotonic() < deadline, log.read_text()
        with contextlib.suppress(OSError):
            if is_there():
                return
        time.sleep(0.2)
