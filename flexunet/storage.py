"""The only code that talks to storage: local folders and Google Cloud Storage behind one `Store`.

Objects have names relative to the store's URL, separated by `/`. A put is atomic on both: a reader
sees the old object, the new one or none, never a part. Conditional puts compare generations,
numbers that change with every write. It must not know what the objects mean.
"""

import base64
import contextlib
import copy
import errno
import fcntl
import functools
import io
import itertools
import logging
import mimetypes
import os
import re
import ssl
import stat as stat_module
import time
import unicodedata
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Protocol, TypeVar

import google_crc32c

from flexunet.errors import ContentError, FlexUNetError, StorageError, UsageError
from flexunet.text import is_invisible

logger = logging.getLogger(__name__)

T = TypeVar("T")

_HIDDEN = ".flexunet-"  # our own temporary and lock files; never listed, never a name
_TEMPORARY = f"{_HIDDEN}tmp-"
_LOCK = f"{_HIDDEN}lock"
_CHUNK_BYTES = 1 << 20
_PIECE_BYTES = 1 << 14
_MAX_PART_BYTES = 255  # NAME_MAX of every Linux file system
_MAX_NAME_BYTES = 1024  # https://cloud.google.com/storage/docs/objects#naming
_RETRY_S = 120.0
_MAX_TIMEOUT_S = 30.0  # to connect, and between two bytes of an answer
_MAX_PAUSE_S = 10.0  # between two tries
_MAX_DOWNLOADS = 3  # of one object whose bytes changed on the way
_MAX_SESSIONS = 3  # of one upload in parts; a server may forget a session
_MAX_FOLDERS = 100  # made for one put, while other processes delete them
_SINGLE_BYTES = 8 << 20  # up to here an object is uploaded in one request
_PART_BYTES = 32 << 20  # held in memory; a multiple of 256 KiB, as the server wants
_TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)
# OpenSSL's reasons of a handshake that fails each time; a broken line has others.
_REFUSED_TLS = re.compile("CERTIFICATE|CIPHER|HANDSHAKE|HTTP|PROTOCOL|UNKNOWN_CA|VERSION")
_BUCKET = re.compile(r"[a-z0-9][-a-z0-9._]{1,220}[a-z0-9]")


BROKEN_LINK = "is a symbolic link that leads to no file; mend it or delete it"


class PreconditionFailed(StorageError):
    """The object is not in the generation that a conditional put expected."""


class Unavailable(StorageError):
    """Storage was out of reach for longer than requests are repeated; later it may be back."""


class NotFound(StorageError):
    """The object does not exist."""


class Forbidden(StorageError):
    """The bucket's roles do not let these credentials do it."""


class NotAFolder(UsageError, StorageError):
    """A file lies where a folder should be: a mistake, and of a run that is on its way a failure.

    It is a StorageError for those who keep what could not be stored.
    """


class _ChangedOnTheWay(StorageError):
    """The downloaded bytes are not, or no longer, those that the server has."""


class _SessionLost(StorageError):
    """The server has forgotten an upload in parts."""


@dataclass(frozen=True)
class Stat:
    """What storage says about one object.

    `generation` changes with every write. `crc32c` is None for local files: they are not read.
    """

    name: str
    size: int
    generation: int
    crc32c: int | None


class Store(Protocol):
    """Named objects below one URL. Every failure is a StorageError of one line.

    Stores pickle, unless they are watched or guarded.
    """

    @property
    def url(self) -> str:
        """The folder or `gs://` URL, without a slash at its end."""
        ...

    @property
    def local_root(self) -> str | None:
        """The path of the folder, None where objects have to be downloaded."""
        ...

    @property
    def retry_s(self) -> float:
        """Seconds for which a transient failure is repeated, 0 where there are none."""
        ...

    def stat(self, name: str) -> Stat | None:
        """Returns what is known about an object, None when it does not exist."""
        ...

    def list(self, prefix: str = "") -> list[Stat]:
        """Returns every object whose name starts with `prefix`, sorted by name.

        A prefix is compared as text: end it with `/` to mean a folder. Unfinished puts never show.
        """
        ...

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Returns the bytes of an object from `start`; fewer than `length` only at its end.

        A whole object is checked against the server's checksum, a range is not.

        Raises:
            NotFound: there is no such object.
        """
        ...

    def get_file(self, name: str, path: str) -> int:
        """Writes an object to the local `path`, whole or not at all, and returns its crc32c.

        Raises:
            NotFound: there is no such object.
        """
        ...

    def put(self, name: str, data: bytes, *, if_generation: int | None = None) -> Stat:
        """Stores `data`.

        Args:
            if_generation: only when the object is in this generation; 0: only when it is missing.

        Raises:
            PreconditionFailed: it is in another one; nothing was written.
        """
        ...

    def put_file(self, name: str, path: str, *, if_generation: int | None = None) -> Stat:
        """Stores the content of the local file `path`; otherwise as `put`."""
        ...

    def delete(self, name: str) -> None:
        """Deletes an object; a missing one is fine."""
        ...

    def below(self, prefix: str) -> "Store":
        """Returns the same storage, rooted in the folder `prefix`."""
        ...

    def with_limits(self, *, retry_s: float, timeout_s: float) -> "Store":
        """Returns the same storage with other limits.

        Args:
            retry_s: seconds for which a transient failure is repeated.
            timeout_s: the longest wait for a byte, and the longest pause between two tries.
        """
        ...

    def watched(self, moved: Callable[[], None]) -> "Store":
        """Returns the same storage, which calls `moved` whenever bytes of an object have moved.

        A large file calls it many times on its way, in either direction, in the thread that puts or
        gets it; other objects once, at their end.
        """
        ...

    def guarded(self, check: Callable[[], None]) -> "Store":
        """Returns the same storage, which calls `check` before every try of a put or a delete.

        What `check` raises ends the put or delete, also one that is being repeated.
        """
        ...

    def remove_unfinished(self) -> int:
        """Deletes what killed puts left behind and returns how many; only for the sole writer."""
        ...


def _do_nothing() -> None:
    """Stands for `moved` and `check` where nobody asks."""


def open_store(url: str, *, retry_s: float = _RETRY_S) -> Store:
    """Returns the store at `url`: `gs://bucket/prefix`, a folder's path, or `file:///path`.

    Nothing is read or written yet.

    Args:
        retry_s: seconds for which a transient failure is repeated; folders have none.

    Raises:
        UsageError: the URL is of another kind or not well formed.
    """
    if re.match(r"(gs|file):/?([^/]|$)", url):
        raise UsageError(f"storage URL {url!r} lacks a slash; write gs://bucket or file:///path")
    scheme, found, rest = url.partition("://")
    if not found:
        if not url or "\0" in url:
            raise UsageError(f"{url!r} is not a folder or storage URL; give a path or gs://bucket")
        return LocalStore(url)
    if scheme == "gs":
        return GcsStore(url, retry_s=retry_s)
    if scheme == "file" and rest.startswith("/"):
        return LocalStore(urllib.parse.unquote(rest))
    raise UsageError(
        f"storage URL {url!r} is not supported; use gs://bucket/folder, a folder's path or "
        "file:///path"
    )


def open_source(url: str) -> Store:
    """Returns the store at `url` to read what a user names: in a folder, all links are followed.

    So pictures may be links to another folder or disk. What is written, and what programs wrote
    into a dataset or a run, is for `open_store`, which follows no link that leads out of it.

    Raises:
        UsageError: as `open_store`.
    """
    store = open_store(url)
    return store.following_links() if isinstance(store, LocalStore) else store


def join_url(url: str, *parts: str) -> str:
    """Returns `url` with `parts` below it, one slash between them."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def is_file(store: Store) -> bool:
    """Returns whether a file lies where the store's local folder should be."""
    return store.local_root is not None and os.path.isfile(store.local_root)


