"""Stores objects in a Google Cloud Storage bucket, with retries and resumed transfers."""

import base64
import contextlib
import functools
import io
import itertools
import mimetypes
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from flexunet.errors import FlexUNetError, StorageError, UsageError
from flexunet.storage.base import NotFound, ObjectMeta, do_nothing, refused
from flexunet.storage.gcs_errors import describe_cloud_error, is_transient
from flexunet.storage.gcs_transfer import (
    ChangedOnTheWay,
    SessionLost,
    UploadInParts,
    WatchedFile,
    unchanged,
)
from flexunet.storage.local_files import (
    crc32c_of,
    crc32c_of_file,
    crc32c_of_stream,
    local_errors,
    whole_file,
)
from flexunet.storage.names import checked_name, join_url, name_problem, shown

RETRY_S = 120.0
_MAX_TIMEOUT_S = 30.0  # to connect, and between two bytes of a response
_MAX_PAUSE_S = 10.0  # between two attempts
_MAX_SESSIONS = 3  # of one upload in parts; a server may drop a session
_SINGLE_BYTES = 8 << 20  # objects up to this size are uploaded in one request
_NUM_CONNECTIONS = 32  # kept open by a process
_BUCKET = re.compile(r"[a-z0-9][-a-z0-9._]{1,220}[a-z0-9]")
_opening = threading.Lock()  # or the first requests of threads would open a client each


