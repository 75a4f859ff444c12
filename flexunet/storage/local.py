"""Stores objects as files in a folder, with locks for conditional puts."""

import contextlib
import copy
import errno
import fcntl
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from flexunet.errors import ContentError
from flexunet.storage.base import BROKEN_LINK, ObjectMeta, do_nothing, refused
from flexunet.storage.listing import log_left_out, size_of, walk, walk_links, with_folders_above
from flexunet.storage.local_files import (
    CHUNK_BYTES,
    crc32c_of,
    local_errors,
    open_temporary,
    stat_path,
    sync,
    whole_file,
)
from flexunet.storage.names import LOCK, TEMPORARY, checked_name, local_path


@dataclass(frozen=True, init=False)
class LocalStore:
    """Stores objects as files in a folder, which the first put creates.

    Generations are modification times in ns, which strictly increase from put to put. A put without
    a condition ignores the lock of conditional puts: do not mix both on one object.
    """

    url: str
    _follows_links: bool  # for reads; puts and deletes never follow a link out of the folder
    _moved: Callable[[], None] = field(repr=False, compare=False)
    _check: Callable[[], None] = field(repr=False, compare=False)

    def __init__(
        self,
        path: str,
        *,
        follows_links: bool = False,
        moved: Callable[[], None] = do_nothing,
        check: Callable[[], None] = do_nothing,
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
        """Always 0: failures of a folder are not transient."""
        return 0.0

    def following_links(self) -> "LocalStore":
        """Returns the same folder, but follows all links when reading."""
        return self._with("_follows_links", True)

    def stat(self, name: str) -> ObjectMeta | None:
        """See `ObjectStore.stat`."""
        path = self._read_path(name)
        with local_errors("read", path):
            return stat_path(name, path)

    def list(self, prefix: str = "", *, most: int | None = None) -> list[ObjectMeta]:
        """See `ObjectStore.list`; lists links to files inside the folder, but no other links.

        A store that follows links also lists broken links, with size 0, although `stat` returns
        None for them; it skips only links to a parent folder.
        """
        folder = prefix.rpartition("/")[0]
        top = self._read_path(folder) if folder else self.url
        left_out: list[str] = []
        with local_errors("list", top):
            if self._follows_links:
                files = walk_links(top, folder, with_folders_above(top), left_out)
            else:
                files = walk(top, folder, os.path.realpath(self.url), left_out)
            objects = (
                ObjectMeta(name, size_of(info), info.st_mtime_ns, None)
                for name, info in files
                if name.startswith(prefix)
            )
            found = list(itertools.islice(objects, most))
        if left_out:
            where = (
                "to a folder above"
                if self._follows_links
                else "to folders or out of this folder (copy the files if you need them)"
            )
            log_left_out(self.url, len(left_out), where, min(left_out))
        return sorted(found, key=lambda stat: stat.name)

    def folders(self) -> tuple[str, ...]:
        """See `ObjectStore.folders`."""
        with local_errors("list", self.url):
            try:
                entries = list(os.scandir(self.url))
            except (FileNotFoundError, NotADirectoryError):
                return ()
            found = [e for e in entries if e.is_dir(follow_symlinks=self._follows_links)]
        return tuple(sorted(entry.name for entry in found))

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """See `ObjectStore.get`."""
        path = self._file_path(name)
        with local_errors("read", path), open(path, "rb") as file:
            file.seek(start)
            data = file.read(-1 if length is None else length)
        self._moved()
        return data

    def get_file(self, name: str, path: str) -> int:
        """See `ObjectStore.get_file`; does not sync the copy to disk."""
        source = self._file_path(name)
        value = 0
        with local_errors("read", source), open(source, "rb") as file, whole_file(path) as copy:
            while chunk := file.read(CHUNK_BYTES):
                value = crc32c_of(chunk, value)
                copy.write(chunk)
                self._moved()
        return value

    def put(self, name: str, data: bytes, *, if_generation: int | None = None) -> ObjectMeta:
        """See `ObjectStore.put`."""
        stat = self._put(name, lambda file: file.write(data), if_generation)
        self._moved()
        return stat

    def put_file(self, name: str, path: str, *, if_generation: int | None = None) -> ObjectMeta:
        """See `ObjectStore.put_file`."""
        with local_errors("read", path), open(path, "rb") as source:

            def copy(file: BinaryIO) -> None:
                while chunk := source.read(CHUNK_BYTES):
                    file.write(chunk)
                    self._moved()

            return self._put(name, copy, if_generation)

    def delete(self, name: str) -> None:
        """See `ObjectStore.delete`; also deletes folders that become empty, except the store's."""
        self._check()
        path = local_path(self.url, name)
        with local_errors("delete", path):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.unlink(path)
            folder = os.path.dirname(path)
            with contextlib.suppress(OSError):  # not empty, or already deleted
                while folder != self.url:
                    os.rmdir(folder)
                    folder = os.path.dirname(folder)

    def subpath(self, prefix: str) -> "LocalStore":
        """See `ObjectStore.subpath`."""
        return LocalStore(
            self._read_path(prefix),
            follows_links=self._follows_links,
            moved=self._moved,
            check=self._check,
        )

    def with_limits(self, *, retry_s: float, timeout_s: float) -> "LocalStore":
        """See `ObjectStore.with_limits`; a folder has none."""
        return self

    def watched(self, moved: Callable[[], None]) -> "LocalStore":
        """See `ObjectStore.watched`."""
        return self._with("_moved", moved)

    def guarded(self, check: Callable[[], None]) -> "LocalStore":
        """See `ObjectStore.guarded`."""
        return self._with("_check", check)

    def _with(self, name: str, value: Any) -> "LocalStore":
        twin = copy.copy(self)
        object.__setattr__(twin, name, value)
        return twin

    def remove_unfinished(self) -> int:
        """See `ObjectStore.remove_unfinished`."""
        self._check()
        num_removed = 0
        for folder, _, files in os.walk(self.url):
            for file in files:
                if file.startswith(TEMPORARY):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(os.path.join(folder, file))
                        num_removed += 1
            if LOCK in files:
                # Releasing the lock deletes its file; a remaining file is harmless.
                with contextlib.suppress(OSError), _folder_lock(folder):
                    pass
        return num_removed

    def _read_path(self, name: str) -> str:
        if self._follows_links:
            return os.path.join(self.url, checked_name(name))
        return local_path(self.url, name)

    def _file_path(self, name: str) -> str:
        """Returns the path of a file to read; a broken link of a source raises ContentError."""
        path = self._read_path(name)
        if self._follows_links and os.path.islink(path) and not os.path.isfile(path):
            raise ContentError(f"{path}: {BROKEN_LINK}")
        return path

    def _put(self, name: str, write: Callable[[Any], Any], if_generation: int | None) -> ObjectMeta:
        self._check()
        path = local_path(self.url, name)
        with local_errors("write", path):
            file = open_temporary(path)
            try:
                with file:
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())
                info = self._publish(file.name, path, if_generation)
                with contextlib.suppress(FileNotFoundError):  # another process deleted both
                    sync(os.path.dirname(path))
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(file.name)
        return ObjectMeta(name, info.st_size, info.st_mtime_ns, None)

    def _publish(self, temporary: str, path: str, if_generation: int | None) -> os.stat_result:
        """Renames a temporary file to `path`; returns its stat from before any later put."""
        if if_generation is None:
            info = _follow(temporary, stat_path("", path))
            os.replace(temporary, path)
            return info
        if if_generation == 0:
            info = _follow(temporary, None)
            if _link(temporary, path):
                return info
        with _folder_lock(os.path.dirname(path)):
            found = stat_path("", path)
            generation = found.generation if found else 0
            if generation != if_generation:
                raise refused(path, if_generation, generation)
            info = _follow(temporary, found)
            os.replace(temporary, path)
            return info


