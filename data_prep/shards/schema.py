"""The dataset contract: record features, TFRecord framing, sample table and manifest.

Writer (`data_prep`) and reader (`job`) meet here and nowhere else. The module must not know how
samples are found, split or spread over shards, and must not import TensorFlow: the few lines of
wire format below are tested against TensorFlow's own reader.

A dataset is a folder with
    train-00000-of-00002.tfrecord ...  records of `tf.train.Example`, see `encode_example`
    samples.parquet                    a row per sample, see `sample_schema`
    dataset.json                       the manifest; written last, so that it is the commit
"""

import dataclasses
import hashlib
import io
import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import google_crc32c
import numpy as np
from pydantic import Field, ValidationError, model_validator

from data_prep.imaging.breast import Crop, Flip
from data_prep.imaging.color_map import ClassColor
from flexunet.errors import ContentError, UsageError
from flexunet.settings import Settings

if TYPE_CHECKING:
    import pyarrow

    from data_prep.imaging.geometry import Geometry
    from flexunet.storage import Store

FORMAT_VERSION = 1
Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
MANIFEST_NAME = "dataset.json"
SAMPLES_NAME = "samples.parquet"
SHARD_PATTERN = re.compile(r"(train|valid|test)-(\d{5,})-of-(\d{5,})\.tfrecord")
MAX_MANIFEST_BYTES = 64 * 2**20
GROUPS_BY_FILE = "by file"  # a `Manifest.group_rule`: every picture is a group of its own
GROUPS_UNKNOWN = "not recorded"
ID_FEATURE = "image/id"
IMAGE_FEATURE = "image/encoded"
MASK_FEATURE = "image/segmentation/class/encoded"
RECORD_OVERHEAD = 16  # bytes that the framing adds to a payload: length, its CRC, the payload's CRC

_CROP_COLUMNS = ("crop_top", "crop_left", "crop_height", "crop_width")
# Added after version 0.1.0; null where nothing was cropped, flipped or cut into tiles.
_LATER_COLUMNS = (*_CROP_COLUMNS, "is_flipped", "picture")

_HEADER = struct.Struct("<QI")  # payload length, masked CRC32C of the length
_FOOTER = struct.Struct("<I")  # masked CRC32C of the payload


@dataclasses.dataclass(frozen=True)
class Sample:
    """One picture and its mask as they are stored.

    Attributes:
        id: stem of the file name, unique in the dataset.
        image: (H, W, C) uint8 or uint16, C is 1 or 3.
        mask: (H, W) uint8, class ids.
        filename: name of the picture's file, without folders.
        spacing_mm: size of a pixel of the source (y, x), where it is known.
        pixel_sha256: `sha256_of_pixels(image)`.
        off_map_pixels: mask pixels whose colour was not exactly one of a class.
        picture: of a tile, the id of the picture that it was cut from.
    """

    id: str
    group: str
    image: np.ndarray
    mask: np.ndarray
    filename: str
    geometry: "Geometry"
    spacing_mm: tuple[float, float] | None
    pixel_sha256: str
    off_map_pixels: int
    picture: str | None = None


class ShardInfo(Settings):
    """One shard file as it was written."""

    name: str
    split: Split
    num_records: int = Field(gt=0)
    num_bytes: int = Field(gt=0)
    crc32c: int = Field(ge=0, lt=2**32)


class SplitInfo(Settings):
    """Size of one split."""

    num_samples: int = Field(ge=0)
    num_groups: int = Field(ge=0)


class ReducedInfo(Settings):
    """Masks of one split that were made smaller, and what became of their regions.

    Attributes:
        num_emptied: pictures with foreground in the source and none in what is stored.
        num_regions: of the sources, by class id; 0 of class 0.
        num_vanished: those of them without a stored pixel, likewise.
    """

    num_pictures: int = Field(ge=0)
    num_emptied: int = Field(ge=0)
    num_regions: tuple[int, ...]
    num_vanished: tuple[int, ...]


