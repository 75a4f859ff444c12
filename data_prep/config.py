"""Defines the options of `prep`, their checks, and which of them identify a dataset."""

import re
from typing import Any, Literal

from pydantic import field_validator, model_validator

from data_prep.imaging.breast import Crop, Flip
from data_prep.imaging.codecs import DEFAULT_MAX_PIXELS
from data_prep.imaging.dicom.reader import Reader
from data_prep.masks.color_map import (
    EARLIER_CLASSES,
    FIRST_CLASS,
    NO_BACKGROUND,
    ClassColor,
    Color,
    DatasetClasses,
    check_ignore_id,
    check_ignored,
    check_ignored_levels,
    check_levels,
    free_ignore_id,
    parse_color_map,
    parse_ignored,
    with_background,
)
from data_prep.masks.decision.findings import MaskEncoding
from data_prep.masks.rules import Encoding
from data_prep.sources import inbreast
from data_prep.splits.split import check_fractions
from flexunet.settings import Settings, option

# Options that earlier versions did not have; with its default, each is no part of the identity.
_LATER_OPTIONS = (
    *("full_scale", "ignore", "mask_encoding", "images", "masks", "field_of_view", "image_name"),
    *("mask_name", "missing_mask", "draw_valid", "background"),
)
MAX_LISTED = 5  # names listed in a message
HASH_KEY_VARIABLE = "FLEXUNET_HASH_KEY"


