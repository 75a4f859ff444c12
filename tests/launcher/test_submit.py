"""Submits commands to a real Ray head, with its job server, on this machine.

One head has token authentication, another has none. The heads and the commands under test run in
separate processes.
"""

import contextlib
import http.server
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from launcher.cli import main
from tests.job.discs import write_discs
from tests.launcher.conftest import PROJECT, Launch, RayCluster
from tests.launcher.head import Head, ray_head

pytestmark = pytest.mark.cluster

# Needs 4 s to end after SIGTERM; Ray's default is 3 s.
_SLOW_STOP = """
trap 'sleep 4; printf "all is %s\\n" stored; exit 0' TERM
printf "it %s\\n" runs
while true; do sleep 0.1; done
"""
TOKEN = {"RAY_AUTH_TOKEN": "canary"}
_COUNT = "for i in $(seq 60); do echo line $i; sleep 0.1; done; exit 3"


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """Yields a head that requires a token."""
    with ray_head(secrets.token_hex(32)) as found:
        yield found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("input") / "source"
    write_discs(folder, num_images=8, side=32)
    return folder


def follow(head: Head) -> tuple[str, ...]:
    return ("submit", "--address", head.address, "--follow", "--")


def job_of(output: str) -> str:
    found = re.search(r"^job: (\S+)$", output, re.MULTILINE)
    assert found, output
    return found[1]


def test_a_command_runs_on_the_cluster_and_is_followed(
    flexunet: Launch, head: Head, source: Path, tmp_path: Path
) -> None:
    words = ["prep", source, tmp_path / "a dataset", "--image-size", 32]
    # Variables for another cluster.
    other = {"RAY_ADDRESS": "127.0.0.1:1", "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1"}
    done = flexunet(*follow(head), *words, **head.environment, **other)
    assert done.returncode == 0, done.stderr + done.stdout
    assert (tmp_path / "a dataset" / "dataset.json").exists()
    job = job_of(done.stdout)
    assert re.fullmatch(r"prep-[0-9a-f]{8}", job)
    for verb in ("status", "logs --follow", "stop"):
        assert f"  flexunet {verb} --address {head.address} {job}\n" in done.stdout
    assert "encoding: 8/8 images" in done.stdout  # of the log
    assert re.fullmatch(rf"job {job}: succeeded after \d+ s\n", done.stderr)


def test_the_exit_code_is_that_of_the_command(
    flexunet: Launch, head: Head, source: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    (broken / "images" / "disc-03.png").write_bytes(b"no image")
    for folder, code in ((tmp_path / "missing", 2), (broken, 3)):
        done = flexunet(*follow(head), "prep", folder, tmp_path / "out", **head.environment)
        assert done.returncode == code, done.stderr + done.stdout
        assert f"failed with exit code {code} after" in done.stderr


def test_the_exit_code_is_that_of_a_shell(flexunet: Launch, head: Head) -> None:
    killed, missing = head.post("kill -9 $$"), head.post("no-such-program")
    for job, code, words in (
        (killed, 137, "failed by signal 9 after"),
        (missing, 127, "the head has no `flexunet` on its PATH"),
    ):
        done = flexunet("logs", "--follow", "--address", head.address, job, **head.environment)
        assert (done.returncode, words in done.stderr) == (code, True), done.stderr


def test_a_stopped_job_has_time_to_store_a_checkpoint(flexunet: Launch, head: Head) -> None:
    job = head.start(_SLOW_STOP, stop_timeout_s=120)
    head.wait_for(job, "it runs")
    where = ("--address", head.address, job)
    done = flexunet("stop", *where, **head.environment)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        rf"job {job}: stopped after \d+ s; it ended by itself within \d+ s\n", done.stdout
    )
    assert "all is stored" in head.ask(f"/api/jobs/{job}/logs")["logs"]
    followed = flexunet("logs", "--follow", *where, **head.environment)
    assert followed.returncode == 6
    again = flexunet("stop", *where, **head.environment)
    assert (again.returncode, "had ended already: stopped" in again.stdout) == (0, True)


