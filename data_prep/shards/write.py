"""Runs pass 2 of preparation: copies staged records into shards and rows of the sample table.

Pass 1 (`encode.py`) leaves finished records under `prep-state/` of the output. This pass assigns
records to shards and copies the bytes. It encodes a record again only if its image has another
format than the dataset, or its group was merged.

After an interruption: staged records are found by a digest of their inputs.
`prep-state/plan.json`, written before the first shard, defines the content of the shards. An
existing shard is compared (size and CRC32C) with the one to write, and kept. The staged records
need as much space as the dataset, until they are deleted after the commit.

Samples of a split are ordered by the sha256 of seed and id, so that neighbours in a file are
unrelated.

The module does not depend on the origin of samples or on how splits are drawn.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import google_crc32c

from data_prep.imaging.arrays import decode_image, encode_image
from data_prep.imaging.pixels import PixelFormat, convert
from data_prep.shards.encode import moments_of
from data_prep.shards.manifest import ShardInfo, shard_name
from data_prep.shards.output import put_once, staging_url
from data_prep.shards.records import (
    IMAGE_FEATURE,
    decode_example,
    encode_features,
    frame_record,
    sha256_of_pixels,
    unframe_record,
)
from data_prep.shards.source_pairs import EncodedSample, Moments
from data_prep.shards.staging import store_at
from data_prep.splits.names import SPLITS, Split
from flexunet.errors import ContentError
from flexunet.process_pool import in_order_ahead, request_threads
from flexunet.storage import ObjectStore

_MEGABYTE = 10**6
_MAX_GAP_BYTES = 1 << 18  # that are read between two records, instead of another request
_MAX_RANGE_BYTES = 1 << 23  # of a request, unless a record is larger


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """The arguments of one call of `write_shard`: the records of one shard, in order.

    Attributes:
        num_requests: requests at once; 1: without other threads.
    """

    output_url: str
    name: str
    split: Split
    pixel_format: PixelFormat
    records: tuple[EncodedSample, ...]
    num_requests: int = 1


@dataclasses.dataclass(frozen=True)
class RecordLocation:
    """The location of a record in its shard, and sha256 and moments of the stored image."""

    offset: int
    length: int
    sha256: str
    moments: Moments


@dataclasses.dataclass(frozen=True)
class WrittenShard:
    """A stored shard; `records` have the order of its task."""

    info: ShardInfo
    records: tuple[RecordLocation, ...]


def plan_shards(
    samples: Sequence[EncodedSample],
    splits: Mapping[str, str],
    *,
    pixel_format: PixelFormat,
    output_url: str,
    shard_size_mb: float,
    seed: int,
) -> list[ShardTask]:
    """Returns the shards to write, which depend only on the samples and the seed.

    Args:
        splits: split of each sample id.
        shard_size_mb: target size; a split with samples has at least one shard.
    """
    tasks = []
    for split in SPLITS:
        members = [sample for sample in samples if splits[sample.id] == split]
        members.sort(key=lambda sample: _order(seed, sample.id))
        parts = list(_cut(members, shard_size_mb * _MEGABYTE))
        for i, part in enumerate(parts):
            name = shard_name(split, i, len(parts))
            tasks.append(ShardTask(output_url, name, split, pixel_format, part))
    return tasks


def write_shard(task: ShardTask) -> WrittenShard:
    """Writes one shard, unless it exists with the same bytes.

    Raises:
        ContentError: a staged record is damaged, or another shard with this name exists.
        StorageError: reading or writing failed; the same command continues.
    """
    staging = store_at(staging_url(task.output_url))
    parts = _staged_records(staging, task)
    placed, offset = [], 0
    for i, scanned in enumerate(task.records):
        where = f"{staging.url}/{scanned.staged} at {scanned.offset}"
        record, sha256, moments = _final_record(parts[i], scanned, task.pixel_format, where)
        placed.append(RecordLocation(offset, len(record), sha256, moments))
        parts[i] = record
        offset += len(record)
    data = b"".join(parts)
    parts.clear()
    put_once(store_at(task.output_url), task.name, data)
    info = ShardInfo(
        name=task.name,
        split=task.split,
        num_records=len(placed),
        num_bytes=len(data),
        crc32c=google_crc32c.value(data),
    )
    return WrittenShard(info, tuple(placed))


def sample_rows(
    tasks: Iterable[ShardTask], shards: Iterable[WrittenShard], folds: Mapping[str, int]
) -> Iterator[dict[str, Any]]:
    """Yields the rows of `samples.parquet`, in the order of the shards.

    Args:
        tasks: the task of each of `shards`.
        folds: fold of the sample ids that have one.
    """
    for task, shard in zip(tasks, shards, strict=True):
        for scanned, placed in zip(task.records, shard.records, strict=True):
            spacing = scanned.spacing_mm or (None, None)
            yield {
                "split": shard.info.split,
                "shard": shard.info.name,
                "offset": placed.offset,
                "length": placed.length,
                "id": scanned.id,
                "group": scanned.group,
                "filename": scanned.filename,
                "spacing_y_mm": spacing[0],
                "spacing_x_mm": spacing[1],
                "pixels_per_class": scanned.pixels_per_class,
                "off_map_pixels": scanned.unmapped_pixels,
                "sha256": placed.sha256,
                "fold": folds.get(scanned.id),
                "picture": scanned.image_id if scanned.geometry.kind == "tile" else None,
                **_geometry_columns(scanned),
            }


def mean_and_std(moments: Sequence[Moments]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation per channel of all pixels, as raw values.

    Computes with integers until the last division, so that the order has no effect.
    """
    count = sum(part.num_pixels for part in moments)
    means, deviations = [], []
    for channel in range(len(moments[0].sums)):
        total = sum(part.sums[channel] for part in moments)
        squares = sum(part.squares[channel] for part in moments)
        means.append(total / count)
        deviations.append(math.sqrt((squares * count - total * total) / (count * count)))
    return tuple(means), tuple(deviations)


