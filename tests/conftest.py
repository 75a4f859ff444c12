"""A bucket on a real server: gcp-storage-emulator, in memory, once per test process.

It supports ranges, checksums and generations, but ignores preconditions.
"""

import itertools
import socket
from collections.abc import Iterator

import pytest

_numbers = itertools.count()


def pytest_configure(config: pytest.Config) -> None:
    """Lets google-api-core be imported beside a grpc without grpcio-status, which we never use."""
    config.addinivalue_line("filterwarnings", "ignore:Please install grpcio-status:ImportWarning")


@pytest.fixture(scope="session")
def storage_server() -> Iterator[str]:
    """Returns the address of the emulator, which holds the bucket `test-bucket`."""
    from gcp_storage_emulator.server import create_server  # type: ignore[import-untyped]

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="test-bucket")
    server.start()
    yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture
def bucket_url(storage_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Returns a `gs://` URL that no other test uses; child processes reach it too."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", storage_server)
    return f"gs://test-bucket/case-{next(_numbers)}"