class FullScaleInfo(Settings):
    """Full scale of the 16-bit pictures that do not say it themselves.

    Attributes:
        rule: "given" by --full-scale, or "found": see `shards.common_target`.
        lowest_max: largest value of the picture where that is lowest; blank ones do not count.
        highest: value in all of them.
        num_clipped_pictures: with pixels above the full scale; they became the full scale.
        num_clipped_pixels: of the sources.
    """

    rule: Literal["given", "found"]
    lowest_max: int = Field(ge=0, le=65535)
    highest: int = Field(ge=0, le=65535)
    num_clipped_pictures: int = Field(ge=0)
    num_clipped_pixels: int = Field(ge=0)


class Manifest(Settings):
    """`dataset.json`: everything a reader must know before it reads a shard.

    Attributes:
        split_rule: "ready-made" or "drawn"; earlier versions wrote the group rule here as well.
        group_rule: what the groups are, see `group_rule_of`.
        value_max: the raw value that means full intensity: 255, or 2**bits - 1 of the bits in use.
        ignore_id: class id of mask pixels that count nowhere.
        mean: per channel, of the raw values of the train split; `std` likewise.
        options: the options that decide what is written; the dataset's identity with its source.
        reduced: of splits with masks that were made smaller; empty in datasets of version 0.1.0.
        full_scale: None where no picture is of 16 bits without its own full scale, and in datasets
            of earlier versions; it is left out of the JSON then.
        source_sha256: digest of names, sizes and checksums of the source files.
    """

    format_version: Literal[1] = 1
    name: str
    image_height: int = Field(gt=0)
    image_width: int = Field(gt=0)
    channels: Literal[1, 3]
    bit_depth: Literal[8, 16]
    value_max: int = Field(ge=255, le=65535)
    classes: tuple[ClassColor, ...] = Field(min_length=1)
    ignore_id: int | None = None
    geometry: Literal["stretch", "pad", "tile"]
    crop: Crop = "none"
    flip: Flip = "none"
    split_rule: str
    group_rule: str
    seed: int
    num_folds: int | None = None
    leaky: bool = False
    splits: dict[Split, SplitInfo]
    shards: tuple[ShardInfo, ...] = Field(min_length=1)
    samples_num_bytes: int = Field(gt=0)
    samples_crc32c: int = Field(ge=0, lt=2**32)
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tool_version: str
    options: dict[str, Any] = Field(default_factory=dict)
    reduced: dict[Split, ReducedInfo] = Field(default_factory=dict)
    source_sha256: str = ""
    full_scale: FullScaleInfo | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_group_rule(cls, values: Any) -> Any:
        """Adds what manifests of earlier versions lack: their options say it."""
        if isinstance(values, dict) and "group_rule" not in values:
            return values | {"group_rule": _earlier_group_rule(values)}
        return values

    @model_validator(mode="after")
    def _check(self) -> "Manifest":
        if [info.id for info in self.classes] != list(range(len(self.classes))):
            raise ValueError("the ids of classes must be 0, 1, 2, ... in order")
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean and std must have {self.channels} value(s)")
        _check_shards(self.shards, self.splits)
        return self

    @property
    def num_samples(self) -> int:
        """Number of samples in all splits."""
        return sum(split.num_samples for split in self.splits.values())

    def to_json(self) -> bytes:
        """Returns the bytes of `dataset.json`; equal manifests give equal bytes."""
        values = self.model_dump(mode="json")
        if self.full_scale is None:
            del values["full_scale"]
        text = json.dumps(values, indent=1, ensure_ascii=False)
        return text.encode() + b"\n"


def group_rule_of(options: Mapping[str, Any]) -> str:
    """Returns how the options of `prep` find the group of a picture, in words."""
    if options["format"] == "inbreast":
        return "by patient of the release"
    if options["group_preset"]:
        return f"by preset {options['group_preset']}"
    if options["group_regex"]:
        return f"by regular expression {options['group_regex']}"
    return "by table" if options["group_csv"] else GROUPS_BY_FILE


def _earlier_group_rule(values: Mapping[str, Any]) -> str:
    options, split_rule = values.get("options"), str(values.get("split_rule"))
    if split_rule == GROUPS_BY_FILE:
        return GROUPS_BY_FILE
    if split_rule.startswith("by group, "):
        return "by " + split_rule.removeprefix("by group, ")
    try:
        return group_rule_of({"format": "pairs", **(options or {})})
    except (KeyError, TypeError):
        return GROUPS_UNKNOWN  # not made by our `prep`


