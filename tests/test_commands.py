"""The fork server's processes behave as those of `subprocess`."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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