class GcsStore:
    """Stores objects below `gs://bucket/prefix` with google-cloud-storage.

    Uses the application-default credentials, or none if STORAGE_EMULATOR_HOST is set. After a
    transient failure (network, 408, 429, 5xx) a request is repeated, with random pauses, until
    `retry_s` seconds have passed; then it raises `Unavailable`. A request waits at most `timeout_s`
    (30 s, or half of `retry_s`) for a byte. A missing bucket, permission or credential and an
    untrusted server certificate raise an error at once.
    """

    def __init__(
        self,
        url: str,
        *,
        retry_s: float = RETRY_S,
        timeout_s: float | None = None,
        moved: Callable[[], None] = do_nothing,
        check: Callable[[], None] = do_nothing,
    ) -> None:
        bucket, _, prefix = url.removeprefix("gs://").partition("/")
        prefix = prefix.strip("/")
        if not _BUCKET.fullmatch(bucket):
            raise UsageError(f"storage URL {url!r}: {bucket!r} is not a bucket name")
        problem = name_problem(prefix) if prefix else None
        if problem:
            raise UsageError(f"storage URL {shown(url)}: {problem}")
        self.url = join_url(f"gs://{bucket}", prefix) if prefix else f"gs://{bucket}"
        self.local_root: str | None = None
        self._bucket = bucket
        self._folder = f"{prefix}/" if prefix else ""
        self.retry_s = retry_s
        self._timeout_s = timeout_s or min(max(retry_s / 2, 1.0), _MAX_TIMEOUT_S)
        self._moved = moved
        self._check = check

    def __repr__(self) -> str:
        return f"GcsStore({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GcsStore) and other.url == self.url

    def __hash__(self) -> int:
        return hash(self.url)

    def stat(self, name: str) -> ObjectMeta | None:
        """See `ObjectStore.stat`."""
        blob = self._blob(name)
        try:
            with self._errors("read", name):
                blob.reload(retry=self._retry(), timeout=self._timeout_s)
        except NotFound:
            return None
        return _blob_stat(name, blob)

    def list(self, prefix: str = "", *, most: int | None = None) -> list[ObjectMeta]:
        """See `ObjectStore.list`; skips the empty objects that represent folders."""
        with self._errors("list", prefix, missing="bucket"):
            blobs = self._client().list_blobs(
                self._bucket,
                prefix=self._folder + prefix,
                fields="items(name,size,generation,crc32c,contentEncoding),nextPageToken",
                retry=self._retry(),
                timeout=self._timeout_s,
            )
            found = (_blob_stat(blob.name[len(self._folder) :], blob) for blob in blobs)
            files = list(itertools.islice((s for s in found if not s.name.endswith("/")), most))
        return sorted(files, key=lambda stat: stat.name)

    def folders(self) -> tuple[str, ...]:
        """See `ObjectStore.folders`."""
        with self._errors("list", "", missing="bucket"):
            pages = self._client().list_blobs(
                self._bucket, prefix=self._folder, delimiter="/",
                fields="prefixes,nextPageToken", retry=self._retry(), timeout=self._timeout_s,
            )  # fmt: skip
            list(pages)  # the prefixes are known after all pages
        return tuple(sorted(name[len(self._folder) : -1] for name in pages.prefixes))

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """See `ObjectStore.get`."""

        def fetch() -> bytes:
            blob = self._blob(name)
            data = self._download(blob, start, length)
            if start == 0 and length is None:
                self._verify(name, blob, crc32c_of(data))
            self._moved()
            return data

        with self._errors("read", name):
            return unchanged(fetch, join_url(self.url, name))

    def get_file(self, name: str, path: str) -> int:
        """See `ObjectStore.get_file`."""

        def fetch() -> int:
            with whole_file(path) as file:
                blob = self._blob(name)
                target = WatchedFile(file, self._moved)
                blob.download_to_file(
                    target, retry=self._retry_while(target), timeout=self._timeout_s
                )
                file.flush()
                value = crc32c_of_file(file.name)
                self._verify(name, blob, value)
            return value

        with self._errors("read", name):
            return unchanged(fetch, join_url(self.url, name))

    def put(self, name: str, data: bytes, *, if_generation: int | None = None) -> ObjectMeta:
        """See `ObjectStore.put`."""
        return self._put_stream(name, io.BytesIO(data), len(data), if_generation)

    def put_file(self, name: str, path: str, *, if_generation: int | None = None) -> ObjectMeta:
        """See `ObjectStore.put_file`."""
        with local_errors("read", path), open(path, "rb") as file:
            return self._put_stream(name, file, os.fstat(file.fileno()).st_size, if_generation)

    def delete(self, name: str) -> None:
        """See `ObjectStore.delete`."""
        self._check()
        with contextlib.suppress(NotFound), self._errors("delete", name):
            retry = self._retry(lambda error: self._check())
            self._blob(name).delete(retry=retry, timeout=self._timeout_s)

    def subpath(self, prefix: str) -> "GcsStore":
        """See `ObjectStore.subpath`."""
        url = join_url(self.url, checked_name(prefix))
        return self._like(url)

    def with_limits(self, *, retry_s: float, timeout_s: float) -> "GcsStore":
        """See `ObjectStore.with_limits`."""
        return self._like(retry_s=retry_s, timeout_s=timeout_s)

    def watched(self, moved: Callable[[], None]) -> "GcsStore":
        """See `ObjectStore.watched`."""
        return self._like(moved=moved)

    def guarded(self, check: Callable[[], None]) -> "GcsStore":
        """See `ObjectStore.guarded`."""
        return self._like(check=check)

    def _like(self, url: str | None = None, **changes: Any) -> "GcsStore":
        """Returns the same storage with the given changes."""
        own: dict[str, Any] = {
            "retry_s": self.retry_s,
            "timeout_s": self._timeout_s,
            "moved": self._moved,
            "check": self._check,
        }
        return GcsStore(url or self.url, **(own | changes))

    def remove_unfinished(self) -> int:
        """See `ObjectStore.remove_unfinished`; the server drops unfinished uploads itself."""
        return 0

    def _client(self) -> Any:
        with self._errors("open", ""), _opening:
            return _cloud_client(os.getpid(), os.environ.get("STORAGE_EMULATOR_HOST"))

    def _blob(self, name: str) -> Any:
        return self._client().bucket(self._bucket).blob(self._folder + checked_name(name))

    def _retry(self, on_failure: Callable[[Exception], Any] | None = None) -> Any:
        """Returns the retry rule for transient failures; calls `on_failure` for each failure."""
        from google.api_core.retry import Retry

        def on_error(error: Exception) -> None:
            # The client library leaves the connection of a refused download open.
            response = getattr(error, "response", None)
            if response is not None:
                response.close()
            if on_failure is not None:
                on_failure(error)

        # Pauses are random, from 0 to a limit that doubles from 0.2 s up to `maximum`.
        return Retry(
            predicate=is_transient, initial=0.2, maximum=min(self._timeout_s, _MAX_PAUSE_S),
            timeout=self.retry_s, on_error=on_error,
        )  # fmt: skip

    def _retry_while(self, target: "WatchedFile") -> Any:
        """Returns the retry rule for a download: no limit as long as bytes arrive.

        The client library continues where the download was interrupted.
        """
        from google.api_core.exceptions import RetryError

        def give_up(error: Exception) -> None:
            if time.monotonic() - target.written_at > self.retry_s:
                message = f"no data for {self.retry_s:.1f} s, last exception: {error}"
                raise RetryError(message, error) from error  # type: ignore[no-untyped-call]

        return self._retry(give_up).with_timeout(None)

    def _download(self, blob: Any, start: int, length: int | None) -> bytes:
        from google.api_core.exceptions import RequestRangeNotSatisfiable

        # An empty range cannot be requested; one byte also shows whether the object exists.
        end = None if length is None else start + max(length, 1) - 1
        try:
            data: bytes = blob.download_as_bytes(
                start=start or None, end=end, retry=self._retry(), timeout=self._timeout_s
            )
        except RequestRangeNotSatisfiable:
            return b""
        return data if length is None else data[:length]

    def _verify(self, name: str, blob: Any, value: int) -> None:
        if blob.crc32c is None:
            raise StorageError(f"{join_url(self.url, name)}: the server sent no crc32c checksum")
        # With this encoding the server's checksum covers the compressed bytes, which the client
        # library has checked.
        if blob.content_encoding != "gzip" and value != _decoded_crc32c(blob.crc32c):
            raise ChangedOnTheWay(
                f"{join_url(self.url, name)}: the downloaded bytes do not match the server's "
                "crc32c; try again"
            )

    def _put_stream(
        self, name: str, file: BinaryIO, size: int, if_generation: int | None
    ) -> ObjectMeta:
        """Uploads `file`, in one request or in parts."""

        def send(blob: Any, **options: Any) -> ObjectMeta:
            file.seek(0)
            blob.upload_from_file(file, size=size, checksum="crc32c", **options)
            return _blob_stat(name, blob)

        def send_parts(blob: Any, **options: Any) -> ObjectMeta:
            return self._send_parts(name, blob, file, size, options)

        return self._upload(name, send if size <= _SINGLE_BYTES else send_parts, if_generation)

    def _send_parts(
        self, name: str, blob: Any, file: BinaryIO, size: int, options: dict[str, Any]
    ) -> ObjectMeta:
        """Uploads a large file in parts, in a session that carries the conditions."""
        blob.crc32c = base64.b64encode(crc32c_of_stream(file).to_bytes(4, "big")).decode()
        for _ in range(_MAX_SESSIONS - 1):
            with contextlib.suppress(SessionLost):
                return self._send_session(name, blob, file, size, options)
        return self._send_session(name, blob, file, size, options)

    def _send_session(
        self, name: str, blob: Any, file: BinaryIO, size: int, options: dict[str, Any]
    ) -> ObjectMeta:
        from google.api_core.exceptions import RetryError

        url = blob.create_resumable_upload_session(size=size, checksum=None, **options)
        http = self._client()._http
        upload = UploadInParts(http, url, file, size, self._timeout_s, self._moved)
        repeated, found = options["retry"], None
        while found is None:
            before = upload.num_arrived
            try:
                found = repeated(upload.send_next)()
            except RetryError:
                # On a slow connection a part may use up that time before it fails: the upload
                # continues as long as some bytes arrive.
                found = repeated(upload.ask)()
                if found is None and upload.num_arrived == before:
                    raise
        crc32c = _decoded_crc32c(found["crc32c"])
        return ObjectMeta(name, int(found["size"]), int(found["generation"]), crc32c)

    def _upload(
        self, name: str, send: Callable[..., ObjectMeta], if_generation: int | None
    ) -> ObjectMeta:
        from google.api_core.exceptions import PreconditionFailed as Conflict

        self._check()
        blob = self._blob(name)
        interrupted: list[Exception] = []

        def on_error(error: Exception) -> None:
            interrupted.append(error)
            self._check()

        options: dict[str, Any] = {
            "content_type": mimetypes.guess_type(name)[0] or "application/octet-stream",
            "retry": self._retry(on_error),
            "timeout": self._timeout_s,
        }
        token = uuid.uuid4().hex
        if if_generation is not None:
            options["if_generation_match"] = if_generation
            blob.metadata = {"flexunet-put": token}
        with self._errors("write", name, missing="bucket"):
            try:
                stat = send(blob, **options)
                self._moved()
                return stat
            except Conflict as error:
                # If the response of a successful put was lost, its repetition is refused.
                if not (interrupted and self._is_stored(name, token)):
                    found = self.stat(name)
                    raise refused(
                        join_url(self.url, name), if_generation, found.generation if found else 0
                    ) from error
                blob.reload(retry=self._retry(), timeout=self._timeout_s)
            return _blob_stat(name, blob)

    def _is_stored(self, name: str, token: str) -> bool:
        blob = self._blob(name)
        with contextlib.suppress(NotFound), self._errors("read", name):
            blob.reload(retry=self._retry(), timeout=self._timeout_s)
            return (blob.metadata or {}).get("flexunet-put") == token
        return False

    @contextlib.contextmanager
    def _errors(self, action: str, name: str, missing: str = "object") -> Iterator[None]:
        """Converts errors of the client library into FlexUNetError."""
        try:
            yield
        except FlexUNetError:
            raise
        except Exception as error:
            url = join_url(self.url, name) if name else self.url
            described = describe_cloud_error(error, action, url, self._bucket, missing)
            if described is None:
                raise
            raise described from error


