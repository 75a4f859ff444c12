"""Opens the reader of a split, after copying remote shards to a local cache."""

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.shards.manifest import Manifest
from flexunet.errors import ContentError, StorageError
from flexunet.storage import ObjectStore, crc32c_of_file, local_path, open_store
from job.data.dataset import Dataset, Split
from job.data.reader import RecordReader

logger = logging.getLogger(__name__)

_LOCK_TICK_S = 0.5


def open_reader(
    dataset: Dataset,
    split: Split,
    *,
    cache: str,
    cache_dir: str | None,
    heartbeat: Callable[[], None] = lambda: None,
) -> RecordReader:
    """Returns a reader of `split`; with "full", copies remote shards to the cache first.

    Args:
        cache: "full" or "ranges".
        cache_dir: folder of the cache; None: `~/.cache/flexunet`.
        heartbeat: called for every shard in the cache, and while a shard is copied.
    """
    store = open_store(dataset.url)
    if store.local_root is not None:
        _check_sizes(store, dataset.manifest, split)
        return RecordReader(store, split, store.local_root)
    if cache == "ranges":
        return RecordReader(store, split, None)
    folder = Path(cache_dir or Path.home() / ".cache" / "flexunet") / dataset.digest
    with _locked(folder, heartbeat):
        _fill_cache(store.watched(heartbeat), dataset.manifest, split, str(folder), heartbeat)
    return RecordReader(store, split, str(folder))


def _check_sizes(store: ObjectStore, manifest: Manifest, split: Split) -> None:
    needed = set(split.shards)
    for shard in manifest.shards:
        if shard.name in needed:
            found = store.stat(shard.name)
            if found is None or found.size != shard.num_bytes:
                size = "missing" if found is None else f"{found.size} bytes"
                raise ContentError(
                    f"{store.url}/{shard.name}: {size}, but {shard.num_bytes} bytes in the "
                    "manifest; prepare the dataset again"
                )


@contextmanager
def _locked(folder: Path, heartbeat: Callable[[], None]) -> Iterator[None]:
    """Holds the lock of the cache: one process of a machine fills it, the others wait."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot write the cache: {error.strerror}; give another --cache-dir"
        ) from error
    try:
        while not _is_taken(lock):
            heartbeat()
            time.sleep(_LOCK_TICK_S)
        yield
    finally:
        os.close(lock)


def _is_taken(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _fill_cache(
    store: ObjectStore, manifest: Manifest, split: Split, folder: str, heartbeat: Callable[[], None]
) -> None:
    missing, used = [], set(split.shards)
    for shard in manifest.shards:
        if shard.name in used and not _is_cached(folder, shard):
            missing.append(shard)
        heartbeat()
    needed, free = sum(shard.num_bytes for shard in missing), shutil.disk_usage(folder).free
    if needed > free:
        raise StorageError(
            f"{folder}: the shards need {needed / 2**20:.0f} MiB, but this disk has "
            f"{free / 2**20:.0f} MiB free; give another --cache-dir, or --cache ranges to read "
            "over the network"
        )
    for shard in missing:
        logger.info("caching %s/%s (%.1f MiB)", store.url, shard.name, shard.num_bytes / 2**20)
        path = local_path(folder, shard.name)
        if store.get_file(shard.name, path) != shard.crc32c:
            Path(path).unlink()
            raise ContentError(
                f"{store.url}/{shard.name}: CRC32C differs from the manifest, the dataset is "
                "damaged; prepare it again"
            )
        heartbeat()


def _is_cached(folder: str, shard: Any) -> bool:
    path = local_path(folder, shard.name)
    if not os.path.exists(path):
        return False
    # A copy from an earlier run counts only after a check of its content.
    if os.path.getsize(path) == shard.num_bytes and crc32c_of_file(path) == shard.crc32c:
        return True
    logger.warning("%s: the cached copy is damaged; copying it again", path)
    os.unlink(path)
    return False