def test_the_port_of_the_cluster_itself_is_reported(
    ray_cluster: RayCluster, flexunet: Launch
) -> None:
    done = flexunet("status", "--address", f"http://{ray_cluster.address}")
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.isprintable() and "not a Ray job server; give the one" in line


def test_the_name_of_an_ended_job_is_taken(flexunet: Launch, head: Head, tmp_path: Path) -> None:
    words = ("--name", "again", "--follow", "--", "prep", tmp_path / "missing", tmp_path / "out")
    submit = ("submit", "--address", head.address, *words)
    assert flexunet(*submit, **head.environment).returncode == 2
    done = flexunet(*submit, **head.environment)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "job again already exists (failed); give another --name, or none" in line


def test_a_stopped_job_that_does_not_end_is_killed(flexunet: Launch, head: Head) -> None:
    job = head.start(_SLOW_STOP, stop_timeout_s=1)
    head.wait_for(job, "it runs")
    done = flexunet("stop", "--address", head.address, job, **head.environment)
    assert done.stdout.endswith("it was killed because it had not ended within 1 s\n"), done.stderr
    assert "all is stored" not in head.ask(f"/api/jobs/{job}/logs")["logs"]


def test_a_job_gets_nothing_of_the_users_but_the_emulator(
    flexunet: Launch, head: Head, tmp_path: Path
) -> None:
    name = f"mine-{secrets.token_hex(4)}"
    words = ["submit", "--address", head.address, "--name", name, "--stop-timeout", 77]
    words += ["prep", tmp_path / "it's missing", "out", "--seed=3"]
    mine = {"STORAGE_EMULATOR_HOST": "http://127.0.0.1:1", "A_SECRET": "canary"}
    done = flexunet(*words, **head.environment, **mine)
    assert done.returncode == 0, done.stderr
    details = head.ask(f"/api/jobs/{name}")
    assert details["runtime_env"] == {
        "env_vars": {
            "RAY_JOB_STOP_WAIT_TIME_S": "77",
            "STORAGE_EMULATOR_HOST": "http://127.0.0.1:1",
        }
    }
    quoted = "'" + str(tmp_path) + "/it'\"'\"'s missing'"
    assert details["entrypoint"] == f"flexunet launch prep {quoted} out --seed=3"
    again = flexunet(*words, **head.environment)
    assert again.returncode == 2
    assert re.fullmatch(
        rf"flexunet: job {name} already exists \(\w+\); give another --name, or none: "
        "a run resumes by its own name, not by the job's\n",
        again.stderr,
    )