@functools.lru_cache(maxsize=4)
def _cloud_client(process_id: int, emulator: str | None) -> Any:
    """Returns the client of this process; forked processes must not share connections."""
    from google.cloud import storage

    # Since 3.11 a client also requests the bucket's metadata with the first object. An account with
    # access to objects only is refused, with an error in the bucket's audit log. No other option
    # turns it off (https://github.com/googleapis/google-cloud-python/issues/17650).
    os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
    if emulator is None:
        client = storage.Client()
    else:
        endpoint = emulator if "://" in emulator else f"http://{emulator}"
        client = storage.Client(project="emulator", client_options={"api_endpoint": endpoint})
    # Threads share the client; beyond 10 connections it would open one per request, with a warning.
    # The adapters stay, because one may have a client certificate.
    for adapter in client._http.adapters.values():
        adapter.init_poolmanager(_NUM_CONNECTIONS, _NUM_CONNECTIONS)
    return client


def _blob_stat(name: str, blob: Any) -> ObjectMeta:
    # The server's checksum is that of the compressed bytes, but a get returns others.
    crc32c = None if blob.content_encoding == "gzip" else _decoded_crc32c(blob.crc32c)
    return ObjectMeta(name, int(blob.size), int(blob.generation), crc32c)


def _decoded_crc32c(text: str | None) -> int | None:
    return None if text is None else int.from_bytes(base64.b64decode(text), "big")
