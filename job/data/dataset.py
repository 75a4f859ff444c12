"""Input: sample order, the verified shard cache, and batches as `tf.data`.

`samples.parquet` says where each record lies, so that any sample can be read at once: the shuffle
is exact and global without a buffer, a restart begins at any batch for nothing, and the order does
not depend on the number of workers. TensorFlow reads local files only.
"""

import fcntl
import itertools
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data_prep.imaging.codecs import read_image, read_mask_pixels
from data_prep.imaging.geometry import Box, Geometry
from data_prep.shards.manifest import Manifest, read_manifest
from data_prep.shards.records import ID_FEATURE, IMAGE_FEATURE, MASK_FEATURE, unframe_record
from data_prep.shards.sample_table import read_samples
from flexunet.errors import ContentError, FlexUNetError, StorageError, UsageError
from flexunet.process_pool import available_cores
from flexunet.storage import Store, crc32c_of_file, local_path, open_store
from job.config import AugmentationConfig
from job.data.augment import augment
from job.data.random_streams import Purpose, epoch_generator

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SIDES = ("top", "left", "height", "width")
_LOCK_TICK_S = 0.5

PADDING = -1  # index of a sample that only fills the last batch


@dataclass(frozen=True)
class Split:
    """The samples of one split, in the dataset's order."""

    name: str
    ids: tuple[str, ...]
    filenames: tuple[str, ...]
    groups: tuple[str, ...]
    shards: tuple[str, ...]  # of each sample
    offsets: np.ndarray  # (N,) int64, bytes
    lengths: np.ndarray  # (N,) int64, bytes
    geometries: tuple[Geometry, ...]  # where each picture lies in the stored one
    spacings: tuple[tuple[float, float] | None, ...]  # mm (rows, columns) of a source pixel
    pictures: tuple[str | None, ...]  # of a tile, the id of its picture
    has_foreground: np.ndarray  # (N,) bool: a pixel of another class than 0

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Dataset:
    """A committed dataset."""

    url: str
    manifest: Manifest
    digest: str  # sha256 of the manifest
    splits: dict[str, Split]
    fold: tuple[int, int] | None = None  # (k, of how many) where the splits are those of a fold

    def split(self, name: str) -> Split:
        """Returns the split `name`.

        Raises:
            UsageError: the dataset has no sample in it.
        """
        split = self.splits.get(name)
        if split is None or not len(split):
            present = [key for key, value in self.splits.items() if len(value)]
            raise UsageError(
                f"{self.url}: split {name!r} has no samples; it has {', '.join(present)}"
            )
        return split


def open_dataset(url: str) -> Dataset:
    """Returns the dataset at `url`, its tables read and checked, no shard touched yet."""
    store = open_store(url)
    manifest, digest = read_manifest(store)
    table = read_samples(store, manifest)
    columns = {
        name: table.column(name).to_numpy()
        for name in ("split", "id", "filename", "group", "shard", "offset", "length", "picture")
    }
    columns["foreground"] = np.array(
        [any(counts[1:]) for counts in table.column("pixels_per_class").to_pylist()], bool
    )
    places = _places(table)
    names = [str(name) for name in np.unique(columns["split"])]
    splits = {name: _split(name, columns, places) for name in names}
    return Dataset(url=store.url, manifest=manifest, digest=digest, splits=splits)


def _places(table: Any) -> list[tuple[Geometry, tuple[float, float] | None]]:
    """Returns the geometry and, where it is known, the spacing of each sample."""
    names = [*("source_height", "source_width"), *_SIDES]
    columns = ["geometry_kind", *names, *(f"crop_{side}" for side in _SIDES), "is_flipped"]
    rows = table.select([*columns, "spacing_y_mm", "spacing_x_mm"]).to_pylist()
    return [
        (_geometry_of(row), _spacing_of(row["spacing_y_mm"], row["spacing_x_mm"])) for row in rows
    ]


def _geometry_of(row: Mapping[str, Any]) -> Geometry:
    crop = {side: row[f"crop_{side}"] for side in _SIDES}
    return Geometry(
        kind=row["geometry_kind"],
        source_height=row["source_height"],
        source_width=row["source_width"],
        top=row["top"],
        left=row["left"],
        height=row["height"],
        width=row["width"],
        crop=None if None in crop.values() else Box(**crop),
        is_flipped=bool(row["is_flipped"]),
    )


