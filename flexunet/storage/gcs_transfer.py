"""Transfers large objects: uploads in parts, repeated downloads."""

import contextlib
import re
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar

from flexunet.errors import StorageError

T = TypeVar("T")
_PIECE_BYTES = 1 << 14
_PART_BYTES = 32 << 20  # kept in memory; the server requires a multiple of 256 KiB
_MAX_DOWNLOADS = 3  # of one object whose bytes changed during the download


class ChangedOnTheWay(StorageError):
    """The downloaded bytes do not match the object on the server, or no longer do."""


class SessionLost(StorageError):
    """The server has dropped an upload session."""


class UploadInParts:
    """Uploads a file in an upload session; does not resend bytes that have arrived.

    The client library also uploads in parts, but raises ValueError if a part before the last one
    has to be repeated (google-cloud-storage 3.17.1).
    """

    def __init__(
        self,
        http: Any,
        url: str,
        file: BinaryIO,
        size: int,
        timeout_s: float,
        moved: Callable[[], None],
    ) -> None:
        self._http = http
        self._url = url
        self._file = file
        self._size = size
        self._timeout_s = timeout_s
        self._moved = moved
        self._offset: int | None = 0  # bytes that have arrived; None: unknown, ask the server
        self.num_arrived = 0  # bytes, as last reported by the server

    def send_next(self) -> dict[str, Any] | None:
        """Sends the next part; returns the object's metadata after the last part.

        Raises:
            SessionLost: the server has dropped the session.
        """
        if self._offset is None:
            found = self.ask()
            if found or self._offset is None:
                return found
        offset, self._offset = self._offset, None
        self._file.seek(offset)
        data = self._file.read(_PART_BYTES)
        body = _WatchedBytes(data, self._moved)
        return self._put(body, f"bytes {offset}-{offset + len(data) - 1}/{self._size}")

    def ask(self) -> dict[str, Any] | None:
        """Asks the server how much has arrived; returns the object's metadata if all of it has."""
        return self._put(b"", f"bytes */{self._size}")

    def _put(self, data: Any, content_range: str) -> dict[str, Any] | None:
        import google.api_core.exceptions as api

        headers = {"Content-Range": content_range}
        answer = self._http.put(self._url, data=data, headers=headers, timeout=self._timeout_s)
        if answer.status_code in (200, 201):
            found: dict[str, Any] = answer.json()
            return found
        if answer.status_code in (404, 410):
            raise SessionLost(f"{self._url}: the server has lost the upload; try again")
        if answer.status_code != 308:
            raise api.from_http_response(answer)  # type: ignore[no-untyped-call]
        arrived = re.fullmatch(r"bytes=0-(\d+)", answer.headers.get("Range", ""))
        self._offset = self.num_arrived = int(arrived[1]) + 1 if arrived else 0
        if self._offset >= self._size:
            raise SessionLost(f"{self._url}: the server does not end the upload; try again")
        return None


class _WatchedBytes:
    """A request body that calls `moved` for every piece sent."""

    def __init__(self, data: bytes, moved: Callable[[], None]) -> None:
        self._data = memoryview(data)
        self._moved = moved
        self._begin = 0

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[bytes]:  # `requests` recognizes a stream by this method
        while piece := self.read(_PIECE_BYTES):
            yield piece

    def read(self, size: int = -1) -> bytes:
        """Returns the next bytes; after the end starts again, for a repeated request."""
        end = len(self._data) if size < 0 else self._begin + size
        piece = bytes(self._data[self._begin : end])
        self._begin = self._begin + len(piece) if piece else 0
        self._moved()
        return piece


class WatchedFile:
    """A writable file that calls `moved` for every write.

    Attributes:
        written_at: time of the last write, at first of the creation; from `time.monotonic`.
    """

    def __init__(self, file: BinaryIO, moved: Callable[[], None]) -> None:
        self._file = file
        self._moved = moved
        self.written_at = time.monotonic()

    def write(self, data: bytes) -> int:
        """Writes `data` and records the time."""
        self._moved()
        self.written_at = time.monotonic()
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def unchanged(fetch: Callable[[], T], url: str) -> T:
    """Returns the result of `fetch`, which reads `url`; repeats it if bytes changed meanwhile."""
    from google.cloud.storage.exceptions import DataCorruption

    for _ in range(_MAX_DOWNLOADS - 1):
        with contextlib.suppress(DataCorruption, ChangedOnTheWay), _report_replaced(url):
            return fetch()
    with _report_replaced(url):
        return fetch()


@contextlib.contextmanager
def _report_replaced(url: str) -> Iterator[None]:
    """Raises ChangedOnTheWay if an object was replaced during its download, not if it is missing.

    After an interrupted download, the client library requests the rest of the same generation.
    """
    from google.api_core.exceptions import NotFound as NoSuchObject

    try:
        yield
    except NoSuchObject as error:
        query = urllib.parse.urlsplit(error.response.request.url).query
        if "generation" in urllib.parse.parse_qs(query):
            raise ChangedOnTheWay(
                f"{url}: another process replaced or deleted it while it was read; try again"
            ) from error
        raise
