"""The proxy's faults happen as described; tested with a plain HTTP client, not our storage code."""

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import FaultyBucket
from tests.faults.proxy import Action, Fault, FaultProxy

PROJECT = Path(__file__).resolve().parents[2]


class Client:
    """Sends plain requests below `/case-N/` of the bucket."""

    def __init__(self, bucket: FaultyBucket) -> None:
        self.address = bucket.proxy.address.removeprefix("http://")
        self.folder = bucket.url.removeprefix("gs://test-bucket/")

    def ask(
        self, method: str, path: str, body: bytes = b"", **headers: str
    ) -> tuple[int, bytes, Any]:
        connection = http.client.HTTPConnection(self.address, timeout=10)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read(), answer.headers
        finally:
            connection.close()

    def put(self, name: str, body: bytes, condition: str = "") -> int:
        path = f"/upload/storage/v1/b/test-bucket/o?uploadType=media&name={self.folder}%2F{name}"
        return self.ask("POST", path + condition, body)[0]

    def get(self, name: str) -> bytes:
        path = f"/download/storage/v1/b/test-bucket/o/{self.folder}%2F{name}?alt=media"
        status, body, _ = self.ask("GET", path)
        return body if status == 200 else b""

    def start(self, name: str, condition: str) -> str:
        path = f"/upload/storage/v1/b/test-bucket/o?uploadType=resumable{condition}"
        metadata = json.dumps({"name": f"{self.folder}/{name}"}).encode()
        status, _, headers = self.ask(
            "POST", path, metadata, **{"Content-Type": "application/json"}
        )
        assert status == 200
        location: str = headers["Location"]
        return location[location.index("/upload") :]


@pytest.fixture
def client(faulty_bucket: FaultyBucket) -> Client:
    return Client(faulty_bucket)


@pytest.fixture
def proxy(faulty_bucket: FaultyBucket) -> FaultProxy:
    return faulty_bucket.proxy


@pytest.mark.parametrize(
    ("action", "error", "is_done"),
    [
        ("reset-early", ConnectionResetError, False),
        ("reset", ConnectionResetError, False),
        ("lose-answer", ConnectionResetError, True),
    ],
)
def test_broken_put_is_done_or_not(
    action: Action, error: type[Exception], is_done: bool, client: Client, proxy: FaultProxy
) -> None:
    proxy.add(Fault(action, kinds=("put",), count=1))
    with pytest.raises(error):
        client.put("a", b"1")
    assert client.get("a") == (b"1" if is_done else b"")
    assert (proxy.count("put", "/a$", 0), proxy.log[0].fault) == (1, action)
    assert client.put("a", b"2") == 200


def test_answer_that_is_cut_or_changed(client: Client, proxy: FaultProxy) -> None:
    client.put("a", b"1234")
    proxy.add(Fault("truncate", name="/a$", count=1), Fault("flip", name="/a$", count=1))
    with pytest.raises(http.client.IncompleteRead) as caught:
        client.get("a")
    assert caught.value.partial == b"12"
    assert client.get("a") == b"1224"  # 0x33 ^ 1 = 0x32
    assert client.get("a") == b"1234"


def test_stall_is_late_before_or_after_the_change(client: Client, proxy: FaultProxy) -> None:
    proxy.add(Fault("stall", seconds=0.3, count=1))
    start = time.monotonic()
    assert client.put("a", b"1") == 200
    assert 0.3 <= time.monotonic() - start < 20


def test_stall_ends_when_it_is_asked_to(client: Client, proxy: FaultProxy) -> None:
    proxy.add(Fault("stall", seconds=60, count=1))
    with ThreadPoolExecutor(1) as pool:
        status = pool.submit(client.put, "a", b"1")
        proxy.wait_for_stall()
        proxy.resume()
        assert status.result() == 200


def test_status_hits_with_its_probability(client: Client, proxy: FaultProxy) -> None:
    proxy.add(Fault("status", status=429, method="PO", name="/b$", probability=0.5))
    statuses = [client.put("b", b"1") for _ in range(100)]
    assert 30 < statuses.count(429) < 70  # 50 are expected, 5 is their standard deviation
    assert [client.put("c", b"1") for _ in range(20)] == [200] * 20


