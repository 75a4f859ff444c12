"""The options of `prep`, their checks, and which of them are the identity of a dataset."""

import re
from typing import Any, Literal

from pydantic import field_validator, model_validator

from data_prep.imaging.breast import Crop, Flip
from data_prep.imaging.codecs import DEFAULT_MAX_PIXELS
from data_prep.imaging.color_map import check_ignore_id, parse_color_map
from data_prep.imaging.dicom.reader import Reader
from data_prep.sources import inbreast
from flexunet.settings import Settings, option

MAX_LISTED = 5  # names that a message lists
HASH_KEY_VARIABLE = "FLEXUNET_HASH_KEY"


class PrepConfig(Settings):
    """The options of `prep`. All but the free ones are the identity of a dataset."""

    format: Literal["pairs", "inbreast"] = option(
        "pairs",
        "pairs: pictures and masks; inbreast: the original INbreast release, AllDICOMs/ and "
        "AllXML/, where the patient in the file name is the group and a picture without an XML "
        "file has no finding.",
    )
    rois: tuple[inbreast.Kind, ...] = option(
        ("mass",),
        f"Annotations of INbreast that are foreground: {', '.join(inbreast.KINDS)}. They name the "
        "class where --classes is not given: mass+spiculated.",
        min_length=1,
    )
    image_size: int = option(
        512,
        "Height and width of the stored images, pixels. A network of 8 levels, as training's "
        "default is, needs a multiple of 128; each level less halves that.",
        ge=8,
        le=16384,
    )
    image_height: int | None = option(
        None, "Height where it differs from --image-size, pixels.", ge=8, le=16384
    )
    image_width: int | None = option(
        None, "Width where it differs from --image-size, pixels.", ge=8, le=16384
    )
    geometry: Literal["stretch", "pad"] = option(
        "stretch", "stretch: fill the stored image; pad: keep the aspect, the rest is 0."
    )
    tile: int | None = option(
        None,
        "Cut pictures, at their own size, into tiles of so many pixels a side; unset: each is "
        "resized to --image-size.",
        ge=8,
        le=16384,
    )
    tile_overlap: int = option(
        0, "Pixels by which neighbouring tiles overlap at least; with --tile.", ge=0
    )
    crop: Crop = option(
        "none",
        "breast: leave out the film around the breast; undone where masks are predicted.",
    )
    flip: Flip = option(
        "none",
        "Side on which the chest wall shall be; other pictures are mirrored, undone likewise.",
    )
    channels: Literal["auto", "grey", "rgb"] = option(
        "auto", "Channels of the stored images; auto: grey when every picture is grey."
    )
    full_scale: int | None = option(
        None,
        "Raw value of full intensity of 16-bit pictures whose files do not say it, as DICOM files "
        "do; larger values become it. Unset: 2^bits - 1 of the bits that the pictures need, but "
        "for a few pixels of a few pictures.",
        ge=255,
        le=65535,
    )
    classes: str = option(
        "background=0,0,0;mass=255,255,255",
        "Colours of the masks in the order of the class ids: name=R,G,B;... or name=#rrggbb;...",
    )
    ignore_id: int | None = option(
        None, "Id in index masks of pixels that count nowhere; above the class ids.", ge=1, le=255
    )
    off_map_limit: float = option(
        0.01, "Largest share of a mask's pixels whose colour is of no class, 0 to 1.", ge=0, le=1
    )
    skip_bad: bool = option(
        False, "Leave bad files out and list them in report/rejects.csv, instead of stopping."
    )
    group_preset: Literal["augmented"] | None = option(
        None,
        "How names say which samples belong together; augmented: the source number at the end "
        "(barrdistorted_1001_0.3_0.3_23 is of 23). Unset, and no other --group option: every "
        "file is a group.",
    )
    group_regex: str | None = option(
        None,
        "Regular expression, found in the file name: its first group, or all of it, is the group.",
    )
    group_csv: str | None = option(None, "CSV file with the columns file and group.", path=True)
    fractions: tuple[float, float, float] = option(
        (0.80, 0.15, 0.05), "Shares of samples for train, valid and test; whole groups each."
    )
    seed: int = option(1, "Seed of splits, folds and the order in the shards.", ge=0)
    num_folds: int | None = option(
        None, "Folds for cross-validation over train and valid; column fold of the sample table.",
        ge=2, le=100,
    )  # fmt: skip
    allow_leaks: bool = option(
        False, "Accept ready-made splits that share a group or a picture; marked leaky: true."
    )
    hash_names: bool = option(
        False,
        "Replace names and groups by 16 hex digits of their HMAC-SHA256; the key is in "
        f"{HASH_KEY_VARIABLE}, without it names that can be guessed can be found again.",
    )
    shard_size: float = option(64.0, "Size of a shard to aim at, MB.", gt=0, le=1024)
    max_pixels: int = option(
        DEFAULT_MAX_PIXELS, "Largest picture that is read, pixels.", ge=1, le=2**31
    )
    dicom_reader: Reader = option(
        "pydicom",
        "What decodes DICOM files that are not compressed, to the same pixels; tfio: "
        "tensorflow-io, of the extra tfio.",
        not_identity=True,
    )
    num_processes: int | None = option(
        None,
        "Processes that read and encode; 1: this one. Unset: one per CPU.",
        not_identity=True,
        ge=1,
    )

    @model_validator(mode="before")
    @classmethod
    def _class_is_named_after_rois(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "rois" not in values or "classes" in values:
            return values
        rois = values["rois"]
        # Others are refused below.
        is_known = isinstance(rois, list | tuple) and all(roi in inbreast.KINDS for roi in rois)
        if values.get("format") != "inbreast" or not rois or not is_known:
            return values
        name = "+".join(dict.fromkeys(rois))
        return values | {"classes": f"background=0,0,0;{name}=255,255,255"}

    @field_validator("fractions", mode="before")
    @classmethod
    def _fractions_are_three(cls, values: Any) -> Any:
        if isinstance(values, list | tuple) and len(values) != 3:
            raise ValueError("three shares are needed: of train, valid and test")
        return values

    @field_validator("fractions")
    @classmethod
    def _fractions_add_up(cls, values: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(values) < 0 or abs(sum(values) - 1) > 1e-6:
            raise ValueError("three shares of at least 0 that add up to 1 are needed")
        if values[0] == 0:
            raise ValueError("the share of train must be above 0")
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
        check_ignore_id(parse_color_map(self.classes), self.ignore_id)
        return self

    @model_validator(mode="after")
    def _format_fits(self) -> "PrepConfig":
        if self.format == "pairs":
            if self.rois != PrepConfig.model_fields["rois"].default:
                raise ValueError("--rois is an option of --format inbreast")
        elif len(parse_color_map(self.classes)) != 2:
            raise ValueError(
                "--format inbreast has a background and one foreground class; name two --classes"
            )
        elif (self.group_preset, self.group_regex, self.group_csv) != (None, None, None):
            raise ValueError("the groups of --format inbreast are its patients; leave out --group")
        return self

    @model_validator(mode="after")
    def _tiles_fit(self) -> "PrepConfig":
        if self.tile is None:
            if self.tile_overlap:
                raise ValueError("--tile-overlap needs --tile")
            return self
        if self.tile_overlap >= self.tile:
            raise ValueError(f"--tile-overlap must be below --tile, which is {self.tile}")
        sizes = ("image_size", "image_height", "image_width", "geometry")
        for name in sizes:
            if getattr(self, name) != PrepConfig.model_fields[name].default:
                raise ValueError(
                    f"--{name.replace('_', '-')} is for pictures that are resized, and --tile "
                    f"{self.tile} stores them at their own size; leave out one of the two"
                )
        return self

    @model_validator(mode="after")
    def _one_group_rule(self) -> "PrepConfig":
        rules = ("group_preset", "group_regex", "group_csv")
        found = [f"--{name.replace('_', '-')}" for name in rules if getattr(self, name) is not None]
        if len(found) > 1:
            raise ValueError(f"{' and '.join(found)} exclude each other; give one")
        return self

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


def identity_of(config: PrepConfig) -> dict[str, Any]:
    """Returns the options that decide what is written, as JSON values."""
    values = config.model_dump(mode="json")
    for name, field in PrepConfig.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("not_identity"):
            del values[name]
    if config.full_scale is None:
        del values["full_scale"]  # as before there was such an option
    return values
