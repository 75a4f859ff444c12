"""Writes local files atomically, computes checksums, and converts the system's errors."""

import contextlib
import errno
import os
import stat as stat_module
import uuid
from collections.abc import Iterator
from typing import Any, BinaryIO

import google_crc32c

from flexunet.errors import FlexUNetError, StorageError
from flexunet.storage.base import NotAFolder, NotFound, ObjectMeta
from flexunet.storage.names import TEMPORARY

CHUNK_BYTES = 1 << 20
_MAX_FOLDERS = 100  # created for one put, while other processes delete them


def crc32c_of(data: bytes, value: int = 0) -> int:
    """Returns the CRC-32C (RFC 3720) of `data`, continuing from `value`."""
    return int(google_crc32c.extend(value, data))


def crc32c_of_file(path: str) -> int:
    """Returns the CRC-32C of a local file's bytes.

    Raises:
        StorageError: the file cannot be read.
    """
    with local_errors("read", path), open(path, "rb") as file:
        return crc32c_of_stream(file)


def crc32c_of_stream(file: BinaryIO) -> int:
    """Returns the CRC-32C of all bytes of an open file, read from its start."""
    file.seek(0)
    value = 0
    while chunk := file.read(CHUNK_BYTES):
        value = crc32c_of(chunk, value)
    return value


@contextlib.contextmanager
def local_errors(action: str, path: str) -> Iterator[None]:
    """Converts errors of the operating system into StorageError."""
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
        if error.errno is None:  # from `requests`, during a download
            raise
        refuse_file_above(path, error)
        remedy = {
            errno.ENOSPC: "; free some space or choose another folder",
            errno.EDQUOT: "; free some space or choose another folder",
            errno.EACCES: "; check the folder's permissions or choose another one",
            errno.EROFS: "; choose a writable folder",
        }.get(error.errno, "")
        raise StorageError(f"cannot {action} {path}: {error.strerror}{remedy}") from error


def refuse_file_above(path: str, error: OSError) -> None:
    """Raises NotAFolder if `error` arose because a parent of `path` is a file.

    Raises:
        NotAFolder: names the file.
    """
    if error.errno not in (errno.ENOTDIR, errno.EEXIST):
        return
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    if os.path.isfile(folder):
        raise NotAFolder(f"{folder} is a file, not a folder; give a folder") from error


def stat_path(name: str, path: str) -> ObjectMeta | None:
    """Returns the metadata of the file at `path` as object `name`, None if there is no file."""
    try:
        info = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:  # circular links
            return None
        raise
    if not stat_module.S_ISREG(info.st_mode):
        return None
    return ObjectMeta(name, info.st_size, info.st_mtime_ns, None)


def open_temporary(path: str) -> BinaryIO:
    """Opens a temporary file for writing beside `path`; creates the folder if it is missing.

    Another process may delete the new folder while it is still empty; it is then created again.
    """
    folder = os.path.dirname(path)
    temporary = os.path.join(folder, f"{TEMPORARY}{uuid.uuid4().hex}")
    for _ in range(_MAX_FOLDERS - 1):
        # FileExistsError: the folder was deleted between two checks.
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            os.makedirs(folder, exist_ok=True)
            return open(temporary, "xb")
    os.makedirs(folder, exist_ok=True)
    return open(temporary, "xb")


@contextlib.contextmanager
def whole_file(path: str) -> Iterator[Any]:
    """Opens a temporary file for writing that is renamed to `path` if the block succeeds."""
    with local_errors("write", path):
        file = open_temporary(os.path.abspath(path))
        try:
            with file:
                yield file
            os.replace(file.name, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file.name)


def sync(path: str) -> None:
    """Syncs a file, or the names in a folder, to disk, so that they survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