def test_ctrl_c_leaves_the_job_alone(flexunet: Launch, head: Head) -> None:
    job = head.post("printf 'it %s\\n' runs; sleep 300 # \x1b[2J")
    where = ["--address", head.address, job]
    with subprocess.Popen(
        [sys.executable, "-m", "launcher.cli", "logs", "--follow", *where],
        cwd=PROJECT,
        env=os.environ | head.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as command:
        assert command.stdout is not None
        assert any("it runs" in line for line in command.stdout)
        command.send_signal(signal.SIGINT)
        _, error = command.communicate(timeout=30)
    assert (command.returncode, error) == (130, f"stopped following; job {job} continues\n")
    done = flexunet("status", *where, **head.environment)
    title, row = done.stdout.splitlines()
    assert title.split("  ")[0] == "job"
    assert re.fullmatch(
        rf"{job}  running  \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d  0:\d\d:\d\d\s+printf .*; sleep 300 "
        r"# \?\[2J",
        row,
    )
    assert flexunet("stop", *where, **head.environment).returncode == 0
    rows = flexunet("status", "--address", head.address, **head.environment).stdout.splitlines()
    assert [line for line in rows if line.startswith(f"{job}  stopped")]


class Relay:
    """Relays connections to a server; a test can break them."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._silent: set[socket.socket] = set()
        self.is_down = False
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Closes all connections."""
        for pair in self._pairs:
            for each in pair:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def silence(self) -> None:
        """Stops all traffic on existing connections, even their end."""
        self._silent |= {each for pair in self._pairs for each in pair}

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self.is_down:
                    client.close()
                    continue
                server = socket.create_connection(("127.0.0.1", self._target))
                self._pairs.append((client, server))
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._carry, args=pair, daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if source not in self._silent:
                    target.sendall(data)
            if source not in self._silent:
                target.shutdown(socket.SHUT_WR)


@pytest.fixture
def relay(head: Head) -> Iterator[Relay]:
    found = Relay(int(head.address.rpartition(":")[2]))
    yield found
    found.close()


def cut_off(relay: Relay) -> None:
    relay.is_down = True
    relay.cut()
    time.sleep(3)
    relay.is_down = False


@pytest.mark.parametrize("harm", [cut_off, Relay.silence])
def test_a_lost_connection_is_made_again_and_nothing_is_shown_twice(
    head: Head, relay: Relay, tmp_path: Path, harm: Callable[[Relay], None]
) -> None:
    job = head.post(_COUNT)
    # The same command, but it waits 4 s instead of a minute for data on an open connection.
    script = (
        "import sys, launcher.jobs.follow as follow, launcher.cli as cli; follow._QUIET_S = 4.0; "
    )
    words = ["logs", "--follow", "--address", f"http://127.0.0.1:{relay.port}", job]
    log = tmp_path / "log"
    with (
        log.open("w") as output,
        subprocess.Popen(
            [sys.executable, "-u", "-c", f"{script}sys.exit(cli.main())", *words],
            cwd=PROJECT,
            env=os.environ | head.environment,
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
        ) as command,
    ):
        while "line 1\n" not in log.read_text():
            assert command.poll() is None
            time.sleep(0.1)
        harm(relay)
        _, error = command.communicate(timeout=120)
    lines = [line for line in log.read_text().splitlines() if line.startswith("line ")]
    assert lines == [f"line {i}" for i in range(1, 61)]
    assert command.returncode == 3, error
    assert f"job {job}: failed with exit code 3 after" in error


@pytest.mark.parametrize(
    ("access", "reason"),
    [
        (TOKEN, "Authentication failed: Forbidden"),
        ({"RAY_AUTH_TOKEN_PATH": "/canary/token"}, "file cannot be opened or is empty"),
        ({}, "couldn't find an authentication token"),
    ],
)
def test_without_the_token_there_is_no_access(
    flexunet: Launch, head: Head, tmp_path: Path, access: dict[str, str], reason: str
) -> None:
    words = ["submit", "--address", head.address, "prep", "a", "b"]
    done = flexunet(*words, HOME=str(tmp_path), **access)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"flexunet: --address {head.address}: no access (")
    assert reason in line
    assert line.endswith("; set RAY_AUTH_TOKEN_PATH to a file with the token of the cluster")
    assert access.get("RAY_AUTH_TOKEN", "no token") not in line


def test_an_open_job_server_is_used_only_on_this_machine_or_on_request(
    flexunet: Launch, tmp_path: Path
) -> None:
    with ray_head(None) as head:
        # An address of this machine that is not a loopback address.
        there = head.address.replace("127.0.0.1", "0.0.0.0")  # noqa: S104
        words = ["prep", tmp_path / "missing", "out"]
        refused = flexunet("submit", "--address", there, *words)
        assert refused.returncode == 2
        assert "start the cluster with RAY_AUTH_MODE=token, or give --insecure" in refused.stderr
        assert refused.stderr.count("\n") == 1
        for verb in ("logs", "stop"):
            assert flexunet(verb, "--address", there, "job-1").returncode == 2
        assert flexunet("status", "--address", there).returncode == 2
        assert head.ask("/api/jobs/") == []
        here = flexunet("submit", "--address", head.address, *words)
        assert here.returncode == 0, here.stderr
        done = flexunet("submit", "--address", there, "--insecure", *words)
        assert done.returncode == 0, done.stderr
        assert f"stop --address {there} --insecure {job_of(done.stdout)}\n" in done.stdout
        assert len(head.ask("/api/jobs/")) == 2