def shard_name(split: str, index: int, count: int) -> str:
    """Returns `train-00000-of-00008.tfrecord`."""
    return f"{split}-{index:05d}-of-{count:05d}.tfrecord"


def sha256_of_pixels(pixels: np.ndarray) -> str:
    """Returns the sha256 (hex) of the raw values, row by row, little-endian, without a header."""
    ordered = np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("<"))
    return hashlib.sha256(ordered.data).hexdigest()


# Records


def encode_example(sample: Sample) -> bytes:
    """Returns the `tf.train.Example` of `sample`; equal samples give equal bytes.

    Features: image/{encoded,format,height,width,channels,filename,id,group} and
    image/segmentation/class/{encoded,format}; both pictures are lossless PNG. A tile has
    image/tile/{picture,top,left} too: the picture's id, and its place there in pixels.
    """
    from data_prep.imaging.codecs import encode_png

    height, width, channels = sample.image.shape
    place: dict[str, bytes | int] = {}
    if sample.picture is not None:
        box = sample.geometry.part
        place["image/tile/picture"] = sample.picture.encode()
        place |= {"image/tile/top": box.top, "image/tile/left": box.left}
    return encode_features(
        {
            **place,
            "image/channels": channels,
            IMAGE_FEATURE: encode_png(sample.image),
            "image/filename": sample.filename.encode(),
            "image/format": b"png",
            "image/group": sample.group.encode(),
            "image/height": height,
            ID_FEATURE: sample.id.encode(),
            MASK_FEATURE: encode_png(sample.mask, is_mask=True),
            "image/segmentation/class/format": b"png",
            "image/width": width,
        }
    )


def encode_features(features: Mapping[str, bytes | int]) -> bytes:
    """Returns a `tf.train.Example` with one value per key, keys sorted.

    Protobuf promises no order for maps, so that its bytes may differ between processes.
    Source of the layout: tensorflow/core/example/{example,feature}.proto.
    """
    entries = []
    for key in sorted(features):
        value = features[key]
        if isinstance(value, int):
            packed = _field(1, _varint(value % 2**64))  # Int64List, packed
            feature = _field(3, packed)
        else:
            feature = _field(1, _field(1, value))  # BytesList
        entries.append(_field(1, _field(1, key.encode()) + _field(2, feature)))
    return _field(1, b"".join(entries))


def decode_example(payload: bytes) -> dict[str, bytes | int]:
    """Returns the features of an Example that holds one bytes or int64 value per key.

    Raises:
        ContentError: not such an Example.
    """
    try:
        features: dict[str, bytes | int] = {}
        for entry in _values(_only(memoryview(payload), 1), 1):
            features[bytes(_only(entry, 1)).decode()] = _feature(_only(entry, 2))
        return features
    except (ValueError, IndexError) as error:
        raise ContentError(f"not a tf.train.Example of this format: {error}") from error


def frame_record(payload: bytes) -> bytes:
    """Returns `payload` as one TFRecord: length, its CRC, payload, its CRC (both masked)."""
    length = struct.pack("<Q", len(payload))
    footer = _FOOTER.pack(_masked_crc(payload))
    return b"".join((length, _FOOTER.pack(_masked_crc(length)), payload, footer))


def unframe_record(record: bytes, *, where: str) -> bytes:
    """Returns the payload of one whole TFRecord.

    Args:
        where: what the record is, named in the error.

    Raises:
        ContentError: too short, too long, or a CRC does not fit.
    """
    if len(record) < RECORD_OVERHEAD:
        raise ContentError(f"{where}: record of {len(record)} bytes is cut off; prepare it again")
    length, length_crc = _HEADER.unpack_from(record)
    if _masked_crc(record[:8]) != length_crc or length != len(record) - RECORD_OVERHEAD:
        raise ContentError(f"{where}: damaged record header; prepare the dataset again")
    payload = record[_HEADER.size : -_FOOTER.size]
    if _masked_crc(payload) != _FOOTER.unpack(record[-_FOOTER.size :])[0]:
        raise ContentError(f"{where}: record checksum differs; prepare the dataset again")
    return payload


# Sample table