def _spacing_of(y: float | None, x: float | None) -> tuple[float, float] | None:
    return None if y is None or x is None else (y, x)


def _split(
    name: str,
    columns: dict[str, np.ndarray],
    places: list[tuple[Geometry, tuple[float, float] | None]],
) -> Split:
    rows = columns["split"] == name
    chosen = [place for place, is_chosen in zip(places, rows, strict=True) if is_chosen]
    return Split(
        name=name,
        ids=tuple(columns["id"][rows]),
        filenames=tuple(columns["filename"][rows]),
        groups=tuple(columns["group"][rows]),
        shards=tuple(columns["shard"][rows]),
        offsets=columns["offset"][rows],
        lengths=columns["length"][rows],
        geometries=tuple(geometry for geometry, _ in chosen),
        spacings=tuple(spacing for _, spacing in chosen),
        pictures=tuple(columns["picture"][rows]),
        has_foreground=columns["foreground"][rows],
    )


def sample_order(num_samples: int, *, seed: int, epoch: int, version: int) -> np.ndarray:
    """Returns the order of an epoch: a permutation of 0..N-1, (N,) int64.

    Args:
        version: of the random streams.
    """
    random = epoch_generator(Purpose.ORDER, seed=seed, epoch=epoch, version=version)
    return random.permutation(num_samples)


