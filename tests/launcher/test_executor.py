"""Calls on workers of a real Ray cluster that fail, die or are cancelled."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.launcher.conftest import PROJECT, RayCluster

pytestmark = pytest.mark.cluster

PRELUDE = """
import json, os, signal, sys, time
from flexunet.errors import ContentError
from flexunet.process_pool import Workers
from launcher.cluster.resources import Resources
from launcher.cluster.connection import connected
from launcher.executors import RayExecutor, RayProcesses

address, folder = sys.argv[1:]

def note(name):
    with open(f"{folder}/{name}", "a") as file:
        file.write("x")

def noted(name):
    path = f"{folder}/{name}"
    return os.path.getsize(path) if os.path.exists(path) else 0

def wait_for(name, count=1, seconds=30):
    deadline = time.monotonic() + seconds
    while noted(name) < count and time.monotonic() < deadline:
        time.sleep(0.05)

"""


def start(code: str, cluster: RayCluster, folder: Path) -> subprocess.Popen[str]:
    body = "with connected(address, worker_logs=False):\n" + textwrap.indent(
        textwrap.dedent(code), "    "
    )
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + body, cluster.address, str(folder)],
        cwd=PROJECT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines_of(code: str, cluster: RayCluster, folder: Path) -> list[str]:
    """Returns the lines that the driver prints; its stderr must be empty."""
    with start(code, cluster, folder) as driver:
        out, error = driver.communicate(timeout=120)
    assert (driver.returncode, error) == (0, "")
    return out.splitlines()


def test_errors_of_a_call_come_back_as_they_were_raised(
    ray_cluster: RayCluster, tmp_path: Path
) -> None:
    code = """
    def fail(error):
        note("calls")
        raise error

    executor = RayExecutor(Resources())
    for error in (ContentError("case_1.png: bad; mend it"), KeyError("key")):
        found = executor.submit(fail, error).exception()
        print(type(found).__name__, found, "in fail" in str(found.__cause__))
    print(noted("calls"))
    """
    assert lines_of(code, ray_cluster, tmp_path) == [
        "ContentError case_1.png: bad; mend it True",
        "KeyError 'key' True",
        "2",  # no retry of either
    ]


def test_a_call_whose_worker_was_killed_runs_again_but_not_for_ever(
    ray_cluster: RayCluster, tmp_path: Path
) -> None:
    code = """
    def die(name, times):
        note(name)
        if noted(name) <= times:
            os.kill(os.getpid(), signal.SIGKILL)
        return "alive"

    executor = RayExecutor(Resources(), max_retries=2)
    print(executor.submit(die, "twice", times=2).result())
    print(executor.submit(die, "always", times=99).exception())
    print(noted("twice"), noted("always"))
    """
    survived, lost, counts = lines_of(code, ray_cluster, tmp_path)
    assert survived == "alive"
    assert lost.startswith("a Ray worker was lost repeatedly (WorkerCrashedError: ")
    assert lost.endswith("perhaps out of memory; the same command continues")
    assert counts == "3 3"


def test_cancelled_calls_stop_or_never_start(ray_cluster: RayCluster, tmp_path: Path) -> None:
    code = """
    def sleep(name):
        note(name)
        while True:  # an interrupt arrives between two steps of Python, not within one
            time.sleep(0.1)

    executor = RayExecutor(Resources())
    running = [executor.submit(sleep, "running") for _ in range(executor.num_workers())]
    wait_for("running", 2)
    waiting = executor.submit(sleep, "waiting")
    print([each.cancel() for each in (waiting, *running)], waiting.cancelled())
    print([executor.submit(abs, -number).result(timeout=60) for number in (3, 4)])
    print(noted("running"), noted("waiting"))
    """
    assert lines_of(code, ray_cluster, tmp_path) == [
        "[True, True, True] True",
        "[3, 4]",  # the two CPUs are free again
        "2 0",
    ]


def test_as_many_calls_wait_as_the_cluster_has_room_for(
    ray_cluster: RayCluster, tmp_path: Path
) -> None:
    code = """
    taken = []

    def tasks():
        for number in range(100):
            taken.append(number)
            yield number

    executor = RayExecutor(Resources())
    workers = Workers(executor, executor.num_workers)
    results = workers.in_order(abs, tasks())
    next(results)
    print(executor.num_workers(), len(taken), flush=True)
    sys.stdin.readline()
    next(results)
    print(executor.num_workers(), len(taken), flush=True)
    print(list(results) == list(range(2, 100)))
    """
    with start(code, ray_cluster, tmp_path) as driver:
        assert driver.stdin is not None and driver.stdout is not None
        # Two for each of the two CPUs, and one that replaces the first.
        assert driver.stdout.readline() == "2 5\n"
        ray_cluster.add_node("third", num_cpus=3)
        try:
            driver.stdin.write("\n")
            driver.stdin.flush()
            # Ten wait, and two were taken out.
            assert driver.stdout.readline() == "5 12\n"
            assert driver.stdout.readline() == "True\n"
            assert driver.wait() == 0
        finally:
            ray_cluster.remove_node("third")


def test_processes_stay_and_are_started_again_when_they_are_killed(
    ray_cluster: RayCluster, tmp_path: Path
) -> None:
    code = """
    def process(meeting):
        note(meeting)
        wait_for(meeting, 2)  # so that one process cannot do both calls
        return os.getpid()

    def die(name, times):
        note(name)
        if noted(name) <= times:
            os.kill(os.getpid(), signal.SIGKILL)
        return "alive"

    def fail(error):
        note("calls")
        raise error

    names = ["CUDA_VISIBLE_DEVICES", "TF_NUM_INTRAOP_THREADS"]
    with RayProcesses(Resources(), 2, max_retries=2) as executor:
        first, second = (
            {each.result() for each in [executor.submit(process, name) for _ in range(2)]}
            for name in ("first", "second")
        )
        print(len(first), first == second)
        print([executor.submit(os.getenv, name).result() for name in names])
        print(executor.submit(fail, ContentError("bad; mend it")).exception(), noted("calls"))
        print(executor.submit(die, "once", times=1).result())
        print(executor.submit(die, "always", times=99).exception())
        print(noted("always") <= 3)
        executor.submit(time.sleep, 600)
        wait_for("never", 1, seconds=1)
    print("done")
    """
    counts, environment, error, survived, lost, few, done = lines_of(code, ray_cluster, tmp_path)
    assert counts == "2 True"
    assert environment == "['', '1']"
    assert error == "bad; mend it 1"
    assert survived == "alive"
    assert lost.startswith("a Ray worker was lost repeatedly (ActorDiedError: ")
    assert (few, done) == ("True", "done")
