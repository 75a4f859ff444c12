"""Defines the manifest of a dataset, `dataset.json`, which readers need before any shard.

The manifest is written last, which commits the dataset. The module does not depend on how samples
are found, split or distributed over shards.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from data_prep.imaging.breast import Crop, Flip
from data_prep.imaging.pixels import MAX_CHANNELS
from data_prep.masks.color_map import NO_BACKGROUND, ClassColor, Palette
from data_prep.splits.names import Split
from flexunet.errors import ContentError, UsageError
from flexunet.settings import Settings

if TYPE_CHECKING:
    from flexunet.storage import ObjectStore

FORMAT_VERSION = 1
MANIFEST_NAME = "dataset.json"
SHARD_PATTERN = re.compile(r"(train|valid|test)-(\d{5,})-of-(\d{5,})\.tfrecord")
MAX_MANIFEST_BYTES = 64 * 2**20
GROUPS_BY_FILE = "by file"  # a `Manifest.group_rule`: every image is its own group
GROUPS_UNKNOWN = "not recorded"


class ShardInfo(Settings):
    """The entry of one shard file."""

    name: str
    split: Split
    num_records: int = Field(gt=0)
    num_bytes: int = Field(gt=0)
    crc32c: int = Field(ge=0, lt=2**32)


class SplitInfo(Settings):
    """The size of one split."""

    num_samples: int = Field(ge=0)
    num_groups: int = Field(ge=0)


class ReducedInfo(Settings):
    """The downscaled masks of one split, and their lost regions.

    Attributes:
        num_emptied: images with foreground in the source mask and none in the stored mask.
        num_regions: regions of the source masks by class id; 0 for class 0.
        num_vanished: lost regions, without a stored pixel, by class id.
    """

    num_pictures: int = Field(ge=0)
    num_emptied: int = Field(ge=0)
    num_regions: tuple[int, ...]
    num_vanished: tuple[int, ...]


class FullScaleInfo(Settings):
    """The full scale of the 16-bit images that do not state it.

    Attributes:
        rule: "given" by --full-scale, or "found": see `pixel_format.common_pixel_format`.
        lowest_max: smallest maximum of an image, without blank images.
        highest: largest value of all these images.
        num_clipped_pictures: images with pixels above the full scale, which were clipped to it.
        num_clipped_pixels: clipped pixels of the source images.
    """

    rule: Literal["given", "found"]
    lowest_max: int = Field(ge=0, le=65535)
    highest: int = Field(ge=0, le=65535)
    num_clipped_pictures: int = Field(ge=0)
    num_clipped_pixels: int = Field(ge=0)


class MaskChoice(Settings):
    """How masks are read, as `prep` found from a sample of them.

    Attributes:
        decided: options of `prep` that the user did not give; `Manifest.options` has their values.
        evidence: short sentences about the masks.
        num_files: masks in the sample.
        palette: indices of palettes, and the colours that all masks must have there; empty if
            palettes do not matter. Then it is not in the JSON.
    """

    decided: tuple[str, ...]
    evidence: tuple[str, ...]
    num_files: int = Field(ge=0)
    palette: Palette = ()

    @model_serializer(mode="wrap")
    def _without_empty_palette(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = serialize(self)
        return values if self.palette else {k: v for k, v in values.items() if k != "palette"}


class Manifest(Settings):
    """The content of `dataset.json`, which a reader needs before it reads a shard.

    Attributes:
        split_rule: "ready-made" or "drawn"; earlier versions wrote the group rule here as well.
        group_rule: how groups were found, see `group_rule_of`.
        value_max: the raw value of full intensity: 255, or 2**bits - 1 with the bits in use.
        ignore_id: class id of mask pixels that are ignored everywhere.
        mean, std: per channel, of the raw values of the train split.
        options: the options that determine the content; with the source, the dataset's identity.
        reduced: splits with downscaled masks; empty in datasets of version 0.1.0.
        full_scale: None if all 16-bit images state their full scale, and in datasets of earlier
            versions; then it is not in the JSON.
        reading_rules: version of the rules that read the mask files; None in datasets of earlier
            versions, which used version 1, and if there are no mask files. Then it is not in the
            JSON.
        mask_choice: None if the user gave all options about masks, if there are no mask files, and
            in datasets of earlier versions; then it is not in the JSON.
        source_sha256: digest of names, sizes and checksums of the source files.
    """

    format_version: Literal[1] = 1
    name: str
    image_height: int = Field(gt=0)
    image_width: int = Field(gt=0)
    channels: int = Field(ge=1, le=MAX_CHANNELS)
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
    reading_rules: int | None = Field(default=None, ge=1)
    mask_choice: MaskChoice | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_group_rule(cls, values: Any) -> Any:
        """Adds the group rule to manifests of earlier versions, from their options."""
        if isinstance(values, dict) and "group_rule" not in values:
            return values | {"group_rule": _earlier_group_rule(values)}
        return values

    @model_validator(mode="after")
    def _check(self) -> "Manifest":
        if [info.id for info in self.classes] != list(range(len(self.classes))):
            raise ValueError("the class ids must be 0, 1, 2, ... in order")
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean and std must have {self.channels} value(s)")
        _check_shards(self.shards, self.splits)
        return self

    @property
    def has_background(self) -> bool:
        """Whether class 0 occurs in the source masks; without, only padding has it."""
        return self.options.get("background") != NO_BACKGROUND

    @property
    def num_samples(self) -> int:
        """The number of samples in all splits."""
        return sum(split.num_samples for split in self.splits.values())

    def to_json(self) -> bytes:
        """Returns the bytes of `dataset.json`; equal manifests give equal bytes."""
        values = self.model_dump(mode="json")
        for name in ("full_scale", "reading_rules", "mask_choice"):
            if values[name] is None:
                del values[name]
        text = json.dumps(values, indent=1, ensure_ascii=False)
        return text.encode() + b"\n"


def group_rule_of(options: Mapping[str, Any]) -> str:
    """Returns the rule that finds an image's group with these options of `prep`, in words."""
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
        return GROUPS_UNKNOWN  # not made by this `prep`


def shard_name(split: str, index: int, count: int) -> str:
    """Returns the name of a shard, such as `train-00000-of-00008.tfrecord`."""
    return f"{split}-{index:05d}-of-{count:05d}.tfrecord"


# Reading


def read_manifest(store: "ObjectStore") -> tuple[Manifest, str]:
    """Returns the manifest of the dataset in `store`, and its sha256 (hex), the dataset's identity.

    Raises:
        UsageError: there is no dataset in `store`.
        ContentError: `dataset.json` is not a manifest of this format.
    """
    where = f"{store.url}/{MANIFEST_NAME}"
    stat = store.stat(MANIFEST_NAME)
    if stat is None:
        raise UsageError(
            f"no dataset at {store.url}: {MANIFEST_NAME} is missing; give --data the folder that "
            "flexunet prep wrote"
        )
    if stat.size > MAX_MANIFEST_BYTES:
        raise ContentError(f"{where}: {stat.size} bytes, more than {MAX_MANIFEST_BYTES} allowed")
    data = store.get(MANIFEST_NAME)
    return parse_manifest(data, where), hashlib.sha256(data).hexdigest()


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Parses the manifest in `data`.

    Raises:
        ContentError: the manifest is invalid or of another format version; the error names `where`.
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
            f"{where}: format_version is {version!r}, but this program reads {FORMAT_VERSION}; "
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
