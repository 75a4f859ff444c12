"""Reads the two files of a pair into checked pixels and class ids, for every source format.

Checks the rules for an image together with its mask. The module does not depend on geometries,
records or staged objects.
"""

import dataclasses
import functools

import google_crc32c
import numpy as np

from data_prep.imaging.codecs import read_image, read_mask_pixels
from data_prep.imaging.dicom.reader import read_dicom
from data_prep.imaging.masks import read_npz_mask, to_class_ids
from data_prep.imaging.pixels import grey_channel, to_rgb
from data_prep.shards.source_pairs import File, Layout, ScanTask, SourcePair
from data_prep.sources import inbreast
from flexunet.errors import ContentError
from flexunet.storage import ObjectStore, open_source

_SHOWN_COLORS = 3


@dataclasses.dataclass(frozen=True)
class ReadPair:
    """One pair as read: (H, W, C) pixels, (H, W) class ids, and facts as in `EncodedSample`."""

    image: np.ndarray
    mask: np.ndarray
    unmapped_pixels: int = 0
    value_max: int | None = None
    spacing_mm: tuple[float, float] | None = None
    findings: tuple[inbreast.Finding, ...] = ()


def source_crcs(item: SourcePair) -> tuple[int, int]:
    """Returns the CRC32C of the item's two files, as in `EncodedSample.source_crcs`."""
    return crcs_of((read_file(item.image), None if item.mask is None else read_file(item.mask)))


def listed_crcs(item: SourcePair) -> tuple[int, int] | None:
    """Returns the same as `source_crcs`, None if the store does not list these checksums."""
    image, mask = item.image.crc32c, 0 if item.mask is None else item.mask.crc32c
    return None if image is None or mask is None else (image, mask)


def read_file(file: File) -> bytes:
    """Returns the bytes of a source file."""
    return _source_at(file.url).get(file.name)


def crcs_of(data: tuple[bytes, bytes | None]) -> tuple[int, int]:
    """Returns the CRC32C of each of two files, 0 for a missing file."""
    first, second = (0 if each is None else google_crc32c.value(each) for each in data)
    return first, second


def read_pair(item: SourcePair, task: ScanTask, data: tuple[bytes, bytes | None]) -> ReadPair:
    """Returns the pixels and class ids of a pair.

    Args:
        data: the item's two files.

    Raises:
        ContentError: a file is bad, or the two files do not match.
        UsageError: the DICOM reader is not installed.
    """
    return _READERS[task.layout.format](item, task, *data)


@functools.lru_cache(maxsize=64)
def _source_at(url: str) -> ObjectStore:
    return open_source(url)


def _read_image_and_mask(
    item: SourcePair, task: ScanTask, image_data: bytes, mask_data: bytes | None
) -> ReadPair:
    layout = task.layout
    image = _read_image(item, layout, image_data)
    if item.mask is None or mask_data is None:
        raise ValueError(f"{item.image.label}: a pair without a mask")
    mask, unmapped = _read_mask(item, item.mask, layout, mask_data, image.shape[:2])
    return ReadPair(image, mask, unmapped)


def _read_case(
    item: SourcePair, task: ScanTask, image_data: bytes, mask_data: bytes | None
) -> ReadPair:
    """Returns an image of the INbreast release with the outlines of its annotation as mask."""
    layout = task.layout
    found = read_dicom(
        image_data,
        name=item.image.label,
        max_pixels=layout.max_pixels,
        reader=task.dicom_reader,
    )
    image = to_rgb(found.pixels) if layout.channels == "rgb" else found.pixels
    rois: list[inbreast.Roi] = []
    if item.mask is not None and mask_data is not None:
        rois = inbreast.read_rois(mask_data, name=item.mask.label)
    label = item.image.label if item.mask is None else item.mask.label
    mask = inbreast.draw_rois(rois, layout.rois, *image.shape[:2], name=label)
    counts = inbreast.count_findings(rois)
    return ReadPair(image, mask, 0, found.value_max, found.spacing_mm, counts)


_READERS = {"pairs": _read_image_and_mask, "inbreast": _read_case}


def _read_image(item: SourcePair, layout: Layout, data: bytes) -> np.ndarray:
    """Returns the image (H, W, C) in the channels of `layout`; grey RGB becomes one channel."""
    import cv2

    image = read_image(data, name=item.image.label, max_pixels=layout.max_pixels)
    if layout.channels == "rgb":
        return to_rgb(image)
    grey = grey_channel(image)
    if grey is not None:
        return grey[:, :, np.newaxis]
    if layout.channels == "grey":  # the luma of ITU-R BT.601
        return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[:, :, np.newaxis]
    return image


def _read_mask(
    item: SourcePair, file: File, layout: Layout, data: bytes, size: tuple[int, ...]
) -> tuple[np.ndarray, int]:
    """Returns (H, W) uint8 class ids of the whole mask, and its number of unmapped pixels."""
    label = file.label
    if file.name.lower().endswith(".npz"):
        count = len(layout.classes)
        pixels = read_npz_mask(data, label, num_classes=count, max_pixels=layout.max_pixels)
    else:
        pixels = read_mask_pixels(data, name=label, max_pixels=layout.max_pixels)
    if pixels.shape[:2] != size:
        raise ContentError(
            f"{label}: the mask has {pixels.shape[1]}x{pixels.shape[0]} pixels, but its image "
            f"{item.image.label} has {size[1]}x{size[0]}; both must have the same size"
        )
    ids, unmapped, colors = to_class_ids(
        pixels, layout.classes, name=label, ignore_id=layout.ignore_id
    )
    if unmapped > layout.off_map_limit * ids.size:
        share = 100 * unmapped / ids.size
        shown = ", ".join(str(color) for color in colors[:_SHOWN_COLORS])
        raise ContentError(
            f"{label}: {share:.2f} % of the pixels have no class colour, more than the allowed "
            f"{100 * layout.off_map_limit:g} %; most common: {shown}; add them to --classes, or "
            "increase --off-map-limit if they are blends along edges"
        )
    return ids, unmapped