def folder_problem(store: Store) -> str | None:
    """Returns why a store has no local folder to read; None where it has, and of a bucket."""
    if store.local_root is None or os.path.isdir(store.local_root):
        return None
    return "is a file, not a folder" if is_file(store) else "does not exist"


def lies_in(inner: Store, outer: Store) -> bool:
    """Returns whether `inner` is `outer` or a folder in it, also by way of symbolic links."""
    return _is_inside(_real_url(inner), _real_url(outer))


def _real_url(store: Store) -> str:
    return os.path.realpath(store.local_root) if store.local_root else store.url


def checked_name(name: str) -> str:
    """Returns `name` when it is a safe object name.

    Names come from listings and manifests, so they are not trusted: whoever accepts one may join
    it to a folder.

    Raises:
        ContentError: it is empty, absolute or could leave its folder, or holds characters that one
            of the storages or a terminal would not keep as they are.
    """
    problem = name_problem(name)
    if problem:
        raise ContentError(f"object name {_shown(name)} is refused: {problem}; rename the object")
    return name


def name_problem(name: str) -> str | None:
    """Returns why `name` is not a safe object name (see `checked_name`), None when it is."""
    for character in name:
        if unicodedata.category(character) == "Cs":
            return "it is not UTF-8"
        if unicodedata.category(character) in ("Cc", "Zl", "Zp"):
            return f"it holds the control character {character!a}"
        if is_invisible(character):  # the name could look like another one
            return f"it holds {character!a}, which is invisible or turns the text around"
    if not unicodedata.is_normalized("NFC", name):
        return "it is not in Unicode normal form C"
    if "\\" in name:
        return "it holds a backslash"
    if re.match(r"[A-Za-z]:", name):
        return "it starts with a drive letter"
    parts = name.split("/")
    if "" in parts:
        return "it is absolute, or a part of it is empty"
    for part in parts:
        if part in (".", ".."):
            return f"it holds {part!r}"
        if part.startswith(_HIDDEN):
            return f"names that start with {_HIDDEN!r} are reserved"
        if len(part.encode()) > _MAX_PART_BYTES:
            return f"a part of it is longer than {_MAX_PART_BYTES} bytes"
    if len(name.encode()) > _MAX_NAME_BYTES:
        return f"it is longer than {_MAX_NAME_BYTES} bytes"
    return None


def local_path(root: str, name: str) -> str:
    """Returns the path of object `name` in the folder `root`.

    Raises:
        ContentError: the name is not safe, or a symbolic link leads out of `root`.
    """
    path = os.path.join(root, checked_name(name))
    # Without a link below the root it is inside; to resolve both asks for every folder above.
    if _has_link(root, name) and not _is_inside(os.path.realpath(path), os.path.realpath(root)):
        raise ContentError(f"{path}: a symbolic link leads out of {root}; copy the file into it")
    return path


def _has_link(root: str, name: str) -> bool:
    parts = itertools.accumulate(name.split("/"), os.path.join)
    return any(os.path.islink(os.path.join(root, part)) for part in parts)


def crc32c_of(data: bytes, value: int = 0) -> int:
    """Returns the CRC-32C (RFC 3720) of `data`, continuing from `value`."""
    return int(google_crc32c.extend(value, data))


def crc32c_of_file(path: str) -> int:
    """Returns the CRC-32C of a local file's bytes.

    Raises:
        StorageError: the file cannot be read.
    """
    with _local_errors("read", path), open(path, "rb") as file:
        return _crc32c_of_stream(file)


def _crc32c_of_stream(file: BinaryIO) -> int:
    file.seek(0)
    value = 0
    while chunk := file.read(_CHUNK_BYTES):
        value = crc32c_of(chunk, value)
    return value


def put_if_other(store: Store, name: str, data: bytes) -> None:
    """Puts `data` unless the object holds it already: who may create may not always replace."""
    stat = store.stat(name)
    if stat is None or not holds(store, stat, data):
        store.put(name, data)


