"""Opens the readers of splits, after copying remote shards to a local cache."""

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_prep.shards.manifest import Manifest, ShardInfo
from flexunet.errors import ContentError, StorageError
from flexunet.progress import Heartbeat, Progress, no_heartbeat
from flexunet.storage import LocalStore, ObjectStore, crc32c_of_file, local_path, open_store
from flexunet.text import pluralize
from job.data.dataset import Dataset, Split
from job.data.downloads import MIB, ShardCopies
from job.data.reader import RecordReader
from job.data.record_cache import RecordFolder, RemoteRecords

logger = logging.getLogger(__name__)

RECORDS_FOLDER = "records"  # beside the shards of a dataset in the cache
GIB = 1 << 30
_LOCK_TICK_S = 0.5
_NUM_CHECKS = 8  # cached shards that are read at once, as streams from a bucket
_SHOWN_CHECK_BYTES = 256 << 20  # a check of fewer bytes takes about a second


@dataclass(frozen=True)
class CacheOptions:
    """Holds how the shards of a remote dataset are read.

    Attributes:
        cache: "full" or "ranges".
        cache_dir: folder of the cache; None: `~/.cache/flexunet`.
        cache_size: most GiB of the dataset to keep, if it is larger; None: no limit.
        progress: show the progress of copying.
    """

    cache: str
    cache_dir: str | None
    cache_size: float | None = None
    progress: bool = True


def open_reader(
    dataset: Dataset, split: Split, *, cache: str, cache_dir: str | None
) -> RecordReader:
    """Returns a reader of `split`; see `open_readers` and `CacheOptions`."""
    return open_readers(dataset, {"": split}, CacheOptions(cache, cache_dir))[""]


def open_readers(
    dataset: Dataset,
    splits: Mapping[str, Split],
    options: CacheOptions,
    *,
    heartbeat: Heartbeat = no_heartbeat,
) -> dict[str, RecordReader]:
    """Returns a reader of each split by name; with "full", copies remote shards to the cache first.

    With a `cache_size` that is less than the dataset, keeps single records instead when they are
    first read.

    Args:
        heartbeat: called for every shard in the cache, and while shards are copied.

    Raises:
        ContentError: a shard differs from the manifest.
        StorageError: the dataset cannot be read, or the cache cannot be written.
    """
    store = open_store(dataset.url)
    names = {name for split in splits.values() for name in split.shards}
    shards = [shard for shard in dataset.manifest.shards if shard.name in names]
    source: str | RemoteRecords
    if store.local_root is not None:
        _check_sizes(store, shards)
        source = store.local_root
    elif options.cache == "ranges":
        source = RemoteRecords(store, None)
    else:
        top = options.cache_dir or Path.home() / ".cache" / "flexunet"
        folder = Path(top) / dataset.digest
        records = _bounded_folder(folder, dataset.manifest, options.cache_size)
        source = str(folder) if records is None else RemoteRecords(store, records)
        if records is None:
            with _locked(folder, heartbeat):
                _fill_cache(store, shards, str(folder), heartbeat, progress=options.progress)
    channels = dataset.manifest.channels
    return {
        name: RecordReader(store, split, source, channels=channels)
        for name, split in splits.items()
    }


def _bounded_folder(
    folder: Path, manifest: Manifest, cache_size: float | None
) -> RecordFolder | None:
    """Returns the folder for records of a dataset that is larger than `cache_size` GiB."""
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    if cache_size is None or num_bytes <= cache_size * GIB:
        return None
    records = RecordFolder(str(folder / RECORDS_FOLDER), int(cache_size * GIB))
    logger.info(
        "%s: keeping up to %.3g of %.3g GiB of the dataset; the rest is read over the network in "
        "each epoch",
        records.path,
        cache_size,
        num_bytes / GIB,
    )
    return records


def _check_sizes(store: ObjectStore, shards: Sequence[ShardInfo]) -> None:
    for shard in shards:
        found = store.stat(shard.name)
        if found is None or found.size != shard.num_bytes:
            size = "missing" if found is None else f"{found.size} bytes"
            raise ContentError(
                f"{store.url}/{shard.name}: {size}, but {shard.num_bytes} bytes in the "
                "manifest; prepare the dataset again"
            )


@contextmanager
def _locked(folder: Path, heartbeat: Heartbeat) -> Iterator[None]:
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
    store: ObjectStore,
    shards: Sequence[ShardInfo],
    folder: str,
    heartbeat: Heartbeat,
    *,
    progress: bool,
) -> None:
    # A process that was killed while it copied leaves parts of files.
    LocalStore(folder).remove_unfinished()
    missing = _missing(folder, shards, heartbeat, progress=progress)
    if not missing:
        return
    needed, free = sum(shard.num_bytes for shard in missing), shutil.disk_usage(folder).free
    if needed > free:
        raise StorageError(
            f"{folder}: the shards need {needed / MIB:.0f} MiB, but this disk has "
            f"{free / MIB:.0f} MiB free; give another --cache-dir, or --cache-size to keep a part "
            "and read the rest over the network"
        )
    size = f"{pluralize(len(missing), 'shard')}, {needed / MIB:.1f} MiB"
    logger.info("caching %s: %s, in %s", store.url, size, folder)
    with Progress("cache", -(-needed // MIB), unit="MiB", shown=progress) as bar:
        ShardCopies(store, missing, folder).run(heartbeat, bar)


def _missing(
    folder: str, shards: Sequence[ShardInfo], heartbeat: Heartbeat, *, progress: bool
) -> list[ShardInfo]:
    """Returns the shards that are not in the cache or damaged there; several threads check."""
    present = [shard for shard in shards if os.path.exists(local_path(folder, shard.name))]
    num_bytes = sum(shard.num_bytes for shard in present)
    is_long = num_bytes > _SHOWN_CHECK_BYTES
    is_cached = dict.fromkeys((shard.name for shard in shards), False)
    with (
        ThreadPoolExecutor(_NUM_CHECKS, "shard-check") as threads,
        Progress(
            "check cache", -(-num_bytes // MIB), unit="MiB", shown=progress and is_long
        ) as bar,
    ):
        found = threads.map(lambda shard: _is_cached(folder, shard), present)
        checked = shown = 0
        try:
            for shard, is_same in zip(present, found, strict=True):
                is_cached[shard.name] = is_same
                checked += shard.num_bytes
                bar.advance(-(-checked // MIB) - shown)
                shown = -(-checked // MIB)
                heartbeat()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
    return [shard for shard in shards if not is_cached[shard.name]]


def _is_cached(folder: str, shard: ShardInfo) -> bool:
    path = local_path(folder, shard.name)
    if not os.path.exists(path):
        return False
    # A copy from an earlier run counts only after a check of its content.
    if os.path.getsize(path) == shard.num_bytes and crc32c_of_file(path) == shard.crc32c:
        return True
    logger.warning("%s: the cached copy is damaged; copying it again", path)
    os.unlink(path)
    return False