def sample_schema() -> "pyarrow.Schema":
    """Returns the schema of `samples.parquet`; pyarrow is imported here because it takes 0.5 s.

    `offset` is the position of the record header in the shard and `length` the whole record, both
    in bytes. `top`, `left`, `height` and `width` say where the picture lies in the stored image, in
    pixels; `crop_top` ... which part of the picture that is, in its own pixels, null for all of it,
    and `is_flipped` whether it is mirrored, left to right. `picture` is the id of the picture that
    a tile was cut from: all its tiles have its group, split and `off_map_pixels`; null where
    samples are whole pictures. `sha256` is `sha256_of_pixels` of the stored image. `fold` is null
    outside folds.
    """
    import pyarrow as pa

    int64, text = pa.int64(), pa.string()
    columns = [
        *((name, text) for name in ("split", "shard")),
        *((name, int64) for name in ("offset", "length")),
        *((name, text) for name in ("id", "group", "filename")),
        *((name, int64) for name in ("source_height", "source_width")),
        *((name, pa.float64()) for name in ("spacing_y_mm", "spacing_x_mm")),
        ("geometry_kind", text),
        *((name, int64) for name in ("top", "left", "height", "width")),
        ("pixels_per_class", pa.list_(int64)),
        ("off_map_pixels", int64),
        ("sha256", text),
        ("fold", int64),
        *((name, int64) for name in _CROP_COLUMNS),
        ("is_flipped", pa.bool_()),
        ("picture", text),
    ]
    nullable = {"spacing_y_mm", "spacing_x_mm", "fold", *_LATER_COLUMNS}
    return pa.schema([pa.field(name, kind, name in nullable) for name, kind in columns])


def samples_to_parquet(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Returns the bytes of `samples.parquet`; equal rows give equal bytes."""
    import pyarrow.parquet

    table = _table_of(rows).combine_chunks()
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _table_of(rows: Iterable[Mapping[str, Any]]) -> "pyarrow.Table":
    # By way of JSON, because pyarrow imports pandas (2 s) to look at a Python list.
    import pyarrow.json

    schema = sample_schema()
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    if not lines:
        return schema.empty_table()
    options = pyarrow.json.ParseOptions(
        explicit_schema=schema, unexpected_field_behavior="error", newlines_in_values=False
    )
    return pyarrow.json.read_json(io.BytesIO(lines), parse_options=options).cast(schema)


# Reading


def read_manifest(store: "Store") -> tuple[Manifest, str]:
    """Returns the manifest of the dataset in `store`, and the sha256 (hex) that names the dataset.

    Raises:
        UsageError: there is no dataset.
        ContentError: `dataset.json` is not a manifest of this format.
    """
    where = f"{store.url}/{MANIFEST_NAME}"
    stat = store.stat(MANIFEST_NAME)
    if stat is None:
        raise UsageError(
            f"no dataset at {store.url}: {MANIFEST_NAME} is missing; give --data, the folder that "
            "flexunet prep has written"
        )
    if stat.size > MAX_MANIFEST_BYTES:
        raise ContentError(f"{where}: {stat.size} bytes, more than {MAX_MANIFEST_BYTES} allowed")
    data = store.get(MANIFEST_NAME)
    return parse_manifest(data, where), hashlib.sha256(data).hexdigest()


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Returns the manifest that `data` holds.

    Raises:
        ContentError: it is not valid, or of another format version; `where` is named.
    """
    try:
        values = json.loads(data)
    except ValueError as error:
        raise ContentError(
            f"{where}: not valid JSON ({error}); prepare the dataset again"
        ) from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise ContentError(
            f"{where}: format_version {version!r}, this program reads {FORMAT_VERSION}; "
            "prepare the dataset with this version"
        )
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise ContentError(f"{where}: {path}: {first['msg']}; prepare the dataset again") from error


def read_samples(store: "Store", manifest: Manifest) -> "pyarrow.Table":
    """Returns the sample table, checked against `manifest`.

    Raises:
        ContentError: size, checksum, columns, number of rows or a record's place do not fit.
    """
    import pyarrow as pa
    import pyarrow.parquet

    where = f"{store.url}/{SAMPLES_NAME}"
    stat = store.stat(SAMPLES_NAME)
    size = None if stat is None else stat.size
    if size != manifest.samples_num_bytes:
        expected = f"{manifest.samples_num_bytes} as {MANIFEST_NAME} says"
        raise ContentError(f"{where}: {size} bytes, not {expected}; prepare the dataset again")
    data = store.get(SAMPLES_NAME)
    if google_crc32c.value(data) != manifest.samples_crc32c:
        raise ContentError(f"{where}: checksum differs from {MANIFEST_NAME}; prepare it again")
    try:
        # read_table would import pandas, which takes 2 s.
        table = pyarrow.parquet.ParquetFile(io.BytesIO(data)).read()
    except pa.ArrowException as error:
        raise ContentError(f"{where}: not a parquet table ({error})") from error
    for field in sample_schema():
        if field.name not in table.column_names and field.name in _LATER_COLUMNS:
            table = table.append_column(field, pa.nulls(len(table), field.type))
    if not table.schema.equals(sample_schema()):
        raise ContentError(f"{where}: columns differ from this format; prepare the dataset again")
    _check_places(table, manifest, where)
    return table


def _check_places(table: "pyarrow.Table", manifest: Manifest, where: str) -> None:
    records = dict.fromkeys((shard.name for shard in manifest.shards), 0)
    sizes = {shard.name: (shard.num_bytes, shard.split) for shard in manifest.shards}
    columns = (table[name].to_pylist() for name in ("id", "shard", "split", "offset", "length"))
    for sample_id, shard, split, offset, length in zip(*columns, strict=True):
        size, shard_split = sizes.get(shard, (0, ""))
        inside = offset >= 0 and length >= RECORD_OVERHEAD and offset + length <= size
        if not inside or split != shard_split:
            raise ContentError(f"{where}: sample {sample_id!r} lies outside its shard {shard!r}")
        records[shard] += 1
    if records != {shard.name: shard.num_records for shard in manifest.shards}:
        raise ContentError(f"{where}: {table.num_rows} rows do not fit the shards' records")


def _check_shards(shards: Iterable[ShardInfo], splits: Mapping[Any, SplitInfo]) -> None:
    records = dict.fromkeys(splits, 0)
    names = set()
    for shard in shards:
        match = SHARD_PATTERN.fullmatch(shard.name)
        if not match or match[1] != shard.split or shard.name in names:
            raise ValueError(f"shard name {shard.name!r} is not allowed here")
        names.add(shard.name)
        records[shard.split] = records.get(shard.split, 0) + shard.num_records
    if records != {name: split.num_samples for name, split in splits.items()}:
        raise ValueError("the records of the shards do not add up to the samples of the splits")


# Wire format of protobuf: fields of varints (type 0) and of length-delimited bytes (type 2).


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, data: bytes) -> bytes:
    return b"".join((bytes((number << 3 | 2,)), _varint(len(data)), data))