def holds(store: Store, stat: Stat, data: bytes) -> bool:
    """Returns whether the object has the size and the CRC-32C of `data`."""
    if stat.size != len(data):
        return False
    found = crc32c_of(store.get(stat.name)) if stat.crc32c is None else stat.crc32c
    return found == crc32c_of(data)


def probe_writable(store: Store, *, may_stay: bool = False) -> None:
    """Puts, gets and deletes a small object of a name nobody else has.

    Args:
        may_stay: leave it where the credentials may create and view, but not delete.

    Raises:
        StorageError: one of them fails; the message says what is missing.
    """
    name = f"flexunet-probe-{uuid.uuid4().hex}"
    data = name.encode()
    store.put(name, data, if_generation=0)
    try:
        if store.get(name) != data:
            raise StorageError(f"{store.url}: a probe came back with other bytes; check the server")
    finally:
        try:
            store.delete(name)
        except Forbidden:
            if not may_stay:
                raise


def probe_preconditions(store: Store) -> None:
    """Checks that conditional puts are conditional, on which locks and commits rest.

    Raises:
        StorageError: the server ignores them (as gcp-storage-emulator 2024.8.3 does), or fails.
    """
    name = f"flexunet-probe-{uuid.uuid4().hex}"
    first = store.put(name, b"first", if_generation=0)
    try:
        for generation in (0, first.generation - 1):
            with contextlib.suppress(PreconditionFailed):
                store.put(name, b"second", if_generation=generation)
                raise StorageError(
                    f"{store.url}: the server does not enforce preconditions, so two processes "
                    "could own one run; use Google Cloud Storage or a folder"
                )
    finally:
        store.delete(name)


@dataclass(frozen=True, init=False)
class LocalStore:
    """A folder. It comes into being with the first put.

    Generations are modification times in ns, strictly increasing from put to put. A put without a
    condition takes no part in the locking of those with one: do not mix both on one object.
    """

    url: str
    _follows_links: bool  # to read; nothing is ever put or deleted through a link that leads out
    _moved: Callable[[], None] = field(repr=False, compare=False)
    _check: Callable[[], None] = field(repr=False, compare=False)

    def __init__(
        self,
        path: str,
        *,
        follows_links: bool = False,
        moved: Callable[[], None] = _do_nothing,
        check: Callable[[], None] = _do_nothing,
    ) -> None:
        object.__setattr__(self, "url", os.path.abspath(path))
        object.__setattr__(self, "_follows_links", follows_links)
        object.__setattr__(self, "_moved", moved)
        object.__setattr__(self, "_check", check)

    @property
    def local_root(self) -> str:
        """The path of the folder."""
        return self.url

    @property
    def retry_s(self) -> float:
        """A folder's failures are not transient."""
        return 0.0

    def following_links(self) -> "LocalStore":
        """Returns the same folder, read with all its links."""
        return self._with("_follows_links", True)

    def stat(self, name: str) -> Stat | None:
        """See `Store.stat`."""
        path = self._read_path(name)
        with _local_errors("read", path):
            return _stat_path(name, path)

    def list(self, prefix: str = "") -> list[Stat]:
        """See `Store.list`; links to files inside the folder are listed, other links are not.

        Where links are followed, those that lead to no file are listed too, with size 0, and `stat`
        does not know them; only what leads to a folder that it lies in is left out.
        """
        folder = prefix.rpartition("/")[0]
        top = self._read_path(folder) if folder else self.url
        left_out: list[str] = []
        with _local_errors("list", top):
            if self._follows_links:
                files = _walk_links(top, folder, _with_folders_above(top), left_out)
            else:
                files = _walk(top, folder, os.path.realpath(self.url), left_out)
            found = [
                Stat(name, _size_of(info), info.st_mtime_ns, None)
                for name, info in files
                if name.startswith(prefix)
            ]
        if left_out:
            where = "to a folder above" if self._follows_links else "to folders or out of it"
            _tell_left_out(self.url, len(left_out), where, min(left_out))
        return sorted(found, key=lambda stat: stat.name)

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """See `Store.get`."""
        path = self._file_path(name)
        with _local_errors("read", path), open(path, "rb") as file:
            file.seek(start)
            data = file.read(-1 if length is None else length)
        self._moved()
        return data

    def get_file(self, name: str, path: str) -> int:
        """See `Store.get_file`; the copy is not forced to disk."""
        source = self._file_path(name)
        value = 0
        with _local_errors("read", source), open(source, "rb") as file, _whole_file(path) as copy:
            while chunk := file.read(_CHUNK_BYTES):
                value = crc32c_of(chunk, value)
                copy.write(chunk)
                self._moved()
        return value

    def put(self, name: str, data: bytes, *, if_generation: int | None = None) -> Stat:
        """See `Store.put`."""
        stat = self._put(name, lambda file: file.write(data), if_generation)
        self._moved()
        return stat

    def put_file(self, name: str, path: str, *, if_generation: int | None = None) -> Stat:
        """See `Store.put_file`."""
        with _local_errors("read", path), open(path, "rb") as source:

            def copy(file: BinaryIO) -> None:
                while chunk := source.read(_CHUNK_BYTES):
                    file.write(chunk)
                    self._moved()

            return self._put(name, copy, if_generation)

    def delete(self, name: str) -> None:
        """See `Store.delete`; folders that become empty go too, up to the store's own."""
        self._check()
        path = local_path(self.url, name)
        with _local_errors("delete", path):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.unlink(path)
            folder = os.path.dirname(path)
            with contextlib.suppress(OSError):  # not empty, or somebody else was quicker
                while folder != self.url:
                    os.rmdir(folder)
                    folder = os.path.dirname(folder)

    def below(self, prefix: str) -> "LocalStore":
        """See `Store.below`."""
        return LocalStore(
            self._read_path(prefix),
            follows_links=self._follows_links,
            moved=self._moved,
            check=self._check,
        )

    def with_limits(self, *, retry_s: float, timeout_s: float) -> "LocalStore":
        """See `Store.with_limits`; a folder has none."""
        return self

    def watched(self, moved: Callable[[], None]) -> "LocalStore":
        """See `Store.watched`."""
        return self._with("_moved", moved)

    def guarded(self, check: Callable[[], None]) -> "LocalStore":
        """See `Store.guarded`."""
        return self._with("_check", check)

    def _with(self, name: str, value: Any) -> "LocalStore":
        twin = copy.copy(self)
        object.__setattr__(twin, name, value)
        return twin

    def remove_unfinished(self) -> int:
        """See `Store.remove_unfinished`."""
        self._check()
        num_removed = 0
        for folder, _, files in os.walk(self.url):
            for file in files:
                if file.startswith(_TEMPORARY):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(os.path.join(folder, file))
                        num_removed += 1
            if _LOCK in files:
                # The file goes with the lock; one that stays does no harm.
                with contextlib.suppress(OSError), _folder_lock(folder):
                    pass
        return num_removed

    def _read_path(self, name: str) -> str:
        if self._follows_links:
            return os.path.join(self.url, checked_name(name))
        return local_path(self.url, name)

    def _file_path(self, name: str) -> str:
        """Returns the path of a file to read; a source's link that leads to none is a bad file."""
        path = self._read_path(name)
        if self._follows_links and os.path.islink(path) and not os.path.isfile(path):
            raise ContentError(f"{path}: {BROKEN_LINK}")
        return path

    def _put(self, name: str, write: Callable[[Any], Any], if_generation: int | None) -> Stat:
        self._check()
        path = local_path(self.url, name)
        with _local_errors("write", path):
            file = _open_temporary(path)
            try:
                with file:
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())
                info = self._publish(file.name, path, if_generation)
                with contextlib.suppress(FileNotFoundError):  # another process has deleted both
                    _sync_folder(os.path.dirname(path))
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(file.name)
        return Stat(name, info.st_size, info.st_mtime_ns, None)

    def _publish(self, temporary: str, path: str, if_generation: int | None) -> os.stat_result:
        """Gives a file its name; returns its own stat, as the next writer may be here already."""
        if if_generation is None:
            info = _follow(temporary, _stat_path("", path))
            os.replace(temporary, path)
            return info
        if if_generation == 0:
            info = _follow(temporary, None)
            if _link(temporary, path):
                return info
        with _folder_lock(os.path.dirname(path)):
            found = _stat_path("", path)
            generation = found.generation if found else 0
            if generation != if_generation:
                raise _refused(path, if_generation, generation)
            info = _follow(temporary, found)
            os.replace(temporary, path)
            return info


