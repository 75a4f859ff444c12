"""The fork server's processes behave like those of `subprocess`."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests import commands

_SCRIPT = """
import json, os, signal, sys, time
print(json.dumps([sys.argv[1:], os.getcwd(), os.environ.get("COLOUR"), __name__]))
print("to stderr", file=sys.stderr)
case = sys.argv[1]
if case == "code":
    sys.exit(7)
if case == "text":
    sys.exit("a reason")
if case == "error":
    raise ValueError("broken")
if case == "interrupt":
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
if case == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if case == "wait":
    print("waiting", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def environment() -> dict[str, str]:
    return os.environ | {"COLOUR": "blue"}


@pytest.fixture
def script(tmp_path: Path) -> str:
    (tmp_path / "script.py").write_text(_SCRIPT)
    return str(tmp_path / "script.py")


@pytest.mark.parametrize("case", ["none", "code", "text", "error", "interrupt", "killed"])
def test_a_forked_command_ends_as_a_started_one(
    case: str, script: str, environment: dict[str, str], tmp_path: Path
) -> None:
    started = subprocess.run(
        [sys.executable, script, case],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    forked = commands.run("tests.script", script, case, folder=tmp_path, environment=environment)
    assert (forked.returncode, forked.stdout) == (started.returncode, started.stdout)
    assert forked.stderr.splitlines()[:1] == started.stderr.splitlines()[:1]
    assert forked.stderr.splitlines()[-1:] == started.stderr.splitlines()[-1:]


def test_a_forked_command_can_be_stopped_and_waited_for(script: str) -> None:
    with commands.start("tests.script", script, "wait") as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.2)
        assert process.poll() is None
        assert "wait" in process.stdout.readline()
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == -signal.SIGTERM
        process.kill()  # has ended: nobody is hit


def test_a_command_that_takes_too_long_is_killed(script: str) -> None:
    begin = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        commands.run("tests.script", script, "wait", timeout=1.0)
    assert time.monotonic() - begin < 30


def test_a_client_that_goes_away_leaves_the_server_to_others(script: str) -> None:
    commands.run("tests.script", script, "none")
    for _ in range(2):  # each of the servers
        commands._connected().close()
        connection = commands._connected()
        connection.sendall((100).to_bytes(4, "big") + b"{")
        connection.close()
    for _ in range(4):
        assert commands.run("tests.script", script, "code").returncode == 7


def test_a_server_that_was_killed_is_started_again_and_its_processes_end(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Servers of this test alone, which import nothing.
    (tmp_path / "owner").write_text(str(os.getpid()))
    monkeypatch.setenv(commands.SERVER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(commands, "IMPORTED", ())
    with commands.start("tests.script", script, "wait") as process:
        assert "wait" in process.stdout.readline()
        os.kill(parent_of(process.pid), signal.SIGKILL)
        assert process.wait(timeout=30) == -signal.SIGKILL
    codes = [commands.run("tests.script", script, "code").returncode for _ in range(2)]
    assert codes == [7, 7]


def test_servers_that_take_turns_hash_in_their_own_way(tmp_path: Path) -> None:
    path = tmp_path / "hash.py"
    path.write_text("print(hash('a'))")
    found = [commands.run("tests.script", str(path)).stdout for _ in range(3)]
    assert found[0] == found[2] != found[1]


def parent_of(pid: int) -> int:
    return psutil.Process(pid).ppid()
