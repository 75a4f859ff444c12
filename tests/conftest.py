"""Provides a bucket on a real server: gcp-storage-emulator behind a proxy, once per test process.

The emulator supports ranges, checksums and generations but ignores preconditions, so every test
that is not about that goes through `tests/faults/proxy.py`, which enforces them.
"""

import io
import itertools
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

from tests.commands import SERVER_VARIABLE, checked_descriptor
from tests.faults.proxy import BUCKET, FaultProxy, start_emulator

_numbers = itertools.count()


def pytest_configure(config: pytest.Config) -> None:
    """Ignores warnings of google-api-core, so that it can be imported without grpcio-status.

    Its versions for protobuf 4 also warn when Google ends the support of this Python.
    """
    # No deadline: the time of an example depends on the load of the machine.
    settings.register_profile("suite", deadline=None)
    settings.load_profile("suite")
    # `nohup` and the background of a script let children ignore these, and tests send them.
    for number, handler in (
        (signal.SIGHUP, signal.SIG_DFL),
        (signal.SIGINT, signal.default_int_handler),
    ):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)
    os.fsync = checked_descriptor  # type: ignore[assignment]
    if SERVER_VARIABLE not in os.environ:  # otherwise a worker of xdist, which shares it
        folder = tempfile.mkdtemp(prefix="flexunet-tests-")
        Path(folder, "owner").write_text(str(os.getpid()))
        os.environ[SERVER_VARIABLE] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    config.addinivalue_line("filterwarnings", "ignore:Please install grpcio-status:ImportWarning")
    config.addinivalue_line("filterwarnings", "ignore:You are using a Python version:FutureWarning")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Makes the log of a test valid UTF-8, because test processes send it to each other."""
    report = yield
    report.sections = [
        (title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections
    ]
    return report


@pytest.fixture(autouse=True)
def undrawn_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves figures of Matplotlib blank, except in tests with the marker `draws`.

    Drawing takes half of the time to prepare a small dataset, and a third of a small epoch.
    """
    if request.node.get_closest_marker("draws") is None:
        from matplotlib.figure import Figure

        monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: file.write(_BLANK))


def _blank_png() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, format="png")
    return buffer.getvalue()


_BLANK = _blank_png()


@pytest.fixture(scope="session")
def storage_server() -> Iterator[str]:
    """Returns the address of the bare emulator, which does not enforce preconditions."""
    emulator, address = start_emulator()
    yield address
    emulator.stop()


@pytest.fixture(scope="session")
def _session_proxy(storage_server: str) -> Iterator[FaultProxy]:
    proxy = FaultProxy(storage_server)
    proxy.start()
    yield proxy
    proxy.close()


@dataclass(frozen=True)
class FaultyBucket:
    """A URL that no other test uses, and the proxy that can make requests to it fail."""

    url: str
    proxy: FaultProxy


@pytest.fixture
def faulty_bucket(
    _session_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultyBucket]:
    """Returns a `gs://` URL that no other test uses, and its proxy; child processes reach it."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", _session_proxy.address)
    _session_proxy.clear()
    yield FaultyBucket(f"gs://{BUCKET}/case-{next(_numbers)}", _session_proxy)
    _session_proxy.clear()


@pytest.fixture
def bucket_url(faulty_bucket: FaultyBucket) -> str:
    """Returns a `gs://` URL that no other test uses; child processes reach it too."""
    return faulty_bucket.url


@pytest.fixture
def lax_bucket_url(storage_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Returns a `gs://` URL on a server that ignores preconditions."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", storage_server)
    return f"gs://{BUCKET}/case-{next(_numbers)}"


@pytest.fixture
def record_fault() -> Callable[[str, int, int, str], None]:
    """Returns a function that adds a line (row, tried, lost, note) to $FLEXUNET_FAULTS_FILE."""

    def record(row: str, tried: int, lost: int, note: str) -> None:
        path = os.environ.get("FLEXUNET_FAULTS_FILE")
        if path:
            test = os.environ["PYTEST_CURRENT_TEST"].split(" (")[0]
            line = {"row": row, "tried": tried, "lost": lost, "note": note, "test": test}
            with open(path, "a") as file:
                file.write(json.dumps(line) + "\n")

    return record