class GcsStore:
    """Objects below `gs://bucket/prefix`, through google-cloud-storage.

    Credentials are the application-default ones; with STORAGE_EMULATOR_HOST set, none are used.
    A request that fails for the moment (network, 408, 429, 5xx) is repeated, after pauses of random
    length, until `retry_s` seconds have passed, and then is `Unavailable`; none waits longer than
    `timeout_s` (30 s, or half of `retry_s`) for a byte. A missing bucket, permission or credential
    is an error at once, and so is a server's certificate that is not trusted.
    """

    def __init__(
        self,
        url: str,
        *,
        retry_s: float = _RETRY_S,
        timeout_s: float | None = None,
        moved: Callable[[], None] = _do_nothing,
        check: Callable[[], None] = _do_nothing,
    ) -> None:
        bucket, _, prefix = url.removeprefix("gs://").partition("/")
        prefix = prefix.strip("/")
        if not _BUCKET.fullmatch(bucket):
            raise UsageError(f"storage URL {url!r}: {bucket!r} is not a bucket name")
        problem = name_problem(prefix) if prefix else None
        if problem:
            raise UsageError(f"storage URL {_shown(url)}: {problem}")
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

    def stat(self, name: str) -> Stat | None:
        """See `Store.stat`."""
        blob = self._blob(name)
        try:
            with self._errors("read", name):
                blob.reload(retry=self._retry(), timeout=self._timeout_s)
        except NotFound:
            return None
        return _blob_stat(name, blob)

    def list(self, prefix: str = "") -> list[Stat]:
        """See `Store.list`; the empty objects that stand for folders are left out."""
        with self._errors("list", prefix, missing="bucket"):
            blobs = self._client().list_blobs(
                self._bucket,
                prefix=self._folder + prefix,
                fields="items(name,size,generation,crc32c),nextPageToken",
                retry=self._retry(),
                timeout=self._timeout_s,
            )
            found = [_blob_stat(blob.name[len(self._folder) :], blob) for blob in blobs]
        return sorted((s for s in found if not s.name.endswith("/")), key=lambda s: s.name)

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """See `Store.get`."""

        def fetch() -> bytes:
            blob = self._blob(name)
            data = self._download(blob, start, length)
            if start == 0 and length is None:
                self._verify(name, blob, crc32c_of(data))
            self._moved()
            return data

        with self._errors("read", name):
            return _unchanged(fetch, join_url(self.url, name))

    def get_file(self, name: str, path: str) -> int:
        """See `Store.get_file`."""

        def fetch() -> int:
            with _whole_file(path) as file:
                blob = self._blob(name)
                target = _WatchedFile(file, self._moved)
                blob.download_to_file(
                    target, retry=self._retry_while(target), timeout=self._timeout_s
                )
                file.flush()
                value = crc32c_of_file(file.name)
                self._verify(name, blob, value)
            return value

        with self._errors("read", name):
            return _unchanged(fetch, join_url(self.url, name))

    def put(self, name: str, data: bytes, *, if_generation: int | None = None) -> Stat:
        """See `Store.put`."""
        return self._put_stream(name, io.BytesIO(data), len(data), if_generation)

    def put_file(self, name: str, path: str, *, if_generation: int | None = None) -> Stat:
        """See `Store.put_file`."""
        with _local_errors("read", path), open(path, "rb") as file:
            return self._put_stream(name, file, os.fstat(file.fileno()).st_size, if_generation)

    def delete(self, name: str) -> None:
        """See `Store.delete`."""
        self._check()
        with contextlib.suppress(NotFound), self._errors("delete", name):
            retry = self._retry(lambda error: self._check())
            self._blob(name).delete(retry=retry, timeout=self._timeout_s)

    def below(self, prefix: str) -> "GcsStore":
        """See `Store.below`."""
        url = join_url(self.url, checked_name(prefix))
        return self._like(url)

    def with_limits(self, *, retry_s: float, timeout_s: float) -> "GcsStore":
        """See `Store.with_limits`."""
        return self._like(retry_s=retry_s, timeout_s=timeout_s)

    def watched(self, moved: Callable[[], None]) -> "GcsStore":
        """See `Store.watched`."""
        return self._like(moved=moved)

    def guarded(self, check: Callable[[], None]) -> "GcsStore":
        """See `Store.guarded`."""
        return self._like(check=check)

    def _like(self, url: str | None = None, **changes: Any) -> "GcsStore":
        """Returns the same storage but for what is given."""
        own: dict[str, Any] = {
            "retry_s": self.retry_s,
            "timeout_s": self._timeout_s,
            "moved": self._moved,
            "check": self._check,
        }
        return GcsStore(url or self.url, **(own | changes))

    def remove_unfinished(self) -> int:
        """See `Store.remove_unfinished`; the server forgets unfinished uploads by itself."""
        return 0

    def _client(self) -> Any:
        with self._errors("open", ""):
            return _cloud_client(os.getpid(), os.environ.get("STORAGE_EMULATOR_HOST"))

    def _blob(self, name: str) -> Any:
        return self._client().bucket(self._bucket).blob(self._folder + checked_name(name))

    def _retry(self, tell: Callable[[Exception], Any] | None = None) -> Any:
        """Returns how transient failures are repeated; each is told to `tell`."""
        from google.api_core.retry import Retry

        def on_error(error: Exception) -> None:
            # The client library leaves the connection of a refused download open.
            response = getattr(error, "response", None)
            if response is not None:
                response.close()
            if tell is not None:
                tell(error)

        # The pauses are random, from 0 to a limit that doubles from 0.2 s to the largest one.
        return Retry(
            predicate=_is_transient, initial=0.2, maximum=min(self._timeout_s, _MAX_PAUSE_S),
            timeout=self.retry_s, on_error=on_error,
        )  # fmt: skip

    def _retry_while(self, target: "_WatchedFile") -> Any:
        """Returns how a download is repeated: as long as bytes come, however long all of it takes.

        The client library goes on where it broke off.
        """
        from google.api_core.exceptions import RetryError

        def give_up(error: Exception) -> None:
            if time.monotonic() - target.written_at > self.retry_s:
                message = f"nothing came for {self.retry_s:.1f} s, last exception: {error}"
                raise RetryError(message, error) from error  # type: ignore[no-untyped-call]

        return self._retry(give_up).with_timeout(None)

    def _download(self, blob: Any, start: int, length: int | None) -> bytes:
        from google.api_core.exceptions import RequestRangeNotSatisfiable

        # A range of no bytes cannot be asked for; one byte also tells whether the object exists.
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
        # With this encoding the server keeps the checksum of the packed bytes, and the client
        # library has checked those.
        if blob.content_encoding != "gzip" and value != _decoded_crc32c(blob.crc32c):
            raise _ChangedOnTheWay(
                f"{join_url(self.url, name)}: the downloaded bytes do not match the server's "
                "crc32c; try again"
            )

    def _put_stream(self, name: str, file: BinaryIO, size: int, if_generation: int | None) -> Stat:
        """Uploads `file`, in one request or in parts."""

        def send(blob: Any, **options: Any) -> Stat:
            file.seek(0)
            blob.upload_from_file(file, size=size, checksum="crc32c", **options)
            return _blob_stat(name, blob)

        def send_parts(blob: Any, **options: Any) -> Stat:
            return self._send_parts(name, blob, file, size, options)

        return self._upload(name, send if size <= _SINGLE_BYTES else send_parts, if_generation)

    def _send_parts(
        self, name: str, blob: Any, file: BinaryIO, size: int, options: dict[str, Any]
    ) -> Stat:
        """Uploads a large file in parts, in a session that carries the conditions."""
        blob.crc32c = base64.b64encode(_crc32c_of_stream(file).to_bytes(4, "big")).decode()
        for _ in range(_MAX_SESSIONS - 1):
            with contextlib.suppress(_SessionLost):
                return self._send_session(name, blob, file, size, options)
        return self._send_session(name, blob, file, size, options)

    def _send_session(
        self, name: str, blob: Any, file: BinaryIO, size: int, options: dict[str, Any]
    ) -> Stat:
        from google.api_core.exceptions import RetryError

        url = blob.create_resumable_upload_session(size=size, checksum=None, **options)
        http = self._client()._http
        upload = _UploadInParts(http, url, file, size, self._timeout_s, self._moved)
        repeated, found = options["retry"], None
        while found is None:
            before = upload.num_arrived
            try:
                found = repeated(upload.send_next)()
            except RetryError:
                # A slow line may need all of that time for a part that then breaks off: as long as
                # something arrives, the upload goes on.
                found = repeated(upload.ask)()
                if found is None and upload.num_arrived == before:
                    raise
        crc32c = _decoded_crc32c(found["crc32c"])
        return Stat(name, int(found["size"]), int(found["generation"]), crc32c)

    def _upload(self, name: str, send: Callable[..., Stat], if_generation: int | None) -> Stat:
        from google.api_core.exceptions import PreconditionFailed as Refused

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
            except Refused as error:
                # A put whose answer got lost is refused when it is repeated, by its own success.
                if not (interrupted and self._is_stored(name, token)):
                    found = self.stat(name)
                    raise _refused(
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
        """Turns the client library's errors into ours."""
        try:
            yield
        except FlexUNetError:
            raise
        except Exception as error:
            url = join_url(self.url, name) if name else self.url
            described = _describe_cloud_error(error, action, url, self._bucket, missing)
            if described is None:
                raise
            raise described from error


class _UploadInParts:
    """A file on its way in an upload session; what has arrived is not sent again.

    The client library has this too, but gives up with ValueError when a part that is not the last
    one had to be repeated (google-cloud-storage 3.17.1).
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
        self._offset: int | None = 0  # how much has arrived; None: ask
        self.num_arrived = 0  # bytes, as the server last said

    def send_next(self) -> dict[str, Any] | None:
        """Sends a part; returns the object's metadata after the last one.

        Raises:
            _SessionLost: the server knows the session no longer.
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
        """Asks how much has arrived; returns the object's metadata if that is all of it."""
        return self._put(b"", f"bytes */{self._size}")

    def _put(self, data: Any, content_range: str) -> dict[str, Any] | None:
        import google.api_core.exceptions as api

        headers = {"Content-Range": content_range}
        answer = self._http.put(self._url, data=data, headers=headers, timeout=self._timeout_s)
        if answer.status_code in (200, 201):
            found: dict[str, Any] = answer.json()
            return found
        if answer.status_code in (404, 410):
            raise _SessionLost(f"{self._url}: the server has lost the upload; try again")
        if answer.status_code != 308:
            raise api.from_http_response(answer)  # type: ignore[no-untyped-call]
        arrived = re.fullmatch(r"bytes=0-(\d+)", answer.headers.get("Range", ""))
        self._offset = self.num_arrived = int(arrived[1]) + 1 if arrived else 0
        if self._offset >= self._size:
            raise _SessionLost(f"{self._url}: the server does not end the upload; try again")
        return None


class _WatchedBytes:
    """The body of a request; calls `moved` for every piece that the connection takes."""

    def __init__(self, data: bytes, moved: Callable[[], None]) -> None:
        self._data = memoryview(data)
        self._moved = moved
        self._begin = 0

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[bytes]:  # by this, `requests` knows a stream
        while piece := self.read(_PIECE_BYTES):
            yield piece

    def read(self, size: int = -1) -> bytes:
        """Returns the next bytes. After the end it begins again: a refused request is repeated."""
        end = len(self._data) if size < 0 else self._begin + size
        piece = bytes(self._data[self._begin : end])
        self._begin = self._begin + len(piece) if piece else 0
        self._moved()
        return piece


class _WatchedFile:
    """A file to write into; calls `moved` for every write.

    Attributes:
        written_at: when it was last, or made; of `time.monotonic`.
    """

    def __init__(self, file: BinaryIO, moved: Callable[[], None]) -> None:
        self._file = file
        self._moved = moved
        self.written_at = time.monotonic()

    def write(self, data: bytes) -> int:
        """Writes `data`."""
        self._moved()
        self.written_at = time.monotonic()
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _unchanged(fetch: Callable[[], T], url: str) -> T:
    """Returns what `fetch` reads from `url`, which is repeated when bytes changed on the way."""
    from google.cloud.storage.exceptions import DataCorruption

    for _ in range(_MAX_DOWNLOADS - 1):
        with contextlib.suppress(DataCorruption, _ChangedOnTheWay), _replaced_told(url):
            return fetch()
    with _replaced_told(url):
        return fetch()


@contextlib.contextmanager
def _replaced_told(url: str) -> Iterator[None]:
    """Tells an object that was replaced in the middle of its download from one that is missing.

    Where a download breaks off, the client library asks for the rest of that generation.
    """
    from google.api_core.exceptions import NotFound as NoSuchObject

    try:
        yield
    except NoSuchObject as error:
        query = urllib.parse.urlsplit(error.response.request.url).query
        if "generation" in urllib.parse.parse_qs(query):
            raise _ChangedOnTheWay(
                f"{url}: another process replaced or deleted it while it was read; try again"
            ) from error
        raise


@functools.lru_cache(maxsize=4)
def _cloud_client(process_id: int, emulator: str | None) -> Any:
    """Returns a client; one per process, because connections must not be shared by a fork."""
    from google.cloud import storage

    # Since 3.11 a client asks for the bucket itself beside the first request for an object. An
    # account that may only use objects is refused, with an error in the bucket's audit log
    # (https://github.com/googleapis/google-cloud-python/issues/17650). It has no other switch.
    os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
    if emulator is None:
        return storage.Client()
    endpoint = emulator if "://" in emulator else f"http://{emulator}"
    return storage.Client(
        project="emulator",
        client_options={"api_endpoint": endpoint},
    )


def _is_transient(error: Exception) -> bool:
    """Returns whether a request that failed with `error` may succeed when it is repeated."""
    import requests
    import urllib3
    from google.auth.exceptions import GoogleAuthError, TransportError

    if _refused_tls(error) is not None:
        return False
    if isinstance(error, TransportError):
        # A refused token never heals; google-auth wraps the network's error in its arguments.
        return bool(error.args) and isinstance(error.args[0], OSError)
    if isinstance(error, GoogleAuthError):
        return bool(error.retryable)
    response = getattr(error, "response", None)
    status = getattr(error, "code", None) or getattr(response, "status_code", None)
    if status is not None:
        return status in _TRANSIENT_STATUS
    return isinstance(
        error,
        ConnectionError
        | requests.ConnectionError
        | requests.Timeout
        | requests.exceptions.ChunkedEncodingError
        | urllib3.exceptions.ProtocolError
        | urllib3.exceptions.TimeoutError,
    )


def _causes(error: Exception) -> Iterator[Any]:
    """Yields `error` and what it wraps: google-auth, requests and urllib3 each wrap the other."""
    found: Any = error
    while isinstance(found, Exception):
        yield found
        inner = getattr(found, "reason", None)
        found = inner if isinstance(inner, Exception) else next(iter(found.args), None)


def _refused_tls(error: Exception) -> ssl.SSLError | None:
    """Returns why no connection can come about; None where `error` is another one.

    `requests` makes no difference between it and a line that broke, which may heal.
    """
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLError) and _REFUSED_TLS.search(cause.reason or ""):
            return cause
    return None