def test_stop_loses_the_answer_and_everything_after(client: Client, proxy: FaultProxy) -> None:
    called = []
    proxy.stop_after(2, lambda: called.append(proxy.down))
    assert client.put("a", b"1") == 200
    for name in ("b", "c"):
        with pytest.raises(ConnectionResetError):
            client.put(name, b"1")
    assert called == [True]
    proxy.clear()
    assert [client.get(name) for name in "abc"] == [b"1", b"1", b""]


def test_account_that_only_creates(client: Client, proxy: FaultProxy) -> None:
    session = client.start("a", "")
    proxy.creates_only = True
    assert [client.put("a", b"1"), client.put("a", b"2")] == [200, 403]
    assert client.put("a", b"2", "&ifGenerationMatch=0") == 403
    # Also not by an upload in parts that began before the object existed.
    assert client.ask("PUT", session, b"2")[0] == 403
    path = f"/storage/v1/b/test-bucket/o/{client.folder}%2Fa"
    assert [client.ask(method, path)[0] for method in ("GET", "DELETE")] == [200, 403]
    assert client.get("a") == b"1"
    proxy.clear()
    assert [client.put("a", b"2"), client.ask("DELETE", path)[0]] == [200, 200]


@pytest.mark.parametrize("generation", [0, 5])
def test_precondition_of_one_request(generation: int, client: Client, proxy: FaultProxy) -> None:
    condition = f"&ifGenerationMatch={generation}"
    assert client.put("a", b"1", condition) == (200 if generation == 0 else 412)
    assert client.put("a", b"2", condition) == 412
    assert client.get("a") == (b"1" if generation == 0 else b"")


def test_precondition_of_a_session_holds_at_its_end(client: Client) -> None:
    path = client.start("a", "&ifGenerationMatch=0")
    part = bytes(1 << 18)
    size = len(part) + 1
    first = {"Content-Range": f"bytes 0-{size - 2}/{size}"}
    last = {"Content-Range": f"bytes {size - 1}-{size - 1}/{size}"}
    assert client.ask("PUT", path, b"", **{"Content-Range": f"bytes */{size}"})[0] == 308
    status, _, headers = client.ask("PUT", path, part, **first)
    assert (status, headers["Range"]) == (308, f"bytes=0-{size - 2}")
    assert client.put("a", b"other") == 200
    assert client.ask("PUT", path, b"1", **last)[0] == 412
    assert client.get("a") == b"other"


def test_finished_session_names_its_object(client: Client, proxy: FaultProxy) -> None:
    path = client.start("a", "")
    proxy.add(Fault("lose-answer", kinds=("part",), count=1))
    with pytest.raises(ConnectionResetError):
        client.ask("PUT", path, b"123", **{"Content-Range": "bytes 0-2/3"})
    status, body, _ = client.ask("PUT", path, b"", **{"Content-Range": "bytes */3"})
    assert (status, json.loads(body)["size"]) == (200, "3")


def test_process_serves_a_bucket_and_an_outage() -> None:
    rule = json.dumps({"action": "status", "status": 429, "name": "never"})
    command = [sys.executable, "-m", "tests.faults.proxy", "--fault", rule]
    with (
        subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as process,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(process.terminate)
        assert process.stdout is not None
        name, _, address = process.stdout.readline().strip().partition("=")
        assert name == "STORAGE_EMULATOR_HOST"
        environment = {**os.environ, "STORAGE_EMULATOR_HOST": address}
        code = (
            "from flexunet.storage import GcsStore, probe_preconditions as probe; "
            "probe(GcsStore('gs://test-bucket/x', retry_s=0.2))"
        )
        probe = [sys.executable, "-c", code]
        assert subprocess.run(probe, cwd=PROJECT, env=environment).returncode == 0
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.3)
        failed = subprocess.run(probe, cwd=PROJECT, env=environment, capture_output=True, text=True)
        assert "Connection" in failed.stderr
    assert process.returncode == 0