def epoch_order(
    has_foreground: np.ndarray, share: float | None, *, seed: int, epoch: int, version: int
) -> np.ndarray:
    """Returns the samples of an epoch in their order, (N,) int64; as many as there are.

    Every sample once, or, where fewer than `share` of them have foreground: so many that have,
    drawn in rounds of all of them, and the first of a permutation of the others.

    Args:
        version: of the random streams.
    """
    count = len(has_foreground)
    positive, negative = np.flatnonzero(has_foreground), np.flatnonzero(~has_foreground)
    wanted = 0 if share is None else round(share * count)
    if not len(positive) or wanted <= len(positive):
        return sample_order(count, seed=seed, epoch=epoch, version=version)
    random = epoch_generator(Purpose.FOREGROUND_ORDER, seed=seed, epoch=epoch, version=version)
    num_rounds = -(-wanted // len(positive))
    rounds = [random.permutation(positive) for _ in range(num_rounds)]
    chosen = [*np.concatenate(rounds)[:wanted], *random.permutation(negative)[: count - wanted]]
    return random.permutation(np.array(chosen, np.int64))


def global_batches(order: np.ndarray, batch_size: int) -> np.ndarray:
    """Returns `order` cut into steps: (steps, batch_size) int64, the tail filled with PADDING."""
    num_steps = -(-len(order) // batch_size)
    padded = np.full(num_steps * batch_size, PADDING, np.int64)
    padded[: len(order)] = order
    return padded.reshape(num_steps, batch_size)


def copy_numbers(indices: np.ndarray) -> np.ndarray:
    """Returns how often each of `indices` has come before, in the same shape, int64."""
    flat = indices.ravel()
    places = np.argsort(flat, kind="stable")
    in_order = flat[places]
    numbers = np.empty(len(flat), np.int64)
    numbers[places] = np.arange(len(flat)) - np.searchsorted(in_order, in_order)
    return numbers.reshape(indices.shape)


def dropout_keys(
    indices: np.ndarray, *, seed: int, epoch: int, copies: np.ndarray | None = None
) -> np.ndarray:
    """Returns a key per sample, int64: a hash of (seed, epoch, sample index, number of the copy).

    Args:
        indices: of any shape.
        copies: `copy_numbers` of the epoch, at the same places; None: each is the first.

    Source of the mixing function: SplitMix64, Steele et al., OOPSLA 2014.
    """
    with np.errstate(over="ignore"):
        start = np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(epoch)
        state = _mixed(np.asarray(start))
        words = indices.astype(np.uint64)
        if copies is not None:
            words += copies.astype(np.uint64) << np.uint64(32)
        return _mixed(state + words).astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Record:
    """The two PNG files of one record."""

    image: bytes
    mask: bytes


class RecordReader:
    """Reads records by position, from local shards or by range over the network."""

    def __init__(self, store: Store, split: Split, folder: str | None) -> None:
        """Reads from the shards in `folder`, or from `store` where it is None."""
        self._store = store
        self._split = split
        self._folder = folder
        self.failure: FlexUNetError | None = None

    def read_many(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns images and masks of `indices` (B,) int64, both (B,) bytes of PNG files.

        It is called in a `tf.data` graph. TensorFlow turns an exception into one of its own, so
        the cause is kept in `failure`.
        """
        try:
            records = [self.read(int(index)) for index in indices]
        except FlexUNetError as error:
            self.failure = error
            raise
        images = np.array([record.image for record in records], object)
        return images, np.array([record.mask for record in records], object)

    def filename(self, index: int) -> str:
        """Returns the file name of the picture of sample `index`, for errors."""
        return self._split.filenames[index]

    def read(self, index: int) -> Record:
        """Returns the record of sample `index`.

        Raises:
            ContentError: the record is missing, damaged or another sample's; names the shard and
                the sample.
        """
        shard = self._split.shards[index]
        offset, length = int(self._split.offsets[index]), int(self._split.lengths[index])
        if self._folder is None:
            record = self._store.get(shard, offset, length)
        else:
            record = _read_part(local_path(self._folder, shard), offset, length)
        sample_id = self._split.ids[index]
        where = f"{self._store.url}/{shard}, sample {sample_id!r}"
        features = _features_of(unframe_record(record, where=where))
        # A shard in another's place has good checksums.
        if features.get(ID_FEATURE) != sample_id.encode():
            raise ContentError(
                f"{where}: the record is another sample's, so this is not the shard that was "
                "prepared; prepare the dataset again"
            )
        return Record(features[IMAGE_FEATURE], features[MASK_FEATURE])


def _read_part(path: str, offset: int, length: int) -> bytes:
    # Opened for every read: 10 us, and no limit on the number of shards.
    try:
        with open(path, "rb", buffering=0) as file:
            return os.pread(file.fileno(), length, offset)
    except FileNotFoundError as error:
        raise ContentError(f"{path}: the shard is missing; prepare the dataset again") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from error


def _features_of(payload: bytes) -> dict[str, bytes]:
    """Returns what a record needs of an Example; empty where it is none of this format."""
    import tensorflow as tf
    from google.protobuf.message import DecodeError

    try:
        # 0.02 ms; `decode_example`, which needs no TensorFlow, takes 0.2 ms, a twentieth of
        # decoding the pictures.
        features = tf.train.Example.FromString(payload).features.feature
    except DecodeError:
        return {}
    names = (ID_FEATURE, IMAGE_FEATURE, MASK_FEATURE)
    values = {name: features[name].bytes_list.value for name in names}
    return {name: found[0] for name, found in values.items()} if all(values.values()) else {}


def read_sample(reader: RecordReader, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns image (H, W, C) uint8|uint16 and mask (H, W) uint8 of sample `index`."""
    record = reader.read(index)
    name = reader.filename(index)
    image = read_image(record.image, name=name)
    mask = read_mask_pixels(record.mask, name=name)
    return image, mask.astype(np.uint8)


def open_reader(
    dataset: Dataset,
    split: Split,
    *,
    cache: str,
    cache_dir: str | None,
    alive: Callable[[], None] = lambda: None,
) -> RecordReader:
    """Returns a reader of `split`; remote shards are copied to the cache first unless `ranges`.

    Args:
        cache: "full" or "ranges".
        cache_dir: folder of the cache; None: `~/.cache/flexunet`.
        alive: called for every shard that is found in the cache, and while one is copied there.
    """
    store = open_store(dataset.url)
    if store.local_root is not None:
        _check_sizes(store, dataset.manifest, split)
        return RecordReader(store, split, store.local_root)
    if cache == "ranges":
        return RecordReader(store, split, None)
    folder = Path(cache_dir or Path.home() / ".cache" / "flexunet") / dataset.digest
    with _locked(folder, alive):
        _fill_cache(store.watched(alive), dataset.manifest, split, str(folder), alive)
    return RecordReader(store, split, str(folder))


def _check_sizes(store: Store, manifest: Manifest, split: Split) -> None:
    needed = set(split.shards)
    for shard in manifest.shards:
        if shard.name in needed:
            found = store.stat(shard.name)
            if found is None or found.size != shard.num_bytes:
                size = "missing" if found is None else f"{found.size} bytes"
                raise ContentError(
                    f"{store.url}/{shard.name}: {size}, the manifest says {shard.num_bytes} bytes; "
                    "prepare the dataset again"
                )


@contextmanager
def _locked(folder: Path, alive: Callable[[], None]) -> Iterator[None]:
    """Holds the cache's lock: one process of a machine fills it, the others wait."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StorageError(f"{folder}: cache is not writable: {error.strerror}") from error
    try:
        while not _is_taken(lock):
            alive()
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
    store: Store, manifest: Manifest, split: Split, folder: str, alive: Callable[[], None]
) -> None:
    missing, used = [], set(split.shards)
    for shard in manifest.shards:
        if shard.name in used and not _is_cached(folder, shard):
            missing.append(shard)
        alive()
    needed, free = sum(shard.num_bytes for shard in missing), shutil.disk_usage(folder).free
    if needed > free:
        raise StorageError(
            f"{folder}: {needed / 2**20:.0f} MiB of shards do not fit the {free / 2**20:.0f} MiB "
            "left on this disk; give another --cache-dir or read by range with --cache ranges"
        )
    for shard in missing:
        logger.info("caching %s/%s (%.1f MiB)", store.url, shard.name, shard.num_bytes / 2**20)
        path = local_path(folder, shard.name)
        if store.get_file(shard.name, path) != shard.crc32c:
            Path(path).unlink()
            raise ContentError(
                f"{store.url}/{shard.name}: its CRC32C is not the manifest's; "
                "the dataset is damaged, prepare it again"
            )
        alive()


def _is_cached(folder: str, shard: Any) -> bool:
    path = local_path(folder, shard.name)
    if not os.path.exists(path):
        return False
    # A copy from an earlier run is trusted only after its content was read again.
    if os.path.getsize(path) == shard.num_bytes and crc32c_of_file(path) == shard.crc32c:
        return True
    logger.warning("%s: damaged cache copy; fetching it again", path)
    os.unlink(path)
    return False


def make_batches(
    dataset: Dataset,
    reader: RecordReader,
    batches: np.ndarray,
    *,
    seed: int,
    epoch: int,
    first_step: int = 0,
    augmentation: AugmentationConfig | None = None,
    first_replica: int = 0,
    num_replicas: int = 1,
    num_local_replicas: int = 1,
) -> Any:
    """Returns a `tf.data.Dataset` of per-replica batches, in the order in which replicas take them.

    Each element holds `image` (b, H, W, C) uint8|uint16, `mask` (b, H, W) uint8, `weight` (b,)
    float32 and `key` (b,) int64, with b = global batch / num_replicas.

    Args:
        batches: (steps, global batch) sample indices of an epoch, PADDING included.
        first_step: where to begin in them.
        first_replica: global number of this process' first replica.
        num_local_replicas: replicas of this process; each takes every num_local_replicas-th batch.
    """
    import tensorflow as tf

    # A sample that comes twice in an epoch is another one each time.
    copies = np.where(batches == PADDING, 0, copy_numbers(batches))[first_step:]
    batches = batches[first_step:]
    indices, copies = (
        _per_replica(each, first_replica, num_replicas, num_local_replicas)
        for each in (batches, copies)
    )
    weights = (indices != PADDING).astype(np.float32)
    # Padding repeats the step's first sample: real pixels, weight 0.
    fillers = np.repeat(batches[:, :1], num_local_replicas, axis=0)
    indices = np.where(indices == PADDING, fillers, indices)
    keys = dropout_keys(indices, seed=seed, epoch=epoch, copies=copies)

    def load(index: Any, copy: Any, weight: Any, key: Any) -> dict[str, Any]:
        files = tf.numpy_function(reader.read_many, [index], [tf.string, tf.string])
        image, mask = (tf.ensure_shape(each, [indices.shape[1]]) for each in files)
        return {
            "image": image,
            "mask": mask,
            "index": index,
            "copy": copy,
            "weight": weight,
            "key": key,
        }

    decode = _decoder(dataset.manifest, augmentation, seed, epoch)
    parallel = available_cores()
    data = tf.data.Dataset.from_tensor_slices((indices, copies, weights, keys))
    # Converted ones leave a file in the folder for temporary files when a process is killed.
    load, decode = map(tf.autograph.experimental.do_not_convert, (load, decode))
    data = data.map(load, num_parallel_calls=parallel, deterministic=True)
    data = data.unbatch().map(decode, num_parallel_calls=parallel, deterministic=True)
    data = data.batch(indices.shape[1], drop_remainder=True)
    options = tf.data.Options()
    # Autotuning runs a thread that sleeps for up to a minute, and the end of an iterator waits for
    # it: seconds lost at every end of an epoch (TensorFlow 2.21). A fixed number is as fast.
    options.autotune.enabled = False
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return data.prefetch(2 * num_local_replicas).with_options(options)


def iterate(batches: Any, reader: RecordReader) -> Iterator[Any]:
    """Yields the elements of `batches`; a failure of `reader` comes out as what it was."""
    import tensorflow as tf

    elements = iter(batches)
    while True:
        try:
            element = next(elements)
        except StopIteration:
            return
        except tf.errors.OpError as error:
            if reader.failure is not None:
                raise reader.failure from error
            raise
        yield element


def distributed_batches(
    strategy: Any,
    dataset: Dataset,
    reader: RecordReader,
    plan: np.ndarray,
    *,
    seed: int,
    epoch: int,
    first_step: int = 0,
    augmentation: AugmentationConfig | None = None,
    first_replica: int = 0,
) -> Iterator[Any]:
    """Yields a per-replica batch for every step of `plan`, (steps, global batch) sample indices.

    `plan` is that of a whole epoch, and begun at `first_step`.

    The parts are handed to the replicas here rather than by a distributed dataset, which takes a
    quarter of a second longer to start and assigns samples by rules of its own.

    Args:
        first_replica: global number of this process' first replica.
    """
    num_replicas = strategy.num_replicas_in_sync
    num_local = len(strategy.extended.worker_devices)
    batches = make_batches(
        dataset,
        reader,
        plan,
        seed=seed,
        epoch=epoch,
        first_step=first_step,
        augmentation=augmentation,
        first_replica=first_replica,
        num_replicas=num_replicas,
        num_local_replicas=num_local,
    )
    elements = iterate(batches, reader)
    for first in elements:
        parts = [first, *itertools.islice(elements, num_local - 1)]
        on_devices = [
            _on_device(part, device)
            for part, device in zip(parts, strategy.extended.worker_devices, strict=True)
        ]
        yield strategy.experimental_distribute_values_from_function(
            lambda context, parts=on_devices: parts[context.replica_id_in_sync_group % num_local]
        )


def one_ahead(batches: Iterator[T]) -> Iterator[T]:
    """Yields `batches`, the next of which a thread takes, and hands to its device, meanwhile."""
    with ThreadPoolExecutor(1, thread_name_prefix="next-batch") as thread:
        taken = thread.submit(next, batches, None)
        while (batch := taken.result()) is not None:
            taken = thread.submit(next, batches, None)
            yield batch


def _on_device(part: Mapping[str, Any], device: str) -> dict[str, Any]:
    import tensorflow as tf

    with tf.device(device):
        # Random generators take their keys from the host.
        return {
            name: value if name == "key" else tf.identity(value) for name, value in part.items()
        }


def _per_replica(
    batches: np.ndarray, first_replica: int, num_replicas: int, num_local_replicas: int
) -> np.ndarray:
    num_steps, batch_size = batches.shape
    per_replica = batches.reshape(num_steps, num_replicas, batch_size // num_replicas)
    local = per_replica[:, first_replica : first_replica + num_local_replicas]
    return local.reshape(num_steps * num_local_replicas, batch_size // num_replicas)


def _decoder(
    manifest: Manifest, augmentation: AugmentationConfig | None, seed: int, epoch: int
) -> Any:
    import tensorflow as tf

    height, width = manifest.image_height, manifest.image_width
    dtype = tf.uint16 if manifest.bit_depth == 16 else tf.uint8

    def warp(
        image: np.ndarray, mask: np.ndarray, index: np.ndarray, copy: np.ndarray
    ) -> list[np.ndarray]:
        assert augmentation is not None  # noqa: S101 - only called where it is set
        return list(
            augment(
                image,
                mask,
                config=augmentation,
                seed=seed,
                epoch=epoch,
                sample_index=int(index),
                value_max=manifest.value_max,
                copy=int(copy),
            )
        )

    def decode(element: dict[str, Any]) -> dict[str, Any]:
        image = tf.io.decode_png(element["image"], manifest.channels, dtype)
        mask = tf.io.decode_png(element["mask"], 1, tf.uint8)[..., 0]
        if augmentation is not None and augmentation.enabled:
            image, mask = tf.numpy_function(
                warp, [image, mask, element["index"], element["copy"]], [dtype, tf.uint8]
            )
        return {
            "image": tf.ensure_shape(image, [height, width, manifest.channels]),
            "mask": tf.ensure_shape(mask, [height, width]),
            "weight": element["weight"],
            "key": element["key"],
        }

    return decode