def _describe_tls_error(error: Exception) -> str | None:
    """Returns what is wrong with a connection's encryption and what to do; None of other errors."""
    refused = _refused_tls(error)
    if refused is None:
        # `requests` has no class of its own for it.
        is_lacking = type(error) is OSError and "certificate" in str(error)
        return f"{error}; check REQUESTS_CA_BUNDLE" if is_lacking else None
    requests_sent = (getattr(cause, "request", None) for cause in _causes(error))
    urls = (request.url for request in requests_sent if request is not None)
    server = urllib.parse.urlsplit(next(urls, "")).netloc or "the server"
    if isinstance(refused, ssl.SSLCertVerificationError):
        return (
            f"the certificate of {server} is refused: {refused.verify_message}; check the address "
            "and this machine's clock, or name a file with the certificate of its authority in "
            "REQUESTS_CA_BUNDLE"
        )
    return f"{server} and this machine agree on no TLS ({refused.reason}); check the address"


def _describe_cloud_error(
    error: Exception, action: str, url: str, bucket: str, missing: str
) -> StorageError | None:
    """Returns our error for one of the client library's, None for a bug.

    Args:
        missing: what a 404 speaks of, "object" or "bucket".
    """
    import requests
    from google.api_core import exceptions as api
    from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, TransportError
    from google.cloud.storage import exceptions as cloud

    tls = _describe_tls_error(error)
    if tls is not None:
        return StorageError(f"cannot {action} {url}: {tls}")
    text = " ".join(str(error).split())[:300]
    if isinstance(error, api.RetryError) or _is_transient(error):
        return Unavailable(
            f"cannot {action} {url}: {text}; check the network and the server, then try again"
        )
    if isinstance(error, api.NotFound):
        if missing == "bucket" or "bucket does not exist" in text:
            return StorageError(f"cannot {action} {url}: bucket {bucket!r} does not exist")
        return NotFound(f"{url} does not exist")
    key_file = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    if isinstance(error, DefaultCredentialsError) and key_file:
        return StorageError(
            f"cannot {action} {url}: GOOGLE_APPLICATION_CREDENTIALS={key_file} holds none "
            f"({text}); give the path of a key file, or unset it"
        )
    if isinstance(error, DefaultCredentialsError):
        return StorageError(
            f"cannot {action} {url}: no Google Cloud credentials; run `gcloud auth "
            "application-default login` or set GOOGLE_APPLICATION_CREDENTIALS"
        )
    if isinstance(error, api.Unauthorized | GoogleAuthError) and not isinstance(
        error, TransportError
    ):
        return StorageError(
            f"cannot {action} {url}: the credentials are refused; renew them with `gcloud auth "
            f"application-default login` ({text})"
        )
    if isinstance(error, api.Forbidden):
        return Forbidden(
            f"cannot {action} {url}: permission denied; grant these credentials "
            f"roles/storage.objectUser on bucket {bucket!r} ({text})"
        )
    known = (
        api.GoogleAPIError, cloud.DataCorruption, cloud.InvalidResponse, TransportError,
        requests.RequestException, ConnectionError,
    )  # fmt: skip
    return StorageError(f"cannot {action} {url}: {text}") if isinstance(error, known) else None


