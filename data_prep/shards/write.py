"""Pass 2 of preparation: staged records become shards, and the commit of the dataset.

Pass 1 (`scan.py`) leaves finished records under `prep-state/` of the output. This pass decides
which record goes where and copies the bytes; only the odd record, of a picture of another kind than
the dataset's or of a joined group, is decoded and encoded again.

How an interrupted preparation continues: staged records are found by a digest of their inputs;
`prep-state/plan.json`, written before the first shard, says what the shards will hold; a shard that
is there already is compared (size and CRC32C) with what would be written, and kept. The staged
records need as much space as the dataset itself until they are deleted after the commit.

Order in a split: by the sha256 of seed and id, so that neighbours in a file are strangers.

This module must not know where samples come from, nor how splits are drawn.
"""

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import google_crc32c

from data_prep.imaging.codecs import encode_png, read_image
from data_prep.imaging.pixels import FEW_PIXELS, Target, convert
from data_prep.shards import encode, schema
from data_prep.shards.encode import Moments, Scanned, moments_of, store_at
from flexunet.errors import ContentError, UsageError
from flexunet.storage import Forbidden, NotFound, PreconditionFailed, Store, holds, join_url

logger = logging.getLogger(__name__)

STATE_PREFIX = "prep-state"
PLAN_NAME = f"{STATE_PREFIX}/plan.json"
_FEW_PICTURES = 10  # and one of so many pictures may have such pixels
_SPARED_BITS = 2  # that their loss must spare: one bit of darkness is cheaper than lost values
_MEGABYTE = 10**6


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """One call of `write_shard`: the records of one shard, in order."""

    output_url: str
    name: str
    split: schema.Split
    target: Target
    records: tuple[Scanned, ...]


@dataclasses.dataclass(frozen=True)
class Placed:
    """A record's place in its shard; sha256 and moments are those of the stored picture."""

    offset: int
    length: int
    sha256: str
    moments: Moments


@dataclasses.dataclass(frozen=True)
class WrittenShard:
    """A shard that is on storage; `records` are in the order of its task's."""

    info: schema.ShardInfo
    records: tuple[Placed, ...]


def staging_url(output_url: str) -> str:
    """Returns the place of staged records."""
    return join_url(output_url, STATE_PREFIX)


def common_target(samples: Iterable[Scanned], full_scale: int | None = None) -> Target:
    """Returns the least format that holds the pictures: grey only when all are grey.

    `value_max` is 255 for 8 bits, else `full_scale`, or where that is None 2**bits - 1 of the bits
    that the pictures need, as a 12-bit detector stores 0..4095 in 16-bit files. A few pixels of a
    few pictures do not count, as markers burned in, where the others need two bits less; see
    `clipped`. What files say of their full scale counts always.
    """
    is_grey, is_shallow, stated = True, True, 255
    unstated = {}
    for sample in samples:
        is_grey &= sample.channels == 1
        is_shallow &= sample.bit_depth == 8
        if sample.num_above:
            unstated[sample.picture] = sample
        else:
            stated = max(stated, sample.max_value)
    channels: Literal[1, 3] = 1 if is_grey else 3
    if is_shallow:
        return Target(channels, 8, 255)
    found = full_scale or max(2 ** stated.bit_length() - 1, _full_scale(list(unstated.values())))
    return Target(channels, 16, found)


def _full_scale(pictures: Sequence[Scanned]) -> int:
    """Returns the full scale of 16-bit pictures that do not say it, 255 without any."""
    highest = max((picture.max_value for picture in pictures), default=0)
    num_bits = max(8, highest.bit_length())
    num_few = len(pictures) // _FEW_PICTURES
    for place, scale in _sparing(pictures, num_bits):
        if sum(picture.num_above[place] > 0 for picture in pictures) <= num_few:
            return scale
    return 2**num_bits - 1


def _sparing(pictures: Sequence[Scanned], num_bits: int) -> Iterator[tuple[int, int]]:
    """Yields the full scales, with their places, above which every picture has few pixels.

    Only those are yielded that need clearly fewer than `num_bits`, the smallest first.
    """
    for place, scale in enumerate(encode.full_scales(None)):
        if scale.bit_length() <= num_bits - _SPARED_BITS and all(
            each.num_above[place] * FEW_PIXELS <= _num_pixels(each) for each in pictures
        ):
            yield place, scale


def _num_pixels(picture: Scanned) -> int:
    return picture.geometry.source_height * picture.geometry.source_width


