"""Tests with real clusters: one of two nodes, and one that ends with its `connected` block."""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from flexunet.errors import FlexUNetError, UsageError
from launcher.cluster import connection
from tests.launcher.conftest import PROJECT, RayCluster

pytestmark = pytest.mark.cluster

# Runs in a separate process: Ray supports one connection per process.
PRELUDE = """
import json, os, signal, sys
from launcher.cluster import connection, node_checks, resources
from launcher.cluster.resources import Resources
from launcher.cluster.connection import connected
address = sys.argv[1]
"""


def run(
    code: str, *arguments: str, folder: Path | str = "/", **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-c", PRELUDE + textwrap.dedent(code), *arguments]
    environment = {"PYTHONPATH": str(PROJECT)} | environment
    return subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True
    )


def test_workers_run_no_file_of_the_working_folder(ray_cluster: RayCluster, tmp_path: Path) -> None:
    for name in ("job", "numpy", "launcher", "cv2", "data_prep", "flexunet"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('this file of the user was run')")
    code = """
    from launcher.executors import RayExecutor
    with connected(address, worker_logs=False):
        executor = RayExecutor(Resources())
        print(executor.submit(len, b"123").result())
        node_checks.check_nodes(Resources())
    """
    done = run(code, ray_cluster.address, folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr[-2000:]


@pytest.mark.parametrize(
    ("address", "remedy"),
    [
        ("ray://head:10001", "flexunet submit --address http://HOST:8265"),
        ("http://head:8265", "the address of the job server"),
        ("head", "not HOST:PORT, auto or local; Ray's usual port is 6379"),
        ("head:70000", "not HOST:PORT"),
        ("head:6379/x", "not HOST:PORT"),
    ],
)
def test_addresses_of_other_kinds_are_refused(
    monkeypatch: pytest.MonkeyPatch, address: str, remedy: str
) -> None:
    with pytest.raises(UsageError, match=f"^--address {address}: .*{remedy}"):
        connection.connected(address).__enter__()
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UsageError, match=f"^RAY_ADDRESS={address}: .*{remedy}"):
        connection.connected(None).__enter__()


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_folder_with_a_long_name_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("TMPDIR", "/tmp")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv(name, f"/tmp/{'x' * 60}")
    with pytest.raises(
        UsageError, match=f"^{name}=/tmp/x+ is too long .* [34][0-9] bytes at most; set "
    ):
        connection.connected(None).__enter__()


def test_an_address_where_nothing_listens_is_one_line_within_seconds() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(FlexUNetError, match=f"^--address {address}: no Ray cluster answers"):
            connection.connected(address).__enter__()
    assert time.monotonic() - started < 60  # Ray alone: two minutes


def test_a_server_of_another_kind_is_no_cluster(storage_server: str) -> None:
    # For example, the port of the dashboard.
    address = storage_server.removeprefix("http://").replace("127.0.0.1", "localhost")
    host, port = "127.0.0.2", address.rpartition(":")[2]
    with pytest.raises(FlexUNetError, match="no Ray cluster answers"):
        connection.connected(f"{host}:{port}").__enter__()
    with socket.create_connection(("127.0.0.1", int(port))) as client:
        assert not connection._speaks_grpc(client)


def test_connected_joins_the_cluster_of_the_address_or_of_the_environment(
    ray_cluster: RayCluster,
) -> None:
    code = """
    with connected(address or None):
        import ray
        sums = resources.worker_slots(Resources())
        sums_of_two = resources.worker_slots(Resources(num_cpus=2))
        seen = ray.get(ray.remote(lambda: os.environ.get("STORAGE_EMULATOR_HOST")).remote())
        ask = ray.remote(lambda: [resources.node_share(n) for n in (0.5, 1, 2)])
        shares = ray.get(ask.remote())
    print(json.dumps([sorted(sums.values()), sums_of_two, seen, shares]))
    """
    place = ray_cluster.address
    for arguments, environment in [((place,), {}), (("",), {"RAY_ADDRESS": place})]:
        done = run(code, *arguments, STORAGE_EMULATOR_HOST="http://emulator", **environment)
        assert done.returncode == 0, done.stderr
        # Two nodes of one CPU.
        assert done.stdout == '[[1, 1], {}, "http://emulator", [0.5, 1.0, 1.0]]\n'
        assert done.stderr == ""


def test_a_busy_cluster_says_what_is_free(ray_cluster: RayCluster) -> None:
    code = """
    with connected(address):
        import ray
        print(*(resources.described_shortage(Resources(), n) for n in (2, 3)))
        busy = ray.remote(num_cpus=1)(type("Busy", (), {"here": lambda self: None})).remote()
        ray.get(busy.here.remote())
        while ray.available_resources()["CPU"] > 1:
            pass
        print(*(resources.described_shortage(Resources(), n) for n in (1, 2)))
    """
    done = run(code, ray_cluster.address)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "None 2 of 2 CPUs, 0 of 0 GPUs",
        "None 1 of 2 CPUs, 0 of 0 GPUs",
    ]