@dataclasses.dataclass
class _Range:
    """A range of a staged object, and the positions in the shard of the records to take from it."""

    staged: str
    start: int
    end: int
    places: list[int]


def ranges_of(records: Sequence[EncodedSample]) -> list[_Range]:
    """Returns the ranges to read for `records`, in the order of their first record.

    A range may contain a few bytes of other records, which takes less time than another request.
    """
    ranges: list[_Range] = []
    for i in sorted(range(len(records)), key=lambda i: (records[i].staged, records[i].offset)):
        scanned = records[i]
        end = scanned.offset + scanned.length
        last = ranges[-1] if ranges else None
        if (
            last is not None
            and last.staged == scanned.staged
            and scanned.offset - last.end <= _MAX_GAP_BYTES
            and end - last.start <= _MAX_RANGE_BYTES
        ):
            last.end = end
            last.places.append(i)
        else:
            ranges.append(_Range(scanned.staged, scanned.offset, end, [i]))
    return sorted(ranges, key=lambda each: min(each.places))


def _staged_records(staging: ObjectStore, task: ShardTask) -> list[bytes]:
    """Returns the staged records of a shard, in its order."""

    def read(part: _Range) -> bytes:
        return staging.get(part.staged, part.start, part.end - part.start)

    records, ranges = [b""] * len(task.records), ranges_of(task.records)
    with request_threads(task.num_requests) as threads:
        ahead = in_order_ahead(threads, read, ranges, size_of=lambda each: each.end - each.start)
        for part, data in zip(ranges, ahead, strict=True):
            for i in part.places:
                start = task.records[i].offset - part.start
                records[i] = data[start : start + task.records[i].length]
    return records


def _final_record(
    record: bytes, scanned: EncodedSample, pixel_format: PixelFormat, where: str
) -> tuple[bytes, str, Moments]:
    payload = unframe_record(record, where=where)
    is_as_stored = (scanned.channels, scanned.bit_depth) == (
        pixel_format.channels,
        pixel_format.bit_depth,
    )
    is_as_stored &= scanned.value_max in (None, pixel_format.value_max)
    is_as_stored &= not scanned.num_above or scanned.max_value <= pixel_format.value_max
    if is_as_stored and scanned.group == scanned.staged_group:
        return record, scanned.sha256, scanned.moments
    features = decode_example(payload)
    features["image/group"] = scanned.group.encode()  # groups are merged after staging
    sha256, moments = scanned.sha256, scanned.moments
    if not is_as_stored:
        encoded = features[IMAGE_FEATURE]
        if not isinstance(encoded, bytes):
            raise ContentError(f"{where}: image/encoded is not bytes; delete this object")
        image = decode_image(encoded, scanned.channels, name=scanned.filename)
        image = convert(image, pixel_format, value_max=scanned.value_max)
        features |= {IMAGE_FEATURE: encode_image(image), "image/channels": image.shape[2]}
        sha256, moments = sha256_of_pixels(image), moments_of(image)
    return frame_record(encode_features(features)), sha256, moments


def _order(seed: int, sample_id: str) -> bytes:
    return hashlib.sha256(f"{seed}:{sample_id}".encode()).digest()


def _cut(
    samples: Sequence[EncodedSample], shard_bytes: float
) -> Iterator[tuple[EncodedSample, ...]]:
    """Yields `samples` in parts of about equal size, of at most about `shard_bytes` each."""
    total = sum(sample.length for sample in samples)
    count = max(1, math.ceil(total / shard_bytes))
    parts: dict[int, list[EncodedSample]] = {}
    start = 0
    for sample in samples:
        middle = start + sample.length / 2
        parts.setdefault(int(middle * count / total), []).append(sample)
        start += sample.length
    for part in parts.values():
        yield tuple(part)


def _geometry_columns(scanned: EncodedSample) -> dict[str, Any]:
    values = dataclasses.asdict(scanned.geometry)
    crop = values.pop("crop") or {}
    part = {f"crop_{name}": crop.get(name) for name in ("top", "left", "height", "width")}
    return {"geometry_kind": values.pop("kind"), **values, **part}
