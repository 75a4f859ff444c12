"""Publishes an export as a whole: a folder by one rename, a bucket with `metadata.json` last.

Until then its files are in a temporary folder, which is deleted if anything fails.
"""

import contextlib
import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator

from flexunet.errors import StorageError, UsageError
from flexunet.storage import ObjectStore, is_file, open_store
from flexunet.storage.local_files import local_errors, sync
from flexunet.storage.names import TEMPORARY
from job.exporting.formats.registry import PATHS

METADATA_NAME = "metadata.json"
CARD_NAME = "MODEL_CARD.md"
_NOT_EMPTY = (errno.ENOTEMPTY, errno.EEXIST)
_FILES = (METADATA_NAME, CARD_NAME, PATHS["keras"], PATHS["onnx"])


def check_output(url: str, *, overwrite: bool) -> ObjectStore:
    """Returns the store of a new export at `url`.

    Args:
        overwrite: allow an earlier export, also one that was not finished.

    Raises:
        UsageError: there are other files, or an export that must not be replaced; or the folder
            is a mount point, which cannot be renamed.
    """
    store = open_store(url)
    if is_file(store):
        raise UsageError(f"{store.url}: is a file; give OUTPUT a folder; export creates it")
    if store.local_root is not None and os.path.ismount(os.path.realpath(store.local_root)):
        raise UsageError(
            f"{store.url}: is a mount point, which export cannot replace; give OUTPUT a folder "
            f"inside it, for example {os.path.join(store.url, 'export')}"
        )
    names = [stat.name for stat in store.list()]
    _refuse_others(store.url, names)
    if names and not overwrite:
        raise UsageError(
            f"{store.url}: has an export already; give another OUTPUT, or --overwrite to replace it"
        )
    return store


def _refuse_others(url: str, names: Iterable[str]) -> None:
    """Raises UsageError if a file is not of an export: it must not be deleted."""
    others = [name for name in names if not _is_of_export(name)]
    if others:
        raise UsageError(
            f"{url}: has files that are not of an export, first {others[0]}; give OUTPUT a "
            "new folder"
        )


def _is_of_export(name: str) -> bool:
    return name in _FILES or name.startswith(f"{PATHS['savedmodel']}/")


@contextlib.contextmanager
def staged(store: ObjectStore, *, overwrite: bool) -> Iterator[str]:
    """Yields a new temporary folder, and publishes it as `store` if the block succeeds.

    Args:
        overwrite: replace an earlier export.

    Raises:
        UsageError: another process has written other files there since `check_output`.
        StorageError: the files cannot be written.
    """
    if store.local_root is None:
        with tempfile.TemporaryDirectory(prefix="flexunet-") as folder:
            yield folder
            _upload(folder, store, overwrite=overwrite)
        return
    target = os.path.realpath(store.local_root)
    with local_errors("write", target):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        folder = _beside(target)
        os.mkdir(folder)
    try:
        with local_errors("write", target):
            yield folder
        _rename(folder, target, overwrite=overwrite)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def files_of(folder: str) -> list[str]:
    """Returns the names of all files in a folder, relative to it, sorted."""
    return sorted(
        os.path.relpath(os.path.join(where, name), folder)
        for where, _, names in os.walk(folder)
        for name in names
    )


def _beside(target: str) -> str:
    """Returns an unused name beside `target`, which no listing of a store shows."""
    return os.path.join(os.path.dirname(target), f"{TEMPORARY}{uuid.uuid4().hex}")


def _rename(folder: str, target: str, *, overwrite: bool) -> None:
    """Renames `folder` to `target`, in the place of an empty folder or of an earlier export.

    Files that came since `check_output` survive: the earlier folder is looked at after it was
    renamed, when no other process finds it by its name.
    """
    with local_errors("write", target):
        for name in files_of(folder):
            sync(os.path.join(folder, name))
        earlier = _beside(target)
        try:
            if overwrite and os.path.isdir(target):
                os.rename(target, earlier)
                names = files_of(earlier)
                _refuse_others(target, (name for name in names if not _is_temporary(name)))
            os.rename(folder, target)  # fails if the target is a folder with files
        except (OSError, UsageError) as error:
            _restore(earlier, target)
            if isinstance(error, UsageError) or error.errno not in _NOT_EMPTY:
                raise
            raise UsageError(f"{target}: another process wrote here; give another OUTPUT") from None
        sync(os.path.dirname(target))
    shutil.rmtree(earlier, ignore_errors=True)


def _is_temporary(name: str) -> bool:
    """Returns whether `name` is an unfinished file of a store, which no listing shows."""
    return os.path.basename(name).startswith(TEMPORARY)


def _restore(earlier: str, target: str) -> None:
    """Renames the earlier export back, if it was renamed.

    Raises:
        UsageError: another process wrote to `target` meanwhile; both folders stay.
    """
    if not os.path.isdir(earlier):
        return
    try:
        os.rename(earlier, target)
    except OSError as error:
        raise UsageError(
            f"{target}: another process wrote here; give another OUTPUT; the earlier files of the "
            f"folder are in {earlier}"
        ) from error


def _upload(folder: str, store: ObjectStore, *, overwrite: bool) -> None:
    """Writes all files to a bucket; without `metadata.json`, which is last, they are no export."""
    earlier = {stat.name for stat in store.list()} if overwrite else set()
    _refuse_others(store.url, sorted(earlier))  # that came since `check_output`
    if METADATA_NAME in earlier:
        store.delete(METADATA_NAME)
    names = files_of(folder)
    names.sort(key=lambda name: name == METADATA_NAME)
    written = []
    try:
        for name in names:
            generation = None if overwrite else 0
            store.put_file(name, os.path.join(folder, name), if_generation=generation)
            written.append(name)
    except BaseException:
        for name in written:
            with contextlib.suppress(StorageError):
                store.delete(name)
        raise
    for name in earlier - set(names):
        store.delete(name)