def _blob_stat(name: str, blob: Any) -> Stat:
    return Stat(name, int(blob.size), int(blob.generation), _decoded_crc32c(blob.crc32c))


def _decoded_crc32c(text: str | None) -> int | None:
    return None if text is None else int.from_bytes(base64.b64decode(text), "big")


def _refused(where: str, expected: int | None, found: int) -> PreconditionFailed:
    if expected == 0:
        return PreconditionFailed(f"{where} exists already (generation {found}); nothing written")
    return PreconditionFailed(
        f"{where} is in generation {found}, not {expected}: another process wrote it"
    )


def _shown(name: str) -> str:
    return ascii(name if len(name) <= 100 else name[:100] + "...")


def _is_inside(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


@contextlib.contextmanager
def _local_errors(action: str, path: str) -> Iterator[None]:
    """Turns the operating system's errors into ours."""
    try:
        yield
    except FlexUNetError:
        raise
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        if action == "read":
            raise NotFound(f"{path} does not exist") from error
        refuse_file_above(path, error)
        raise StorageError(f"cannot {action} {path}: {error.strerror}") from error
    except OSError as error:
        if error.errno is None:  # those of `requests`, while a download is written
            raise
        refuse_file_above(path, error)
        remedy = {
            errno.ENOSPC: "; free some space or choose another folder",
            errno.EDQUOT: "; free some space or choose another folder",
            errno.EACCES: "; check the folder's permissions or choose another one",
            errno.EROFS: "; choose a folder that can be written",
        }.get(error.errno, "")
        raise StorageError(f"cannot {action} {path}: {error.strerror}{remedy}") from error


def refuse_file_above(path: str, error: OSError) -> None:
    """Names the file in whose place `path` needs a folder, if that is why `error` came.

    Raises:
        NotAFolder: it is.
    """
    if error.errno not in (errno.ENOTDIR, errno.EEXIST):
        return
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    if os.path.isfile(folder):
        raise NotAFolder(f"{folder} is a file, not a folder; give a folder") from error


def _stat_path(name: str, path: str) -> Stat | None:
    try:
        info = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link in a circle
            return None
        raise
    if not stat_module.S_ISREG(info.st_mode):
        return None
    return Stat(name, info.st_size, info.st_mtime_ns, None)


def _size_of(info: os.stat_result) -> int:
    return 0 if stat_module.S_ISLNK(info.st_mode) else info.st_size


@functools.lru_cache(maxsize=1024)  # a folder is listed many times
def _tell_left_out(url: str, number: int, where: str, first: str) -> None:
    logger.warning(
        "%s: %d symbolic links %s are left out, the first is %s", url, number, where, first
    )


def _walk(
    folder: str, name: str, real_root: str, left_out: list[str]
) -> Iterator[tuple[str, os.stat_result]]:
    """Yields (object name, stat) of the files below `folder`, which is object prefix `name`.

    Symbolic links that are not followed are added to `left_out`.
    """
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        entry_name = f"{name}/{entry.name}" if name else entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path, entry_name, real_root, left_out)
        elif entry.is_symlink() and not (
            os.path.isfile(entry.path) and _is_inside(os.path.realpath(entry.path), real_root)
        ):
            left_out.append(entry.path)
        elif entry.is_file() and not entry.name.startswith(_HIDDEN):
            with contextlib.suppress(FileNotFoundError):  # deleted in this moment
                yield entry_name, entry.stat()


