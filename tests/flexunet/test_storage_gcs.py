"""Buckets: conditional puts, and failures of the server, the network and the credentials."""

import gc
import re
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from flexunet.errors import StorageError
from flexunet.storage import (
    Forbidden,
    GcsStore,
    ObjectStore,
    PreconditionFailed,
    Unavailable,
    open_store,
    probe_preconditions,
    probe_writable,
    put_if_changed,
)
from flexunet.storage.gcs_errors import describe_cloud_error, is_transient
from tests.conftest import FaultyBucket
from tests.faults.proxy import Fault
from tests.flexunet.listing import names


def test_account_that_only_creates_leaves_the_probe_where_it_may(
    faulty_bucket: FaultyBucket,
) -> None:
    store = GcsStore(faulty_bucket.url)
    faulty_bucket.proxy.creates_only = True
    with pytest.raises(Forbidden, match=r"cannot delete .*permission denied; grant"):
        probe_writable(store.subpath("a"))
    probe_writable(store.subpath("b"), may_stay=True)
    assert [name[:17] for name in names(store)] == ["a/flexunet-probe-", "b/flexunet-probe-"]


def test_put_if_other_replaces_nothing_that_is_the_same(faulty_bucket: FaultyBucket) -> None:
    store = GcsStore(faulty_bucket.url)
    faulty_bucket.proxy.creates_only = True
    put_if_changed(store, "a", b"1")
    put_if_changed(store, "a", b"1")
    with pytest.raises(Forbidden):
        put_if_changed(store, "a", b"2")
    faulty_bucket.proxy.creates_only = False
    put_if_changed(store, "a", b"2")
    assert store.get("a") == b"2"


def test_server_that_ignores_preconditions_is_refused(lax_bucket_url: str) -> None:
    with pytest.raises(StorageError, match="does not enforce preconditions"):
        probe_preconditions(open_store(lax_bucket_url))
    assert names(open_store(lax_bucket_url)) == []


def test_conditional_puts_of_a_bucket(bucket_url: str) -> None:
    store = GcsStore(bucket_url)
    probe_preconditions(store)
    first = store.put("a", b"1", if_generation=0)
    with pytest.raises(PreconditionFailed, match="exists already"):
        store.put("a", b"1", if_generation=0)
    second = store.put("a", b"2", if_generation=first.generation)
    with pytest.raises(PreconditionFailed, match="another process wrote it"):
        store.put("a", b"3", if_generation=first.generation)
    assert (store.get("a"), store.stat("a")) == (b"2", second)


