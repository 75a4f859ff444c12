"""Defines the pairs to encode, and the facts about each that pass 1 returns.

Data classes only; `encode.py` computes the facts.
"""

import dataclasses
from typing import Literal

from data_prep.imaging.breast import Crop, Flip
from data_prep.imaging.dicom.reader import Reader
from data_prep.imaging.geometry import Geometry
from data_prep.imaging.lost_regions import RegionCounts
from data_prep.masks.color_map import ClassColor, Color, Palette
from data_prep.masks.reading import UnmappedColor
from data_prep.masks.rules import Encoding
from data_prep.sources import inbreast


@dataclasses.dataclass(frozen=True)
class Layout:
    """The options for reading and storing images; every field is part of the dataset's identity.

    Attributes:
        format: "pairs" of image and mask, or "inbreast": DICOM file and annotation.
        rois: kinds of annotations used as foreground.
        tile_overlap: minimum overlap of neighbouring tiles, pixels; only if `geometry` is "tile".
        full_scale: raw value of full intensity of 16-bit images that do not state it; None:
            determined from the images.
        ignored: mask colours that are read as `ignore_id`.
        has_ignore_id: index masks may hold `ignore_id`.
        mask_encoding: what carries the classes in mask files.
        file_ids, palette: see `MaskRules`.
    """

    height: int
    width: int
    geometry: Literal["stretch", "pad", "tile"]
    channels: Literal["auto", "grey", "rgb"]
    classes: tuple[ClassColor, ...]
    ignore_id: int | None
    max_pixels: int
    format: Literal["pairs", "inbreast"] = "pairs"
    rois: tuple[str, ...] = ()
    crop: Crop = "none"
    flip: Flip = "none"
    tile_overlap: int = 0
    full_scale: int | None = None
    ignored: tuple[Color, ...] = ()
    mask_encoding: Encoding = "auto"
    file_ids: tuple[int, ...] = ()
    has_ignore_id: bool = False
    palette: Palette = ()


@dataclasses.dataclass(frozen=True)
class File:
    """One source file.

    Attributes:
        url, name: URL of its store, and its name there.
        label: its name in errors.
        crc32c: CRC32C of its bytes as listed, None if the store does not list it.
    """

    url: str
    name: str
    label: str
    size: int
    generation: int
    crc32c: int | None = None


@dataclasses.dataclass(frozen=True)
class SourcePair:
    """One pair to scan. `id`, `group` and `filename` are the names in the dataset.

    `mask` is None if the image has no finding: an INbreast release has no annotation, or
    --missing-mask is "empty". `more_masks` are joined with `mask`; pixels outside of the field of
    view `view` are ignored.
    """

    id: str
    group: str
    filename: str
    split: str | None
    image: File
    mask: File | None
    more_masks: tuple[File, ...] = ()
    view: File | None = None

    @property
    def masks(self) -> tuple[File, ...]:
        """All masks."""
        return () if self.mask is None else (self.mask, *self.more_masks)

    @property
    def files(self) -> tuple[File, ...]:
        """All files in the order in which they are read: the image is the first."""
        return (self.image, *self.masks, *(() if self.view is None else (self.view,)))


@dataclasses.dataclass(frozen=True)
class Moments:
    """Exact sums over the pixels of one or more images, per channel."""

    num_pixels: int
    sums: tuple[int, ...]
    squares: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class EncodedSample:
    """The facts of one sample of a good pair from pass 1, and the location of its staged record.

    Attributes:
        image_id: id of the pair; the sample's own id if images are not cut into tiles.
        image_sha256: digest of the image's pixels; equal to `sha256` without tiles.
        is_blank: all these pixels are equal.
        group: group of the sample; `staged_group` is the group in its record, before merging.
        staged, offset, length: name of the staged object, and position and bytes of the record.
        channels, bit_depth: as staged; `auto` keeps those of the image.
        max_value: largest raw value of the source; full intensity if the file states it.
        unmapped_pixels, unmapped_colors, unexplained_pixels: of the whole source mask, see
            `MaskReading`. Of the tiles of an image, only the first has the colours.
        value_max: raw value of full intensity, None if the file does not state it.
        num_above: pixels of the source above each of `full_scales`; empty if the file states its
            full scale or has 8 bits.
        spacing_mm: size of a pixel of the source (y, x), None if unknown.
        findings: annotations of an INbreast release.
        regions: region counts of the source mask, None without downscaling.
        source_crcs: CRC32C of the image file and of the mask file, 0 for a missing file; of
            several masks, or with a field of view, the CRC32C of the CRC32Cs of these files.
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
    unmapped_colors: tuple[UnmappedColor, ...]
    unexplained_pixels: int
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

    @property
    def num_source_pixels(self) -> int:
        """Pixels of the source image."""
        return self.geometry.source_height * self.geometry.source_width


@dataclasses.dataclass(frozen=True)
class RejectedPair:
    """An unusable pair: its id, the label of the bad file, and the reason."""

    image_id: str
    file: str
    reason: str
    source_crcs: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class ScanTask:
    """The pairs whose records are staged together, and how to read them.

    Attributes:
        staging_url: the store of staged objects.
        skip_bad: a bad pair becomes a `RejectedPair` instead of an error.
        dicom_reader: decoder of DICOM files; all give the same pixels.
    """

    staging_url: str
    layout: Layout
    items: tuple[SourcePair, ...]
    skip_bad: bool
    dicom_reader: Reader = "pydicom"


@dataclasses.dataclass(frozen=True)
class ScanBatch:
    """The arguments of one call of `scan_chunks`: consecutive chunks with the same output.

    Attributes:
        is_staged: for each chunk whether its staged object may exist; if not, it is not looked for.
        num_requests: requests at once; 1: only the next file is read, in the same thread.
    """

    chunks: tuple[ScanTask, ...]
    is_staged: tuple[bool, ...]
    num_requests: int