def test_connected_without_an_address_starts_its_own_and_leaves_nothing(
    ray_cluster: RayCluster,
) -> None:
    code = """
    import ray
    signal.signal(signal.SIGTERM, lambda *_: print("terminated"))
    with connected(None):
        print(ray.get_runtime_context().gcs_address)
        os.kill(os.getpid(), signal.SIGTERM)
        ray.get(ray.remote(lambda: None).remote())
        print(os.environ["RAY_AUTH_MODE"])
    print(os.environ.get("RAY_AUTH_MODE"))
    """
    before = raylets(ray_cluster.folder)
    assert len(before) == 2
    # Ray looks for a running cluster in RAY_TMPDIR; a home folder may be read-only.
    environment = {"RAY_TMPDIR": ray_cluster.folder, "HOME": "/nonexistent"}
    done = run(code, "", RAY_ADDRESS="", **environment)
    assert done.returncode == 0, done.stderr
    address, *rest = done.stdout.splitlines()
    assert address != ray_cluster.address
    # Without a token, every user of this machine could run code as this user.
    assert rest == ["terminated", "token", "None"]
    assert done.stderr == ""
    assert raylets(ray_cluster.folder) == before


def test_a_killed_command_takes_its_own_ray_with_it() -> None:
    code = """
    with connected("local"):
        print("ready", flush=True)
        signal.pause()
    """
    folder = tempfile.mkdtemp(prefix="flexunet-ray-")
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(code), ""]
    environment = os.environ | {"RAY_TMPDIR": folder}
    with subprocess.Popen(
        command, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        ready = process.stdout.readline()
        found = len(raylets(folder))
        process.kill()
    assert (ready, found) == ("ready\n", 1)
    deadline = time.monotonic() + 30
    while raylets(folder):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    shutil.rmtree(folder)


def raylets(folder: str) -> set[int]:
    """Returns the process ids of the nodes whose sockets are in `folder`."""
    return {
        each.pid
        for each in psutil.process_iter(["name", "cmdline"])
        if each.info["name"] == "raylet" and folder in " ".join(each.info["cmdline"] or ())
    }


CHECK = """
from flexunet.errors import UsageError
demand = Resources(num_cpus=float(sys.argv[2]))
with connected(address):
    try:
        node_checks.check_nodes(demand, reads=sys.argv[3:4], writes=sys.argv[4:])
    except UsageError as error:
        print(error)
"""


def test_check_nodes_accepts_folders_that_all_nodes_see(
    ray_cluster: RayCluster, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "image.png").write_bytes(b"1")
    done = run(CHECK, ray_cluster.address, "1", str(tmp_path / "in"), str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_check_nodes_names_the_node_that_sees_another_folder(ray_cluster: RayCluster) -> None:
    # Each process has its own folder there, like nodes with a folder on their own disk.
    done = run(CHECK, ray_cluster.address, "1", "/proc/self/task")
    problem = (
        "/proc/self/task is not the same folder there as on this machine; use gs:// or a folder"
    )
    assert re.match(rf"Ray node [\d.]+: {problem} that all nodes mount", done.stdout), done.stderr


def test_check_nodes_wants_the_same_version_everywhere(
    ray_cluster: RayCluster, tmp_path: Path
) -> None:
    other = tmp_path / "other" / "flexunet-9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: flexunet\nVersion: 9.9\n")
    broken = tmp_path / "broken" / "launcher"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('no launcher here')")
    for folder, problem in [
        ("other", "flexunet 9.9 is installed there and"),
        ("broken", "flexunet cannot be imported there (no launcher here); install flexunet"),
    ]:
        path = str(tmp_path / folder)
        ray_cluster.add_node("third", num_cpus=2, env_vars={"PYTHONPATH": path})
        try:
            done = run(CHECK, ray_cluster.address, "2", str(tmp_path))
        finally:
            ray_cluster.remove_node("third")
        assert done.stdout.startswith("Ray node "), done.stderr
        assert problem in done.stdout


def test_a_wrong_token_is_one_line() -> None:
    folder = tempfile.mkdtemp(prefix="flexunet-ray-")
    # Ray tries a token 20 times, once a second.
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_TMPDIR": folder,
        "RAY_NUM_REDIS_GET_RETRIES": "3",
    }
    code = """
    import ray
    with connected("local"):
        print(ray.get_runtime_context().gcs_address, flush=True)
        sys.stdin.readline()
    """
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(code), ""]
    with subprocess.Popen(
        command,
        cwd=PROJECT,
        env=os.environ | environment | {"RAY_AUTH_TOKEN": "a" * 32},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        address = server.stdout.readline().strip()
        done = run(
            """
            from flexunet.errors import UsageError
            try:
                connected(address).__enter__()
            except UsageError as error:
                print(error)
            """,
            address,
            **environment | {"RAY_AUTH_TOKEN": "b" * 32},
        )
        server.stdin.write("\n")
    shutil.rmtree(folder)
    assert done.stdout.startswith(f"--address {address}: the cluster requires another token"), done
    assert done.stderr == ""