def test_server_address_may_lack_the_scheme(
    faulty_bucket: FaultyBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = faulty_bucket.proxy.address.removeprefix("http://")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
    GcsStore(faulty_bucket.url).put("a", b"1")
    assert faulty_bucket.proxy.count("put", status=200) == 1


def every_request(store: ObjectStore, path: str) -> list[Callable[[], object]]:
    return [
        lambda: store.put("new", b"1", if_generation=0),
        lambda: store.put_file("new", path),
        lambda: store.get("a"),
        lambda: store.get_file("a", path + "-copy"),
        lambda: store.stat("a"),
        lambda: store.list(),
        lambda: store.delete("a"),
    ]


@pytest.mark.parametrize("failure", [429, 500, 503, "reset", "stall"])
def test_failure_that_outlasts_the_retries_is_unavailable(
    failure: int | str, faulty_bucket: FaultyBucket, tmp_path: Path
) -> None:
    GcsStore(faulty_bucket.url).put("a", b"1")
    store = GcsStore(faulty_bucket.url, retry_s=0.3, timeout_s=0.3)
    (tmp_path / "file").write_bytes(b"1")
    if failure == "stall":
        faulty_bucket.proxy.add(Fault("stall", seconds=60))
    elif failure == "reset":
        faulty_bucket.proxy.down = True
    else:
        faulty_bucket.proxy.add(Fault("status", status=int(failure)))
    for request in every_request(store, str(tmp_path / "file")):
        start = time.monotonic()
        with pytest.raises(Unavailable, match="check the network and the server") as caught:
            request()
        assert caught.value.exit_code == 5
        assert "\n" not in str(caught.value)
        assert time.monotonic() - start < 20  # as shipped, requests are repeated for 120 s


# google-auth leaves the connection of a download open when it was answered with 401.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("status", [400, 401, 403])
def test_refusal_is_an_error_at_once(
    status: int, faulty_bucket: FaultyBucket, tmp_path: Path
) -> None:
    store = GcsStore(faulty_bucket.url)
    (tmp_path / "file").write_bytes(b"1")
    faulty_bucket.proxy.add(Fault("status", status=status))
    for request in every_request(store, str(tmp_path / "file")):
        start = time.monotonic()
        with pytest.raises(StorageError) as caught:
            request()
        assert not isinstance(caught.value, Unavailable)
        assert time.monotonic() - start < 20  # as shipped, requests are repeated for 120 s
    del caught
    gc.collect()


# A certificate for localhost that signs itself, and its key: openssl req -x509 -newkey ec
# -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 36500 -subj /CN=localhost
SELF_SIGNED = """
-----BEGIN CERTIFICATE-----
MIIBgDCCASWgAwIBAgIUGFOmXfKvNBdm6g/N4ndpQVOaELAwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyODE4MzE1N1oYDzIxMjYxMTA0
MTgzMTU3WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAATFYfOzgLhKms7NyRPC1e1/+QUfSBkjpAYnSBNJtOIum/Np/gpGEPgB
g/2b0Pv0AqPihe37zyUbc7aV8LbIDTYwo1MwUTAdBgNVHQ4EFgQU38Lmjc7rjiqR
vAhKMbPSibEJI68wHwYDVR0jBBgwFoAU38Lmjc7rjiqRvAhKMbPSibEJI68wDwYD
VR0TAQH/BAUwAwEB/zAKBggqhkjOPQQDAgNJADBGAiEA+IziIBQAI+1KNHSASTEv
CklI9124nBSR5nOi90GLxr0CIQDabaKqWwOqMhzfxB2vO92YnD7N48YAiBac9X2A
ljpsBA==
-----END CERTIFICATE-----
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgv1sgUrZgVU5SHkWU
NRixNTf/fLzR0MVk5tKwWqaH9UShRANCAATFYfOzgLhKms7NyRPC1e1/+QUfSBkj
pAYnSBNJtOIum/Np/gpGEPgBg/2b0Pv0AqPihe37zyUbc7aV8LbIDTYw
-----END PRIVATE KEY-----
"""


@pytest.mark.parametrize(
    ("is_tls", "authority", "message"),
    [
        (True, None, r"the certificate of 127\.0\.0\.1:\d+ is not trusted: self-signed cert"),
        (
            False,
            None,
            r"TLS between 127\.0\.0\.1:\d+ and this machine failed \(WRONG_VERSION_NUMBER\)",
        ),
        (True, "/nowhere", "invalid path: /nowhere; check REQUESTS_CA_BUNDLE"),
    ],
)
def test_tls_that_cannot_work_is_reported_at_once(
    is_tls: bool,
    authority: str | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_bytes(b"1")
    server, _ = _serve_status(404)
    if is_tls:
        (tmp_path / "pem").write_text(SELF_SIGNED)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "pem")
        server.socket = context.wrap_socket(server.socket, server_side=True)
    if authority:
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", authority)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"https://127.0.0.1:{server.server_port}")
    store = open_store("gs://bucket/x")
    try:
        for request in every_request(store, str(tmp_path / "file")):
            start = time.monotonic()
            with pytest.raises(StorageError, match=message) as caught:
                request()
            assert not isinstance(caught.value, Unavailable)
            assert time.monotonic() - start < 20  # as shipped, requests are repeated for 120 s
    finally:
        server.shutdown()
        server.server_close()


def test_broken_line_and_refused_token_are_distinguished_from_refused_tls() -> None:
    import requests
    import urllib3
    from google.auth.exceptions import TransportError

    broken = ssl.SSLEOFError(8, "[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred")
    broken.reason = "UNEXPECTED_EOF_WHILE_READING"
    refused = ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] expired")
    refused.reason = "CERTIFICATE_VERIFY_FAILED"
    for inner, may_heal in ((broken, True), (refused, False)):
        pool = urllib3.HTTPSConnectionPool("host")
        wrapped = urllib3.exceptions.MaxRetryError(pool, "/", urllib3.exceptions.SSLError(inner))
        error = requests.exceptions.SSLError(wrapped)
        assert is_transient(error) == may_heal
        assert is_transient(TransportError(error)) == may_heal


