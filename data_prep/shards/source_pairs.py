"""The pairs to encode, and the facts about each that pass 1 leaves for later decisions.

Data alone; how the facts are found out is in `encode.py`.
"""

import dataclasses
from typing import Literal

from data_prep.imaging.breast import Crop, Flip
from data_prep.imaging.color_map import ClassColor
from data_prep.imaging.dicom.reader import Reader
from data_prep.imaging.geometry import Geometry
from data_prep.imaging.lost_regions import RegionCounts
from data_prep.sources import inbreast


@dataclasses.dataclass(frozen=True)
class Layout:
    """How pictures are read and stored; every field is part of the dataset's identity.

    Attributes:
        format: "pairs" of picture and mask, or "inbreast": DICOM file and annotation.
        rois: kinds of annotations that are foreground.
        tile_overlap: of neighbouring tiles, pixels; counts where `geometry` is "tile".
        full_scale: raw value of full intensity of 16-bit pictures that do not say it; None: that
            is found.
    """

    height: int
    width: int
    geometry: Literal["stretch", "pad", "tile"]
    channels: Literal["auto", "grey", "rgb"]
    classes: tuple[ClassColor, ...]
    ignore_id: int | None
    off_map_limit: float
    max_pixels: int
    format: Literal["pairs", "inbreast"] = "pairs"
    rois: tuple[str, ...] = ()
    crop: Crop = "none"
    flip: Flip = "none"
    tile_overlap: int = 0
    full_scale: int | None = None


@dataclasses.dataclass(frozen=True)
class File:
    """One source file.

    Attributes:
        url, name: the store that holds it, and its name there.
        label: what errors call it.
    """

    url: str
    name: str
    label: str
    size: int
    generation: int


@dataclasses.dataclass(frozen=True)
class SourcePair:
    """One pair to scan. `id`, `group` and `filename` are what the dataset shows.

    `mask` is None where a release says so that there is nothing to see.
    """

    id: str
    group: str
    filename: str
    split: str | None
    image: File
    mask: File | None


@dataclasses.dataclass(frozen=True)
class Moments:
    """Exact sums over the pixels of one or more pictures, per channel."""

    num_pixels: int
    sums: tuple[int, ...]
    squares: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class EncodedSample:
    """What pass 1 found out about one sample of a good pair, and where its record is staged.

    Attributes:
        image_id: id of the pair; the sample's own id where pictures are stored whole.
        image_sha256: of the picture's pixels; `sha256` where it is stored whole.
        is_blank: all those pixels are alike.
        group: of the sample; `staged_group` is that of its record, before groups were joined.
        staged, offset, length: name of the staged object, place of the framed record in it, bytes.
        channels, bit_depth: as staged; `auto` keeps a picture as it is.
        max_value: largest raw value of the source; of full intensity where the file says it.
        value_max: raw value of full intensity, None where the file does not say it.
        num_above: pixels of the source above each of `full_scales`; empty where the file says its
            full scale, or has 8 bits.
        spacing_mm: size of a pixel of the source (y, x), where it is known.
        findings: annotations of a release.
        regions: of the source's mask, None where it is not made smaller.
        source_crcs: CRC32C of the image file and of the mask file, 0 where there is none.
    """

    id: str
    image_id: str
    group: str
    filename: str
    split: str | None
    staged: str
    staged_group: str
    offset: int
    length: int
    channels: int
    bit_depth: int
    max_value: int
    geometry: Geometry
    pixels_per_class: tuple[int, ...]
    unmapped_pixels: int
    sha256: str
    image_sha256: str
    is_blank: bool
    moments: Moments
    value_max: int | None
    num_above: tuple[int, ...]
    spacing_mm: tuple[float, float] | None
    findings: tuple[inbreast.Finding, ...]
    regions: RegionCounts | None
    source_crcs: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class RejectedPair:
    """A pair that cannot be used: its id, the file at fault by its label, and why."""

    image_id: str
    file: str
    reason: str
    source_crcs: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class ScanTask:
    """One call of `scan_chunk`.

    Attributes:
        staging_url: the store of staged objects.
        skip_bad: a bad pair becomes a `RejectedPair` instead of an error.
        dicom_reader: what decodes DICOM files; the pixels are the same.
    """

    staging_url: str
    layout: Layout
    items: tuple[SourcePair, ...]
    skip_bad: bool
    dicom_reader: Reader = "pydicom"