def _walk_links(
    folder: str, name: str, above: frozenset[tuple[int, int]], left_out: list[str]
) -> Iterator[tuple[str, os.stat_result]]:
    """Yields as `_walk` does, by way of all links; a link that leads to no file has its own stat.

    Links to a folder that they lie in are added to `left_out`.

    Args:
        above: (device, inode) of the folders that `folder` lies in, and its own.
    """
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        entry_name = f"{name}/{entry.name}" if name else entry.name
        with contextlib.suppress(FileNotFoundError):  # deleted in this moment
            info = _stat_target(entry)
            if not stat_module.S_ISDIR(info.st_mode):
                is_known = stat_module.S_ISREG(info.st_mode) or stat_module.S_ISLNK(info.st_mode)
                if is_known and not entry.name.startswith(_HIDDEN):
                    yield entry_name, info
            elif (info.st_dev, info.st_ino) in above:
                left_out.append(entry.path)
            else:
                here = above | {(info.st_dev, info.st_ino)}
                yield from _walk_links(entry.path, entry_name, here, left_out)


def _stat_target(entry: os.DirEntry[str]) -> os.stat_result:
    """Returns what a link leads to, where that is a file or a folder; else the entry's own stat."""
    if entry.is_symlink():
        with contextlib.suppress(OSError):  # it leads nowhere, in a circle, or where we may not
            info = os.stat(entry.path)
            if stat_module.S_ISREG(info.st_mode) or stat_module.S_ISDIR(info.st_mode):
                return info
    return entry.stat(follow_symlinks=False)


