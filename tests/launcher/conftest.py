"""Starts a Ray cluster of two nodes on this machine, once per test process.

The cluster and the commands under test run in separate processes, so that what Ray leaves in a
process (signal handlers, settings that are read once) does not affect the next test.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import psutil
import pytest

from tests import commands
from tests.job.conftest import trained_run

__all__ = ["trained_run"]

PROJECT = Path(__file__).resolve().parents[2]
Launch = Callable[..., subprocess.CompletedProcess[str]]
_OBJECT_STORE_BYTES = 80_000_000  # Ray's smallest is 75 MB
_TWO_NODES = MappingProxyType({"head": 1, "second": 1})
_NO_VARIABLES = MappingProxyType[str, str]({})

# Reads one line of JSON per request and answers with one; stops all nodes when stdin ends.
_SERVER = """
import json, sys
from ray.cluster_utils import Cluster
cluster = Cluster()
nodes = {}
for line in sys.stdin:
    name, options = json.loads(line)
    if isinstance(options, bool):
        cluster.remove_node(nodes.pop(name), allow_graceful=not options)
    else:
        nodes[name] = cluster.add_node(**options)
    print(json.dumps(cluster.address), flush=True)
cluster.shutdown()
"""


class RayCluster:
    """A Ray cluster to which a test adds nodes and from which it removes them."""

    def __init__(self, requests: IO[str], answers: IO[str], folder: str, pid: int) -> None:
        self._requests, self._answers = requests, answers
        self.pid = pid  # of the process whose children are the nodes
        self.folder = folder  # of its logs and sockets, its RAY_TMPDIR
        self.address = ""  # host:port of the head

    def add_node(self, name: str, *, num_cpus: int = 1, **options: Any) -> None:
        """Starts a node; the first is the head. `options` are those of `Cluster.add_node`."""
        options |= {"num_cpus": num_cpus, "object_store_memory": _OBJECT_STORE_BYTES}
        self.address = self._ask(name, {"include_dashboard": False} | options)

    def remove_node(self, name: str, *, kill: bool = False) -> None:
        """Removes a node; the cluster notices a killed one only after some seconds."""
        self._ask(name, kill)

    def _ask(self, *request: Any) -> str:
        self._requests.write(json.dumps(request) + "\n")
        self._requests.flush()
        answer = self._answers.readline()
        assert answer, "the Ray cluster has ended"
        return str(json.loads(answer))


@contextlib.contextmanager
def started_cluster(
    nodes: Mapping[str, int] = _TWO_NODES,
    *,
    user: Sequence[str] = (),
    variables: Mapping[str, str] = _NO_VARIABLES,
) -> Iterator[RayCluster]:
    """Yields a running cluster.

    Args:
        nodes: the CPUs of each node by name; the first is the head.
        user: words before its command that run it as another user.
        variables: additional environment variables.
    """
    # Not under pytest's folder: the path of a Unix socket is 107 bytes at most.
    folder = tempfile.mkdtemp(prefix="flexunet-ray-")
    os.chmod(folder, 0o1777)  # noqa: S103 (like /tmp)
    environment = os.environ | {"RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0"}
    # So that a test checks that the command sends it to the workers.
    environment.pop("STORAGE_EMULATOR_HOST", None)
    environment |= variables
    with subprocess.Popen(
        [*user, sys.executable, "-c", _SERVER],
        cwd=PROJECT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        cluster = RayCluster(server.stdin, server.stdout, folder, server.pid)
        for name, num_cpus in nodes.items():
            cluster.add_node(name, num_cpus=num_cpus)
        yield cluster
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayCluster]:
    """Yields the cluster that all tests share."""
    with started_cluster() as cluster:
        yield cluster


def ray_processes(folder: str, title: str) -> list[psutil.Process]:
    """Returns the worker processes that run `title` for the Ray with the RAY_TMPDIR `folder`."""
    found = []
    for each in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            parent = each.parent()
            if " ".join(each.cmdline()).startswith(f"ray::{title}") and parent is not None:
                found += [each] if folder in " ".join(parent.cmdline()) else []
    return found


@pytest.fixture
def flexunet(tmp_path: Path) -> Launch:
    """Returns a function that runs the `flexunet` command in an empty folder."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()

    def run(*arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
        words = ["launcher.cli", *map(str, arguments)]
        return commands.run(*words, folder=folder, environment=os.environ | environment)

    return run