def _follow(temporary: str, previous: ObjectMeta | None) -> os.stat_result:
    """Sets the time of `temporary` after that of the object it replaces; returns its stat.

    The kernel's file clock ticks every few ms, so two puts could get the same time.
    """
    now = time.time_ns()
    generation = max(now, previous.generation + 1) if previous else now
    os.utime(temporary, ns=(now, generation))
    return os.stat(temporary)


def _link(temporary: str, path: str) -> bool:
    """Publishes `temporary` as a new `path`; returns False if the file system has no hard links."""
    try:
        os.link(temporary, path)
    except FileExistsError as error:
        found = stat_path("", path)
        raise refused(path, 0, found.generation if found else 0) from error
    except OSError as error:
        if error.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            return False
        raise
    return True


@contextlib.contextmanager
def _folder_lock(folder: str) -> Iterator[None]:
    """Holds the lock of `folder` inside the block; the kernel frees it when the process dies.

    The lock file is deleted with the lock, so that the folder can become empty. A process that
    waited for a deleted file does not hold the lock, and tries again.
    """
    path = os.path.join(folder, LOCK)
    while True:
        with open(path, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _has_name(file, path):
                continue
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # the next process can use a remaining file
                    os.unlink(path)
            return


def _has_name(file: BinaryIO, path: str) -> bool:
    """Returns whether `path` is still the name of the open `file`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):  # ESTALE: on NFS
            return False
        raise