class Answers(http.server.BaseHTTPRequestHandler):
    """Records the tokens that it receives."""

    tokens: ClassVar[list[str | None]]

    def do_GET(self) -> None:
        self.tokens.append(self.headers.get("Authorization"))
        self.answer(self.tokens[-1])

    def answer(self, token: str | None) -> None:
        raise NotImplementedError

    def log_message(self, format: str, *args: Any) -> None:
        pass


class AnswersElsewhere(Answers):
    """Requires a token, and redirects requests that have one."""

    location: ClassVar[str]

    def answer(self, token: str | None) -> None:
        self.send_response(302 if token else 401)
        self.send_header("Location", self.location)
        self.end_headers()


class AnswersAll(Answers):
    """Requires no token; answers like a job server without jobs."""

    def answer(self, token: str | None) -> None:
        found = {"ray_version": "2.60.0"} if self.path == "/api/version" else []
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(found).encode())


@contextlib.contextmanager
def serving(handler: type[Answers]) -> Iterator[str]:
    """Yields the address at which `handler` answers."""
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_token_is_not_sent_elsewhere(flexunet: Launch, tmp_path: Path) -> None:
    # Passwords of other programs must not be sent.
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password other-canary\n")

    class There(AnswersAll):
        tokens: ClassVar[list[str | None]] = []

    class Here(AnswersElsewhere):
        tokens: ClassVar[list[str | None]] = []

    access = {"HOME": str(tmp_path), "RAY_AUTH_TOKEN": "canary"}
    with serving(There) as target, serving(Here) as address:
        Here.location = f"{target}/api/version"
        done = flexunet("status", "--address", address, **access)
        assert (done.returncode, There.tokens) == (2, [])
        assert f"redirects to {target}/api/version; give that address" in done.stderr
        assert Here.tokens == [None, "Bearer canary"]
        # A server that requires no token must not receive it.
        done = flexunet("status", "--address", target, **access)
        assert done.returncode == 0, done.stderr
        assert len(There.tokens) >= 2 and set(There.tokens) == {None}


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["status", "--address", "head:8265"], 2, "not the URL of a job server"),
        (["status", "--address", "ray://head:10001"], 2, "give http://HOST:8265"),
        (["status", "--address", "http://head:port"], 2, "Port could not be cast to integer"),
        (["status", "--address", "http://me:canary@head:8265"], 2, "a password or token"),
        (["status", "--address", "http://head:8265?a=b"], 2, "more than the URL of a job server"),
        (["status"], 2, "--address is required"),
        (["status", "--address", "http://127.0.0.1:1"], 1, "no job server answers ([Errno 111]"),
        (["stop", "--address", "http://127.0.0.1:1", "../x"], 2, "not a job name; use at most 100"),
        (["submit", "--address=http://h:1", "doctor"], 2, "'doctor' cannot be submitted; "),
        (["submit", "--address=http://h:1", "--", "train", "--bach=3"], 2, "no option '--bach'"),
        (["submit", "--address=http://h:1", "--name=a/b", "prep", "a", "b"], 2, "'a/b': not a job"),
    ],
)
def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str
) -> None:
    assert main(words) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert "canary" not in line


def test_help_of_a_command_to_submit_needs_no_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "train", "--help"]) == 0
    assert capsys.readouterr().out.startswith("Usage: flexunet submit train [OPTIONS]")