def _with_folders_above(folder: str) -> frozenset[tuple[int, int]]:
    """Returns (device, inode) of a folder and of all that it lies in; none where it is missing."""
    path, found = os.path.realpath(folder), set()
    with contextlib.suppress(FileNotFoundError):
        while True:
            info = os.stat(path)
            found.add((info.st_dev, info.st_ino))
            if path == os.path.dirname(path):
                break
            path = os.path.dirname(path)
    return frozenset(found)


def _open_temporary(path: str) -> BinaryIO:
    """Opens a temporary file for writing beside `path`, in a folder that is made where it lacks.

    A delete of another process removes folders that are empty, and this one is until the file is
    in it. Then it is made again.
    """
    folder = os.path.dirname(path)
    temporary = os.path.join(folder, f"{_TEMPORARY}{uuid.uuid4().hex}")
    for _ in range(_MAX_FOLDERS - 1):
        # It says that the folder exists when it vanished between two looks.
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            os.makedirs(folder, exist_ok=True)
            return open(temporary, "xb")
    os.makedirs(folder, exist_ok=True)
    return open(temporary, "xb")


@contextlib.contextmanager
def _whole_file(path: str) -> Iterator[Any]:
    """Opens a temporary file for writing that becomes `path` when the block ends well."""
    with _local_errors("write", path):
        file = _open_temporary(os.path.abspath(path))
        try:
            with file:
                yield file
            os.replace(file.name, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file.name)


def _sync_folder(folder: str) -> None:
    """Makes a rename last over a power failure."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _follow(temporary: str, previous: Stat | None) -> os.stat_result:
    """Returns the stat of `temporary`, given a time after that of the object it replaces.

    The kernel's clock for files ticks every few ms, so two puts could carry the same time.
    """
    now = time.time_ns()
    generation = max(now, previous.generation + 1) if previous else now
    os.utime(temporary, ns=(now, generation))
    return os.stat(temporary)


def _link(temporary: str, path: str) -> bool:
    """Publishes `temporary` where nothing is yet; returns False where files cannot be linked."""
    try:
        os.link(temporary, path)
    except FileExistsError as error:
        found = _stat_path("", path)
        raise _refused(path, 0, found.generation if found else 0) from error
    except OSError as error:
        if error.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            return False
        raise
    return True


@contextlib.contextmanager
def _folder_lock(folder: str) -> Iterator[None]:
    """Holds the lock of `folder` for the block; the kernel frees it when the process dies.

    The lock file goes with the lock, so that the folder can become empty. Who has waited for a file
    that is gone holds nothing, and asks again.
    """
    path = os.path.join(folder, _LOCK)
    while True:
        with open(path, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _has_name(file, path):
                continue
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # it may stay: it is as good for the next one
                    os.unlink(path)
            return


def _has_name(file: BinaryIO, path: str) -> bool:
    """Returns whether `path` is still the name of the open `file`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):  # the second is what NFS says
            return False
        raise