def test_outage_shorter_than_the_retries_is_waited_out(faulty_bucket: FaultyBucket) -> None:
    faulty_bucket.proxy.down = True
    timer = threading.Timer(1.5, lambda: setattr(faulty_bucket.proxy, "down", False))
    timer.start()
    store = open_store(faulty_bucket.url, retry_s=0.01).with_limits(retry_s=30, timeout_s=1)
    assert store.put("a", b"1", if_generation=0).size == 1
    timer.join()
    assert faulty_bucket.proxy.count("put", status=0) > 1


def test_retries_wait_for_random_times(
    faulty_bucket: FaultyBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many workers that fail together must not come back together."""
    faulty_bucket.proxy.add(Fault("status", kinds=("stat",), count=12))
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    GcsStore(faulty_bucket.url).stat("a")
    assert len(set(pauses)) == len(pauses) == 12
    assert all(0 <= pause <= min(0.2 * 2**i, 10) for i, pause in enumerate(pauses))


def test_only_objects_are_asked_for(faulty_bucket: FaultyBucket) -> None:
    """The bucket itself takes another right (storage.buckets.get), which few accounts have."""
    script = """
import sys, threading
from flexunet.storage import open_store
open_store(sys.argv[1]).put("a", b"1")
for thread in threading.enumerate()[1:]:  # what still runs may ask for more
    thread.join()
"""
    subprocess.run([sys.executable, "-c", script, faulty_bucket.url], check=True)
    assert [entry.kind for entry in faulty_bucket.proxy.log] == ["put"]


def test_missing_bucket_is_named_at_once(bucket_url: str) -> None:
    store = open_store("gs://no-such-bucket/x")
    with pytest.raises(StorageError, match="bucket 'no-such-bucket' does not exist"):
        store.put("a", b"")
    with pytest.raises(StorageError, match="bucket 'no-such-bucket' does not exist"):
        store.list()


def _serve_status(status: int) -> tuple[ThreadingHTTPServer, list[str]]:
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            requests.append(self.path)
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_error(status)

        def do_GET(self) -> None:  # after a refusal the library asks about the bucket
            self.send_error(status)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server, requests


@pytest.mark.parametrize(
    ("status", "message", "is_retried"),
    [
        (401, "cannot write gs://bucket/x/a: no Google Cloud credentials; run", False),
        (403, "cannot write gs://bucket/x/a: permission denied; grant", False),
        (503, "cannot write gs://bucket/x/a: Timeout of 0.5s exceeded", True),
    ],
)
def test_server_error_is_one_line(
    status: int, message: str, is_retried: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, requests = _serve_status(status)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_address[1]}")
    try:
        with pytest.raises(StorageError, match=message) as caught:
            GcsStore("gs://bucket/x", retry_s=0.5).put("a", b"1")
    finally:
        server.shutdown()
        server.server_close()
    assert "\n" not in str(caught.value)
    assert (len(requests) > 1) == is_retried


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (None, "was not found"),
        ('{"type":"service_account"', "not a valid json file"),
        ('{"type":"service_account","project_id":"x"}', "missing fields .*client_email"),
    ],
)
def test_a_wrong_key_file_is_named_with_its_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None, fault: str
) -> None:
    import google.auth

    path = tmp_path / "key.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
    with pytest.raises(google.auth.exceptions.DefaultCredentialsError) as caught:
        google.auth.default()
    found = describe_cloud_error(caught.value, "read", "gs://b/x", "b", "object")
    assert re.search(
        f"GOOGLE_APPLICATION_CREDENTIALS={path} contains no credentials .*{fault}", str(found)
    )
