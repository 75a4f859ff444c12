"""Defines the `ObjectStore` protocol, its `ObjectMeta` and its errors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from flexunet.errors import StorageError, UsageError

BROKEN_LINK = "is a broken symbolic link; fix it or delete it"


class PreconditionFailed(StorageError):
    """The object's generation is not the one that a conditional put expected."""


class Unavailable(StorageError):
    """Storage stayed unreachable until the retry limit; it may be back later."""


class NotFound(StorageError):
    """The object does not exist."""


class Forbidden(StorageError):
    """The credentials have no role on the bucket that permits the request."""


class NotAFolder(UsageError, StorageError):
    """A file is in the place of a folder: a usage error, or a storage failure during a run.

    It is also a StorageError, so that callers keep data that could not be stored.
    """


@dataclass(frozen=True)
class ObjectMeta:
    """The metadata of one object.

    `generation` changes with every write. `crc32c` is that of the bytes that `get` returns. It is
    None if reading them is the only way to know it: for local files, and for objects that the
    server decompresses.
    """

    name: str
    size: int
    generation: int
    crc32c: int | None


class ObjectStore(Protocol):
    """Stores named objects below one URL. Every failure is a StorageError with a one-line message.

    Stores can be pickled unless they are watched or guarded.
    """

    @property
    def url(self) -> str:
        """The folder or `gs://` URL, without a trailing slash."""
        ...

    @property
    def local_root(self) -> str | None:
        """The path of the folder; None if objects must be downloaded."""
        ...

    @property
    def retry_s(self) -> float:
        """Seconds for which a request is repeated after transient failures; 0: never."""
        ...

    def stat(self, name: str) -> ObjectMeta | None:
        """Returns the metadata of an object, None if it does not exist."""
        ...

    def list(self, prefix: str = "", *, most: int | None = None) -> list[ObjectMeta]:
        """Returns the metadata of every object whose name starts with `prefix`, sorted by name.

        A prefix is compared as text: end it with `/` to list a folder. Unfinished puts are never
        listed.

        Args:
            most: stop after so many objects, which are any of them; None: list all.
        """
        ...

    def folders(self) -> tuple[str, ...]:
        """Returns the names of the folders directly below the URL, sorted; of a bucket's objects.

        Does not list what is in them, so that one request for 1000 names suffices.
        """
        ...

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Returns `length` bytes of an object from `start`, fewer only at its end.

        A whole object is verified with the server's checksum, a range is not.

        Raises:
            NotFound: there is no such object.
        """
        ...

    def get_file(self, name: str, path: str) -> int:
        """Writes an object to the local file `path` atomically and returns its crc32c.

        Raises:
            NotFound: there is no such object.
        """
        ...

    def put(self, name: str, data: bytes, *, if_generation: int | None = None) -> ObjectMeta:
        """Stores `data` as the object `name`.

        Args:
            if_generation: store only if the object has this generation; 0: only if it is missing.

        Raises:
            PreconditionFailed: the object has another generation; nothing was written.
        """
        ...

    def put_file(self, name: str, path: str, *, if_generation: int | None = None) -> ObjectMeta:
        """Stores the content of the local file `path`; see `put`."""
        ...

    def delete(self, name: str) -> None:
        """Deletes an object; does nothing if it is missing."""
        ...

    def subpath(self, prefix: str) -> "ObjectStore":
        """Returns the same storage, rooted in the folder `prefix`."""
        ...

    def with_limits(self, *, retry_s: float, timeout_s: float) -> "ObjectStore":
        """Returns the same storage with other time limits.

        Args:
            retry_s: seconds for which a request is repeated after transient failures.
            timeout_s: the longest wait for a byte, and the longest pause between two attempts.
        """
        ...

    def watched(self, moved: Callable[[], None]) -> "ObjectStore":
        """Returns the same storage, but calls `moved` whenever bytes were transferred.

        A large file calls it many times during an upload or download, in the thread of the put or
        get; a small object calls it once, at the end.
        """
        ...

    def guarded(self, check: Callable[[], None]) -> "ObjectStore":
        """Returns the same storage, but calls `check` before every attempt of a put or delete.

        An exception of `check` ends the put or delete, also between two attempts.
        """
        ...

    def remove_unfinished(self) -> int:
        """Deletes leftovers of killed puts and returns their number; only for the sole writer."""
        ...


def do_nothing() -> None:
    """Does nothing: the default of `moved` and `check` of a store."""


def refused(where: str, expected: int | None, found: int) -> PreconditionFailed:
    """Returns the error for a conditional put to `where`, whose generation is `found`."""
    if expected == 0:
        return PreconditionFailed(f"{where} exists already (generation {found}); nothing written")
    return PreconditionFailed(
        f"{where} has generation {found}, not {expected}: another process wrote it"
    )
