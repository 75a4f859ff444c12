"""The manifest of a dataset, `dataset.json`: what a reader must know before it reads a shard.

It is written last, so that it is the commit. The module must not know how samples are found, split
or spread over shards.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError, model_validator

from data_prep.imaging.breast import Crop, Flip
from data_prep.imaging.color_map import ClassColor
from data_prep.splits.names import Split
from flexunet.errors import ContentError, UsageError
from flexunet.settings import Settings

if TYPE_CHECKING:
    from flexunet.storage import ObjectStore

FORMAT_VERSION = 1
MANIFEST_NAME = "dataset.json"
SHARD_PATTERN = re.compile(r"(train|valid|test)-(\d{5,})-of-(\d{5,})\.tfrecord")
MAX_MANIFEST_BYTES = 64 * 2**20
GROUPS_BY_FILE = "by file"  # a `Manifest.group_rule`: every picture is a group of its own
GROUPS_UNKNOWN = "not recorded"


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
        rule: "given" by --full-scale, or "found": see `full_scale.common_pixel_format`.
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


# Reading


def read_manifest(store: "ObjectStore") -> tuple[Manifest, str]:
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
