"""Keeps checkpoints in a local folder until they are stored; for good if storage fails."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flexunet.errors import FlexUNetError, LockedError, StorageError
from job.runs import serialization

_STAGING_LOCK = "in-use.lock"


def kept_words(pending: Sequence[Callable[[], dict[str, str]]]) -> str:
    """Completes the checkpoints that were not stored; returns words on the newest one.

    Raises:
        StorageError: this machine's disk is full.
    """
    folders = [os.path.dirname(next(iter(write().values()))) for write in pending]
    if not folders:
        return ""
    return (
        f"; the checkpoint that could not be stored is kept on {socket.gethostname()} in "
        f"{folders[-1]} (to start a new run from its weights, "
        f"give --init-from {folders[-1]}/{serialization.WEIGHTS_NAME})"
    )


@contextmanager
def kept_if_unstored(pending: Sequence[Callable[[], dict[str, str]]]) -> Iterator[None]:
    """Keeps checkpoints that are not stored yet when an error ends the block.

    Raises:
        StorageError: names the folder of the checkpoints, which stays.
    """
    try:
        yield
    except (StorageError, LockedError):
        raise  # StorageError names the folder already; a lost run needs no checkpoint
    except Exception as error:
        words = kept_words(pending)
        if not words:
            raise
        problem = str(error) if isinstance(error, FlexUNetError) else repr(error)
        raise StorageError(f"{problem}{words}") from error


@contextmanager
def staging_folder(url: str) -> Iterator[str]:
    """Yields a local folder; it stays if storage failed, since it has the newest checkpoint.

    First removes folders that killed processes of the run `url` left on this machine.
    """
    prefix = f"flexunet-{hashlib.sha256(url.encode()).hexdigest()[:16]}-"
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        _remove_abandoned(str(left))
    folder = tempfile.mkdtemp(prefix=prefix)
    lock = os.open(os.path.join(folder, _STAGING_LOCK), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
    except StorageError:
        # Without the lock file, no later process removes this folder.
        os.unlink(os.path.join(folder, _STAGING_LOCK))
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(lock)
    shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(folder: str) -> None:
    with contextlib.suppress(OSError):
        lock = os.open(os.path.join(folder, _STAGING_LOCK), os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)