class PrepConfig(Settings):
    """The options of `prep`. All but those marked `not_identity` identify a dataset."""

    format: Literal["pairs", "inbreast"] = option(
        "pairs",
        "pairs: images and masks; inbreast: the original INbreast release with AllDICOMs/ and "
        "AllXML/. For inbreast, the patient in the file name is the group, and an image without "
        "an XML file has no finding.",
    )
    images: str | None = option(
        None,
        "Folder of the images below SOURCE, or pattern of folders or files: train/*/images. none: "
        "folders are found by their names.",
    )
    masks: str | None = option(
        None,
        "Folder of the masks below SOURCE, or pattern of folders or files; each * matches the "
        "same text as in --images. none: folders are found by their names.",
    )
    field_of_view: str | None = option(
        None,
        "Masks of the field of view, white inside and black outside: a folder below SOURCE, or a "
        "pattern of folders or files. Pixels outside are ignored.",
    )
    image_name: str | None = option(
        None,
        "Name of an image without its ending, if only a part of it is also in the name of the "
        "mask: {stem}_training.",
    )
    mask_name: str | None = option(
        None,
        "Name of the mask of an image without its ending: {stem}_mask. {stem}_* joins several "
        "masks of one image. none: equal names, or else the one rule that pairs all names.",
    )
    missing_mask: Literal["error", "empty"] = option(
        "error",
        "error: an image without a mask is a bad file; empty: it has no finding.",
    )
    rois: tuple[inbreast.Kind, ...] = option(
        ("mass",),
        f"INbreast annotations to use as foreground: {', '.join(inbreast.KINDS)}. Without "
        "--classes they also name the class, such as mass+spiculated.",
        min_length=1,
    )
    image_size: int = option(
        512,
        "Height and width of the stored images, pixels. The default network (8 levels) needs a "
        "multiple of 128; 7 levels: 64, 6 levels: 32, and so on.",
        ge=8,
        le=16384,
    )
    image_height: int | None = option(
        None, "Height of the stored images instead of --image-size, pixels.", ge=8, le=16384
    )
    image_width: int | None = option(
        None, "Width of the stored images instead of --image-size, pixels.", ge=8, le=16384
    )
    geometry: Literal["stretch", "pad"] = option(
        "stretch", "stretch: fill the stored image; pad: keep the aspect ratio, pad with 0."
    )
    tile: int | None = option(
        None,
        "Cut images at their original size into square tiles with this side length, pixels. "
        "none: resize each image to --image-size.",
        ge=8,
        le=16384,
    )
    tile_overlap: int = option(
        0, "Minimum overlap of neighbouring tiles, pixels; with --tile.", ge=0
    )
    crop: Crop = option(
        "none",
        "breast: remove the film around the breast; predicted masks get the full frame again.",
    )
    flip: Flip = option(
        "none",
        "Side of the chest wall; other images are mirrored, and predicted masks mirrored back.",
    )
    channels: Literal["auto", "grey", "rgb"] = option(
        "auto", "Channels of the stored images; auto: grey if every image is grey."
    )
    full_scale: int | None = option(
        None,
        "Raw value of full intensity for 16-bit images whose files do not state it (DICOM files "
        "do). Larger values are clipped to it. Unset: found from the images, for example 4095 for "
        "12 bits; a few brighter pixels are ignored.",
        ge=255,
        le=65535,
    )
    classes: str | None = option(
        None,
        "Mask colours in the order of the class ids: name=R,G,B;... or name=#rrggbb;... none: "
        "found from the masks.",
    )
    background: str = option(
        FIRST_CLASS,
        "Name or colour of the class that is the background and gets id 0; first: the first class; "
        "none: no class, so that every class is reported.",
    )
    mask_encoding: MaskEncoding = option(
        "auto",
        "What carries the classes in mask files. index: ids, also as indices of a palette; colour: "
        "colours and grey levels; alpha: the alpha channel, opaque is the second class; nonzero: "
        "all but 0 is the second class; auto: found from all masks; mixed: for each mask, ids if "
        "all its values are ids, else colours.",
    )
    ignore: str | None = option(
        None,
        "Grey levels, ids or colours of mask pixels to ignore in training and evaluation: 255 or "
        "224,224,192 or #e0e0c0; several with a semicolon: 255;224,224,192. Levels of 16-bit masks "
        "may be up to 65535. none: found from the masks.",
    )
    ignore_id: int | None = option(
        None,
        "Id of ignored pixels, in index masks and in the dataset; larger than the class ids. It is "
        "no grey level of other masks: see --ignore. Unset: a free id, if pixels are ignored.",
        ge=1,
        le=255,
    )
    off_map_limit: float = option(
        0.01,
        "Has no effect: masks with noise and blends are read, and an area of an unknown colour is "
        "an error whatever its size. Accepted for older commands.",
        ge=0,
        le=1,
    )
    skip_bad: bool = option(
        False, "Skip bad files and list them in report/rejects.csv instead of stopping."
    )
    group_preset: Literal["augmented"] | None = option(
        None,
        "How to read the group from the file name. augmented: the source number at the end "
        "(barrdistorted_1001_0.3_0.3_23 has group 23). Without a --group option every file is "
        "its own group.",
    )
    group_regex: str | None = option(
        None,
        "Regular expression to search in the file name; its first capture group, or the whole "
        "match, is the group.",
    )
    group_csv: str | None = option(None, "CSV file with the columns file and group.", path=True)
    fractions: tuple[float, float, float] = option(
        (0.80, 0.15, 0.05), "Shares of samples for train, valid and test; groups stay whole."
    )
    draw_valid: float | None = option(
        None,
        "Share of train to draw as validation split if SOURCE has train/ and no valid/; groups "
        "stay whole. none: such a dataset has no validation split, and training needs --folds.",
        gt=0,
        lt=1,
    )
    seed: int = option(1, "Random seed for splits, folds and the order in the shards.", ge=0)
    num_folds: int | None = option(
        None,
        "Number of cross-validation folds over train and valid; column fold of the sample table.",
        ge=2, le=100,
    )  # fmt: skip
    allow_leaks: bool = option(
        False,
        "Accept ready-made splits that share a group or an image; marks the dataset leaky: true.",
    )
    hash_names: bool = option(
        False,
        "Replace names and groups by 16 hex digits of their HMAC-SHA256. Set the key in "
        f"{HASH_KEY_VARIABLE}; without a key, guessable names can be recovered.",
    )
    shard_size: float = option(64.0, "Target size of a shard, MB.", gt=0, le=1024)
    max_pixels: int = option(
        DEFAULT_MAX_PIXELS,
        "Largest allowed image, pixels; larger ones are refused.",
        ge=1,
        le=2**31,
    )
    dicom_reader: Reader = option(
        "pydicom",
        "Decoder of uncompressed DICOM files; both give the same pixels. tfio: tensorflow-io, "
        "from the extra tfio.",
        not_identity=True,
    )
    num_processes: int | None = option(
        None,
        "Processes that read and encode; 1: only this one; none: one per CPU.",
        not_identity=True,
        ge=1,
    )

    @model_validator(mode="before")
    @classmethod
    def _class_is_named_after_rois(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("classes") is not None:
            return values
        rois = values.get("rois", cls.model_fields["rois"].default)
        # Unknown kinds are rejected later.
        is_known = isinstance(rois, list | tuple) and all(roi in inbreast.KINDS for roi in rois)
        if values.get("format") != "inbreast" or not rois or not is_known:
            return values
        name = "+".join(dict.fromkeys(rois))
        return values | {"classes": f"background=0,0,0;{name}=255,255,255"}

    @field_validator("ignore")
    @classmethod
    def _something_is_ignored(cls, text: str | None) -> str | None:
        if text is not None and not parse_ignored(text.split(";")):
            raise ValueError("give a grey level or a colour, or leave it out")
        return text

    @field_validator("classes", mode="before")
    @classmethod
    def _classes_are_text(cls, value: Any) -> Any:
        if value is not None and not isinstance(value, str):
            raise ValueError(f'must be a string such as "{EARLIER_CLASSES}"')
        return value

    @field_validator("fractions", mode="before")
    @classmethod
    def _fractions_are_three(cls, values: Any) -> Any:
        if isinstance(values, list | tuple) and len(values) != 3:
            raise ValueError("give three shares: of train, valid and test")
        return values

    @field_validator("fractions")
    @classmethod
    def _fractions_add_up(cls, values: tuple[float, float, float]) -> tuple[float, float, float]:
        check_fractions(values)
        return values

    @field_validator("group_regex")
    @classmethod
    def _regex_compiles(cls, text: str | None) -> str | None:
        try:
            re.compile(text or "")
        except re.error as error:
            raise ValueError(f"not a regular expression ({error})") from error
        return text

    @model_validator(mode="after")
    def _classes_fit(self) -> "PrepConfig":
        if self.classes is None:
            return self
        in_files, classes = parse_color_map(self.classes), self.color_map
        if self.mask_encoding in ("auto", "mixed"):
            check_levels(in_files)
        if self.mask_encoding in ("auto", "mixed", "index"):
            check_ignored_levels(in_files, parse_ignored((self.ignore or "").split(";")))
        check_ignore_id(classes, self.ignore_id)
        if self.mask_encoding not in ("index", "nonzero"):  # their values are no colours
            check_ignored(classes, self.ignored_colors)
        if self.mask_encoding in ("alpha", "nonzero") and len(in_files) != 2:
            raise ValueError(f"--mask-encoding {self.mask_encoding}: give two --classes")
        if self.mask_encoding == "alpha" and self.ignore is not None:
            raise ValueError("--mask-encoding alpha has no ignored pixels; leave out --ignore")
        return self

    @model_validator(mode="after")
    def _format_fits(self) -> "PrepConfig":
        if self.missing_mask == "empty" and self.background == NO_BACKGROUND:
            raise ValueError("--missing-mask empty needs a background; leave --background none out")
        if self.format == "pairs":
            if self.rois != _default("rois"):
                raise ValueError("--rois needs --format inbreast")
        elif layout := self._layout_options():
            raise ValueError(f"{layout[0]} needs --format pairs")
        elif len(self.color_map) != 2:
            raise ValueError(
                "--format inbreast has a background and one foreground class; give two --classes"
            )
        elif (self.group_preset, self.group_regex, self.group_csv) != (None, None, None):
            raise ValueError("--format inbreast groups by patient; leave out the --group options")
        return self

    def _layout_options(self) -> list[str]:
        """Returns the options given about folders and names of pairs."""
        changed = (name for name in _LATER_OPTIONS if getattr(self, name) != _default(name))
        return [f"--{name.replace('_', '-')}" for name in changed if name != "full_scale"]

    @model_validator(mode="after")
    def _tiles_fit(self) -> "PrepConfig":
        if self.tile is None:
            if self.tile_overlap:
                raise ValueError("--tile-overlap needs --tile")
            return self
        if self.tile_overlap >= self.tile:
            raise ValueError(f"--tile-overlap must be less than --tile ({self.tile})")
        sizes = ("image_size", "image_height", "image_width", "geometry")
        for name in sizes:
            if getattr(self, name) != _default(name):
                raise ValueError(
                    f"--{name.replace('_', '-')} is for resized images, but --tile {self.tile} "
                    "keeps their original size; leave out one of the two"
                )
        return self

    @model_validator(mode="after")
    def _one_group_rule(self) -> "PrepConfig":
        rules = ("group_preset", "group_regex", "group_csv")
        found = [f"--{name.replace('_', '-')}" for name in rules if getattr(self, name) is not None]
        if len(found) > 1:
            raise ValueError(f"{' and '.join(found)} cannot be combined; give one")
        return self

    @property
    def dataset_classes(self) -> DatasetClasses:
        """The classes of the dataset; not before they are found from the masks."""
        return with_background(parse_color_map(self.classes or ""), self.background)

    @property
    def color_map(self) -> tuple[ClassColor, ...]:
        """The classes in the order of their ids; see `dataset_classes`."""
        return self.dataset_classes.classes

    @property
    def file_encoding(self) -> Encoding:
        """What carries the classes in each file; auto: decided for each file."""
        return "auto" if self.mask_encoding == "mixed" else self.mask_encoding

    @property
    def ignored_colors(self) -> tuple[Color, ...]:
        """Colours of ignored mask pixels. The ignore id of index masks is no colour."""
        return parse_ignored((self.ignore or "").split(";"))

    @property
    def ignore_value(self) -> int | None:
        """Id of ignored pixels in the dataset, None if no pixels are ignored."""
        if self.ignore_id is None and (self.ignored_colors or self.field_of_view is not None):
            return free_ignore_id(self.color_map)
        return self.ignore_id

    @property
    def height(self) -> int:
        """Height of the stored images, pixels."""
        return self.tile or self.image_height or self.image_size

    @property
    def width(self) -> int:
        """Width of the stored images, pixels."""
        return self.tile or self.image_width or self.image_size

    @property
    def kind(self) -> Literal["stretch", "pad", "tile"]:
        """Kind of geometry of the stored images."""
        return "tile" if self.tile else self.geometry


def _default(name: str) -> Any:
    return PrepConfig.model_fields[name].default


def identity_of(config: PrepConfig) -> dict[str, Any]:
    """Returns the options that determine the dataset's content, as JSON values."""
    values = config.model_dump(mode="json")
    for name, field in PrepConfig.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("not_identity"):
            del values[name]
    for name in _LATER_OPTIONS:
        if getattr(config, name) == _default(name):
            del values[name]
    return values