def sparing_scale(samples: Iterable[Scanned], value_max: int) -> int | None:
    """Returns the least full scale, clearly below `value_max`, that would clip few pixels.

    None where there is none. Where such pixels are in many pictures, only the user knows whether
    they are markers. The full scale was found, not given.
    """
    pictures = list({each.picture: each for each in samples if each.num_above}.values())
    found = _sparing(pictures, value_max.bit_length()) if pictures else iter(())
    return next((scale for _, scale in found), None)


def clipped(
    samples: Iterable[Scanned], value_max: int, full_scale: int | None
) -> list[tuple[Scanned, int]]:
    """Returns the pictures with pixels above `value_max`, and how many, the most first.

    Args:
        full_scale: the one that was given, or None.
    """
    place = encode.full_scales(full_scale).index(value_max)
    pictures = {sample.picture: sample for sample in samples if sample.num_above}.values()
    found = [(each, each.num_above[place]) for each in pictures if each.num_above[place]]
    return sorted(found, key=lambda each: (-each[1], each[0].id))


def plan_shards(
    samples: Sequence[Scanned],
    splits: Mapping[str, str],
    *,
    target: Target,
    output_url: str,
    shard_size_mb: float,
    seed: int,
) -> list[ShardTask]:
    """Returns the shards to write; it depends on the samples and the seed alone.

    Args:
        splits: split of each sample id.
        shard_size_mb: size to aim at; a split with samples has at least one shard.
    """
    tasks = []
    for split in schema.SPLITS:
        members = [sample for sample in samples if splits[sample.id] == split]
        members.sort(key=lambda sample: _order(seed, sample.id))
        parts = list(_cut(members, shard_size_mb * _MEGABYTE))
        for i, part in enumerate(parts):
            name = schema.shard_name(split, i, len(parts))
            tasks.append(ShardTask(output_url, name, split, target, part))
    return tasks


def claim_output(store: Store, plan: Mapping[str, Any]) -> None:
    """Binds the output to `plan`: from now on nothing else may be prepared there.

    Args:
        plan: options and source of the preparation, JSON values.

    Raises:
        UsageError: another preparation began there, or it holds shards of unknown origin.
    """
    data = _plan_bytes(plan)
    try:
        found = store.get(PLAN_NAME)
    except NotFound:
        _refuse_strangers(store)
        try:
            store.put(PLAN_NAME, data, if_generation=0)
            return
        except PreconditionFailed:
            found = store.get(PLAN_NAME)
    if found != data:
        differs = describe_difference(_parse_plan(found), plan)
        raise UsageError(
            f"{store.url}: another preparation was interrupted here ({differs}); repeat its "
            "command, or delete the folder, or choose another"
        )


def describe_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Returns the first options that differ, in words; `source_sha256` stands for the source."""
    before, after = old.get("options", {}), new.get("options", {})
    changes = [
        f"--{name.replace('_', '-')} was {before.get(name)}, now {after.get(name)}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]
    if not changes and old.get("source_sha256") != new.get("source_sha256"):
        changes = ["the files of the source changed"]
    return "; ".join(changes[:3]) or "made by another version"


def write_shard(task: ShardTask) -> WrittenShard:
    """Writes one shard, unless the same bytes are there already.

    Raises:
        ContentError: a staged record is damaged, or another shard of this name is there.
        StorageError: reading or writing failed; the same command continues.
    """
    staging = store_at(staging_url(task.output_url))
    parts, placed, offset = [], [], 0
    for scanned in task.records:
        record, sha256, moments = _final_record(staging, scanned, task.target)
        placed.append(Placed(offset, len(record), sha256, moments))
        parts.append(record)
        offset += len(record)
    data = b"".join(parts)
    parts.clear()
    _put_once(store_at(task.output_url), task.name, data)
    info = schema.ShardInfo(
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
        tasks: what each of `shards` was written from.
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
                "off_map_pixels": scanned.off_map_pixels,
                "sha256": placed.sha256,
                "fold": folds.get(scanned.id),
                "picture": scanned.picture if scanned.geometry.kind == "tile" else None,
                **_geometry_columns(scanned),
            }


def mean_and_std(moments: Sequence[Moments]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation per channel of all pixels, raw values.

    Integers until the last division: the result does not depend on the order.
    """
    count = sum(part.num_pixels for part in moments)
    means, deviations = [], []
    for channel in range(len(moments[0].sums)):
        total = sum(part.sums[channel] for part in moments)
        squares = sum(part.squares[channel] for part in moments)
        means.append(total / count)
        deviations.append(math.sqrt((squares * count - total * total) / (count * count)))
    return tuple(means), tuple(deviations)


