"""Training processes of a cluster on this machine, as `TF_CONFIG` describes it."""

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from flexunet.storage import open_store
from job.runs.checkpoints import find_checkpoints
from tests import commands

Running = subprocess.Popen[str] | commands.Process

PROJECT = Path(__file__).resolve().parents[2]


def free_addresses(count: int) -> list[str]:
    """Returns `count` addresses of this machine at which nothing listens."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    return addresses


def training(arguments: Sequence[str], stop_after: int | None = None) -> list[str]:
    """Returns the words of one training process; it may send itself a SIGTERM after a step."""
    module = ["job.train"] if stop_after is None else ["tests.job.stopping", str(stop_after)]
    return [*module, "--no-progress", "--threads", "1", *arguments]


def start_rank(
    rank: int,
    addresses: Sequence[str],
    arguments: Sequence[str],
    stop_after: int | None = None,
    code: str | None = None,
) -> commands.Process:
    """Starts one process of a cluster; it runs `job.train`, or the program `code`."""
    config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}}
    words = training(arguments, stop_after)
    if code is not None:
        words = ["tests.script", "-c", code, *arguments]
    return commands.start(*words, environment=os.environ | {"TF_CONFIG": json.dumps(config)})


def start_cluster(
    size: int,
    arguments: Sequence[str],
    stop_after: int | None = None,
    code: str | None = None,
) -> list[commands.Process]:
    """Starts `size` processes that train together; the last may be stopped after so many steps."""
    addresses = free_addresses(size)
    return [
        start_rank(rank, addresses, arguments, stop_after if rank == size - 1 else None, code)
        for rank in range(size)
    ]


def run_alone(arguments: Sequence[str], *, stop_after: int | None = None) -> None:
    """Trains in one process to the end, or to a SIGTERM after so many new steps."""
    done = commands.run(*training(["--local", *arguments], stop_after))
    assert done.returncode == (0 if stop_after is None else 6), done.stderr


def wait_until(
    predicate: Callable[[], bool], processes: Sequence[Running], timeout: float = 120
) -> None:
    """Waits until `predicate` holds.

    Raises:
        AssertionError: a process ended before, or the time is over.
    """
    deadline = time.monotonic() + timeout
    while not predicate():
        for process in processes:
            assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def weights_of(run: Path | str) -> dict[str, np.ndarray]:
    """Returns the weights of a run's newest checkpoint by name; `run` is a folder or a URL."""
    import io

    import h5py

    store = open_store(str(run))
    ref = max(find_checkpoints(store))
    arrays: dict[str, np.ndarray] = {}

    def keep(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            arrays[name] = item[()]

    with h5py.File(io.BytesIO(store.get(f"{ref.prefix}/model.weights.h5"))) as file:
        file.visititems(keep)
    return arrays


def finish(processes: Sequence[Running], timeout: float = 200) -> list[str]:
    """Waits for all processes and returns what each wrote to stderr."""
    return [process.communicate(timeout=timeout)[1] for process in processes]
