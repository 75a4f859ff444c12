"""Reads records by position and checks that each belongs to the expected sample.

`samples.parquet` has the position of each record, so that samples can be read in any order.
TensorFlow itself reads local files only.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.imaging.arrays import decode_image
from data_prep.imaging.codecs import read_mask_pixels
from data_prep.shards.records import (
    ID_FEATURE,
    IMAGE_FEATURE,
    MASK_FEATURE,
    decode_example,
    unframe_record,
)
from flexunet.errors import ContentError, FlexUNetError, StorageError
from flexunet.storage import ObjectStore, local_path
from job.data.dataset import Split
from job.data.record_cache import ReadAhead, RecordKey, RemoteRecords


@dataclass(frozen=True)
class Record:
    """Holds the two PNG files of one record."""

    image: bytes
    mask: bytes


class RecordReader:
    """Reads records by position, from local shards or by range over the network."""

    def __init__(
        self, store: ObjectStore, split: Split, source: str | RemoteRecords, *, channels: int
    ) -> None:
        """Reads `split` of the dataset in `store`.

        Args:
            source: folder of the shards, or the records of `store`.
            channels: of the stored images.
        """
        self.channels = channels
        self._store = store
        self._split = split
        self._folder = source if isinstance(source, str) else None
        self._ahead = ReadAhead(source, self._key) if isinstance(source, RemoteRecords) else None
        self.failure: FlexUNetError | None = None

    def expect(self, indices: np.ndarray) -> None:
        """Sets the samples (N,) int64 that are read next; fetches remote ones ahead."""
        if self._ahead is not None:
            self._ahead.expect(indices.tolist())

    def read_many(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns images and masks of `indices` (B,) int64, both (B,) bytes of PNG files.

        A `tf.data` graph calls it. TensorFlow replaces an exception by one of its own, so
        `failure` keeps the cause.
        """
        try:
            records = [self.read(int(index)) for index in indices]
        except FlexUNetError as error:
            self.failure = error
            raise
        images = np.array([record.image for record in records], object)
        return images, np.array([record.mask for record in records], object)

    def filename(self, index: int) -> str:
        """Returns the image file name of sample `index`, for errors."""
        return self._split.filenames[index]

    def read(self, index: int) -> Record:
        """Returns the record of sample `index`.

        Raises:
            ContentError: the record is missing, damaged or of another sample; names the shard and
                the sample.
        """
        key = self._key(index)
        if self._ahead is not None:
            record = self._ahead.read(index)
        else:
            record = _read_part(local_path(self._folder or "", key.shard), key.offset, key.length)
        sample_id = self._split.ids[index]
        where = f"{self._store.url}/{key.shard}, sample {sample_id!r}"
        features = _features_of(unframe_record(record, where=where))
        # Checksums do not detect a shard that was replaced by another.
        if features.get(ID_FEATURE) != sample_id.encode():
            raise ContentError(
                f"{where}: the record belongs to another sample, so the shard was replaced; "
                "prepare the dataset again"
            )
        return Record(features[IMAGE_FEATURE], features[MASK_FEATURE])

    def _key(self, index: int) -> RecordKey:
        split = self._split
        return RecordKey(split.shards[index], int(split.offsets[index]), int(split.lengths[index]))


def _read_part(path: str, offset: int, length: int) -> bytes:
    # Opening for every read takes 10 us and sets no limit on the number of shards.
    try:
        with open(path, "rb", buffering=0) as file:
            return os.pread(file.fileno(), length, offset)
    except FileNotFoundError as error:
        raise ContentError(f"{path}: the shard is missing; prepare the dataset again") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from error


def _features_of(payload: bytes) -> dict[str, bytes]:
    """Returns the features of an Example that a record needs; empty if the format is another."""
    names = (ID_FEATURE, IMAGE_FEATURE, MASK_FEATURE)
    values = (_bytes_with_tensorflow if "tensorflow" in sys.modules else _bytes_of)(payload, names)
    return values if len(values) == len(names) else {}


def _bytes_with_tensorflow(payload: bytes, names: Sequence[str]) -> dict[str, bytes]:
    import tensorflow as tf
    from google.protobuf.message import DecodeError

    try:
        # This takes 0.02 ms. `decode_example`, which needs no TensorFlow, takes 0.2 ms, a twentieth
        # of the time to decode the images.
        features = tf.train.Example.FromString(payload).features.feature
    except DecodeError:
        return {}
    values = {name: features[name].bytes_list.value for name in names}
    return {name: found[0] for name, found in values.items() if found}


def _bytes_of(payload: bytes, names: Sequence[str]) -> dict[str, bytes]:
    try:
        features = decode_example(payload)
    except ContentError:
        return {}
    values = ((name, features.get(name)) for name in names)
    return {name: value for name, value in values if isinstance(value, bytes)}


def read_sample(reader: RecordReader, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns image (H, W, C) uint8|uint16 and mask (H, W) uint8 of sample `index`."""
    record = reader.read(index)
    name = reader.filename(index)
    image = decode_image(record.image, reader.channels, name=name)
    mask = read_mask_pixels(record.mask, name=name)
    return image, mask.astype(np.uint8)
