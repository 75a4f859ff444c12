"""Defines the `ObjectStore` protocol, its `ObjectMeta` and its errors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from flexunet.errors import StorageError, UsageError

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


@dataclass(frozen=True)
class ObjectMeta:
    """What storage says about one object.

    `generation` changes with every write. `crc32c` is None for local files: they are not read.
    """

    name: str
    size: int
    generation: int
    crc32c: int | None


class ObjectStore(Protocol):
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

    def stat(self, name: str) -> ObjectMeta | None:
        """Returns what is known about an object, None when it does not exist."""
        ...

    def list(self, prefix: str = "") -> list[ObjectMeta]:
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

    def put(self, name: str, data: bytes, *, if_generation: int | None = None) -> ObjectMeta:
        """Stores `data`.

        Args:
            if_generation: only when the object is in this generation; 0: only when it is missing.

        Raises:
            PreconditionFailed: it is in another one; nothing was written.
        """
        ...

    def put_file(self, name: str, path: str, *, if_generation: int | None = None) -> ObjectMeta:
        """Stores the content of the local file `path`; otherwise as `put`."""
        ...

    def delete(self, name: str) -> None:
        """Deletes an object; a missing one is fine."""
        ...

    def below(self, prefix: str) -> "ObjectStore":
        """Returns the same storage, rooted in the folder `prefix`."""
        ...

    def with_limits(self, *, retry_s: float, timeout_s: float) -> "ObjectStore":
        """Returns the same storage with other limits.

        Args:
            retry_s: seconds for which a transient failure is repeated.
            timeout_s: the longest wait for a byte, and the longest pause between two tries.
        """
        ...

    def watched(self, moved: Callable[[], None]) -> "ObjectStore":
        """Returns the same storage, which calls `moved` whenever bytes of an object have moved.

        A large file calls it many times on its way, in either direction, in the thread that puts or
        gets it; other objects once, at their end.
        """
        ...

    def guarded(self, check: Callable[[], None]) -> "ObjectStore":
        """Returns the same storage, which calls `check` before every try of a put or a delete.

        What `check` raises ends the put or delete, also one that is being repeated.
        """
        ...

    def remove_unfinished(self) -> int:
        """Deletes what killed puts left behind and returns how many; only for the sole writer."""
        ...


def do_nothing() -> None:
    """Stands for `moved` and `check` of a store where nobody asks."""


def refused(where: str, expected: int | None, found: int) -> PreconditionFailed:
    """Returns the error of a conditional put to `where`, which is in the generation `found`."""
    if expected == 0:
        return PreconditionFailed(f"{where} exists already (generation {found}); nothing written")
    return PreconditionFailed(
        f"{where} is in generation {found}, not {expected}: another process wrote it"
    )