def commit(store: Store, manifest: schema.Manifest, samples: bytes) -> None:
    """Publishes the dataset: the sample table, then the manifest, which makes it whole."""
    _put_once(store, schema.SAMPLES_NAME, samples)
    _put_once(store, schema.MANIFEST_NAME, manifest.to_json())


def remove_state(store: Store) -> None:
    """Deletes the staged records and the plan; the dataset needs neither.

    The plan goes last: it says what the rest is. Where the credentials may create and not delete,
    all of it stays, which a warning tells.
    """
    store.remove_unfinished()
    stats = store.list(f"{STATE_PREFIX}/")
    try:
        for stat in sorted(stats, key=lambda stat: stat.name == PLAN_NAME):
            store.delete(stat.name)
    except Forbidden:
        logger.warning(
            "%s: %d objects stay (%.1f MB), as these credentials may not delete; the dataset is "
            "complete without them",
            *(staging_url(store.url), len(stats), sum(stat.size for stat in stats) / _MEGABYTE),
        )


def _final_record(staging: Store, scanned: Scanned, target: Target) -> tuple[bytes, str, Moments]:
    record = staging.get(scanned.staged, scanned.offset, scanned.length)
    where = f"{staging.url}/{scanned.staged} at {scanned.offset}"
    payload = schema.unframe_record(record, where=where)
    is_as_stored = (scanned.channels, scanned.bit_depth) == (target.channels, target.bit_depth)
    is_as_stored &= scanned.value_max in (None, target.value_max)
    is_as_stored &= not scanned.num_above or scanned.max_value <= target.value_max
    if is_as_stored and scanned.group == scanned.staged_group:
        return record, scanned.sha256, scanned.moments
    features = schema.decode_example(payload)
    features["image/group"] = scanned.group.encode()  # groups are joined after they were staged
    sha256, moments = scanned.sha256, scanned.moments
    if not is_as_stored:
        encoded = features[schema.IMAGE_FEATURE]
        if not isinstance(encoded, bytes):
            raise ContentError(f"{where}: image/encoded is not bytes; delete {staging.url}")
        image = read_image(encoded, name=scanned.filename, max_pixels=2**62)
        image = convert(image, target, value_max=scanned.value_max)
        features |= {schema.IMAGE_FEATURE: encode_png(image), "image/channels": image.shape[2]}
        sha256, moments = schema.sha256_of_pixels(image), moments_of(image)
    return schema.frame_record(schema.encode_features(features)), sha256, moments


def _put_once(store: Store, name: str, data: bytes) -> None:
    """Puts `data` where nothing is; the same bytes from an earlier attempt are kept."""
    if _kept(store, name, data):
        return
    try:
        store.put(name, data, if_generation=0)
    except PreconditionFailed:
        # Another process of the same preparation was quicker.
        _kept(store, name, data)


def _kept(store: Store, name: str, data: bytes) -> bool:
    stat = store.stat(name)
    if stat is None:
        return False
    if not holds(store, stat, data):
        raise ContentError(
            f"{store.url}/{name}: is not what this preparation writes (damaged, or of another "
            "preparation); delete it and run the same command, or choose another folder"
        )
    return True


def _refuse_strangers(store: Store) -> None:
    for stat in store.list():
        if schema.SHARD_PATTERN.fullmatch(stat.name) or stat.name == schema.SAMPLES_NAME:
            raise UsageError(
                f"{store.url}: {stat.name} is there and belongs to no preparation that could be "
                "continued; delete it or choose another folder"
            )


def _plan_bytes(plan: Mapping[str, Any]) -> bytes:
    return json.dumps(plan, indent=1, sort_keys=True).encode()


def _parse_plan(data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _order(seed: int, sample_id: str) -> bytes:
    return hashlib.sha256(f"{seed}:{sample_id}".encode()).digest()


def _cut(samples: Sequence[Scanned], shard_bytes: float) -> Iterator[tuple[Scanned, ...]]:
    """Yields `samples` in parts of about equal bytes, as few as `shard_bytes` asks for."""
    total = sum(sample.length for sample in samples)
    count = max(1, math.ceil(total / shard_bytes))
    parts: dict[int, list[Scanned]] = {}
    start = 0
    for sample in samples:
        middle = start + sample.length / 2
        parts.setdefault(int(middle * count / total), []).append(sample)
        start += sample.length
    for part in parts.values():
        yield tuple(part)


def _geometry_columns(scanned: Scanned) -> dict[str, Any]:
    values = dataclasses.asdict(scanned.geometry)
    crop = values.pop("crop") or {}
    part = {f"crop_{name}": crop.get(name) for name in ("top", "left", "height", "width")}
    return {"geometry_kind": values.pop("kind"), **values, **part}