def _read_varint(data: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError("a number is longer than 64 bits")


def _values(message: memoryview, number: int) -> Iterator[memoryview]:
    """Yields every length-delimited field `number` of `message`; no other field is allowed."""
    for found, value in _fields(message):
        if found != number:
            raise ValueError(f"field {found}, expected {number}")
        yield value


def _only(message: memoryview, number: int) -> memoryview:
    found = [value for key, value in _fields(message) if key == number]
    if len(found) != 1:
        raise ValueError(f"field {number} occurs {len(found)} times, expected once")
    return found[0]


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    position = 0
    while position < len(message):
        tag, position = _read_varint(message, position)
        if tag & 7 != 2:
            raise ValueError(f"wire type {tag & 7} of field {tag >> 3}")
        length, position = _read_varint(message, position)
        if position + length > len(message):
            raise ValueError("a field is cut off")
        yield tag >> 3, message[position : position + length]
        position += length


def _feature(feature: memoryview) -> bytes | int:
    ((kind, values),) = _fields(feature)
    if kind == 1:
        return bytes(_only(values, 1))
    if kind != 3:
        raise ValueError(f"value of kind {kind}, expected bytes or int64")
    packed = _only(values, 1)
    value, end = _read_varint(packed, 0)
    if end != len(packed):
        raise ValueError("more than one number in a feature")
    return value - 2**64 if value >= 2**63 else value


def _masked_crc(data: bytes) -> int:
    # Source: tensorflow/core/lib/hash/crc32c.h, Mask().
    crc = int(google_crc32c.value(data))
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
