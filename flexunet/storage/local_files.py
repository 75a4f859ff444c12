"""Writes local files whole or not at all, checksums them, and names the system's errors."""

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
_MAX_FOLDERS = 100  # made for one put, while other processes delete them


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


def stat_path(name: str, path: str) -> ObjectMeta | None:
    """Returns the stat of the file at `path` under `name`, None where there is no file."""
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
    return ObjectMeta(name, info.st_size, info.st_mtime_ns, None)


def open_temporary(path: str) -> BinaryIO:
    """Opens a temporary file for writing beside `path`, in a folder that is made where it lacks.

    A delete of another process removes folders that are empty, and this one is until the file is
    in it. Then it is made again.
    """
    folder = os.path.dirname(path)
    temporary = os.path.join(folder, f"{TEMPORARY}{uuid.uuid4().hex}")
    for _ in range(_MAX_FOLDERS - 1):
        # It says that the folder exists when it vanished between two looks.
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            os.makedirs(folder, exist_ok=True)
            return open(temporary, "xb")
    os.makedirs(folder, exist_ok=True)
    return open(temporary, "xb")


@contextlib.contextmanager
def whole_file(path: str) -> Iterator[Any]:
    """Opens a temporary file for writing that becomes `path` when the block ends well."""
    with local_errors("write", path):
        file = open_temporary(os.path.abspath(path))
        try:
            with file:
                yield file
            os.replace(file.name, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file.name)
