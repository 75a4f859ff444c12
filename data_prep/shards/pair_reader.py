"""Reads the files of a pair into checked pixels and class ids, for every source format.

Checks the rules for an image together with its mask. The module does not depend on geometries,
records or staged objects.
"""

import dataclasses
import functools
import struct
from collections.abc import Sequence

import google_crc32c
import numpy as np

from data_prep.imaging.arrays import check_storable, has_planes, is_npy, read_npy
from data_prep.imaging.codecs import read_image, read_mask_pixels
from data_prep.imaging.dicom.reader import read_dicom
from data_prep.imaging.pixels import grey_channel, to_rgb
from data_prep.masks.files import read_mask, read_mask_file
from data_prep.masks.npz import read_npz_file
from data_prep.masks.reading import MaskReading
from data_prep.masks.rules import MaskRules
from data_prep.shards.source_pairs import File, Layout, ScanTask, SourcePair
from data_prep.sources import inbreast
from flexunet.errors import ContentError
from flexunet.storage import ObjectStore, open_source
from flexunet.text import join_truncated

_MAX_LISTED = 3  # files named in an error
PairData = tuple[bytes, ...]  # the files of a pair, see `SourcePair.files`


@dataclasses.dataclass(frozen=True)
class ReadPair:
    """One pair as read: (H, W, C) pixels, the mask, and facts as in `EncodedSample`."""

    image: np.ndarray
    reading: MaskReading
    value_max: int | None = None
    spacing_mm: tuple[float, float] | None = None
    findings: tuple[inbreast.Finding, ...] = ()

    @property
    def mask(self) -> np.ndarray:
        """The class ids (H, W) uint8."""
        return self.reading.ids


def source_crcs(item: SourcePair) -> tuple[int, int]:
    """Returns the checksums of the item's files, as in `EncodedSample.source_crcs`."""
    return _crcs_of_files([google_crc32c.value(read_file(file)) for file in item.files])


def listed_crcs(item: SourcePair) -> tuple[int, int] | None:
    """Returns the same as `source_crcs`, None if the store does not list these checksums."""
    known = [file.crc32c for file in item.files if file.crc32c is not None]
    return _crcs_of_files(known) if len(known) == len(item.files) else None


def read_file(file: File) -> bytes:
    """Returns the bytes of a source file."""
    return _source_at(file.url).get(file.name)


def crcs_of(data: PairData) -> tuple[int, int]:
    """Returns the checksums of the files of a pair, as in `EncodedSample.source_crcs`."""
    return _crcs_of_files([google_crc32c.value(each) for each in data])


def _crcs_of_files(crcs: Sequence[int]) -> tuple[int, int]:
    image, *others = crcs
    if len(others) < 2:
        return image, others[0] if others else 0
    return image, google_crc32c.value(struct.pack(f">{len(others)}I", *others))


def read_pair(item: SourcePair, task: ScanTask, data: PairData) -> ReadPair:
    """Returns the pixels and class ids of a pair.

    Args:
        data: the item's `files`.

    Raises:
        ContentError: a file is bad, or the files do not match.
        UsageError: the DICOM reader is not installed.
    """
    return _READERS[task.layout.format](item, task, data)


@functools.lru_cache(maxsize=64)
def _source_at(url: str) -> ObjectStore:
    return open_source(url)


def _read_image_and_mask(item: SourcePair, task: ScanTask, data: PairData) -> ReadPair:
    layout = task.layout
    image = _read_image(item, layout, data[0])
    size = image.shape[:2]
    return ReadPair(image, read_masks(item, layout, data[1:], size))


def read_masks(
    item: SourcePair, layout: Layout, data: PairData, size: tuple[int, ...]
) -> MaskReading:
    """Returns the class ids of a pair of images and masks.

    Args:
        data: the item's `files` without the image.
        size: height and width of the image.

    Raises:
        ContentError: a file is bad, has another size, or contradicts another one.
    """
    reading = MaskReading(np.zeros(size, np.uint8))
    for number, file in enumerate(item.masks, 1):
        found = _read_mask(item, file, layout, data[number - 1], size)
        reading = found if number == 1 else _joined(reading, found, item.masks[:number], layout)
    if item.view is not None and layout.ignore_id is not None:
        reading.ids[~_read_view(item, item.view, layout, data[-1], size)] = layout.ignore_id
    return reading


def _read_view(
    item: SourcePair, file: File, layout: Layout, data: bytes, size: tuple[int, ...]
) -> np.ndarray:
    """Returns (H, W) bool: inside of the field of view, which is the brighter half of the values.

    Raises:
        ContentError: the file has colours, another size than its image, or no pixel inside.
    """
    pixels = read_mask_pixels(data, name=file.label, max_pixels=layout.max_pixels)
    check_size(item, file, pixels.shape[:2], size)
    grey = pixels if pixels.ndim == 2 else grey_channel(pixels)
    if grey is None:
        raise ContentError(
            f"{file.label}: a field of view has colours; it must be white inside and black outside"
        )
    inside = grey > grey.max() // 2
    if not inside.any():
        raise ContentError(f"{file.label}: no pixel is inside of the field of view; replace it")
    return inside


def check_size(item: SourcePair, file: File, found: tuple[int, ...], size: tuple[int, ...]) -> None:
    """Checks that a mask of the size `found` has the size of its image.

    Raises:
        ContentError: it has another one.
    """
    if found != size:
        raise ContentError(
            f"{file.label}: the mask has {found[1]}x{found[0]} pixels, but its image "
            f"{item.image.label} has {size[1]}x{size[0]}; both must have the same size"
        )


def _joined(
    before: MaskReading, found: MaskReading, files: Sequence[File], layout: Layout
) -> MaskReading:
    """Returns both masks as one: a class replaces ignored pixels, and these background.

    Args:
        before, found: all masks before the last of `files`, and that one.

    Raises:
        ContentError: the masks give different classes to a pixel.
    """
    ignored = -1 if layout.ignore_id is None else layout.ignore_id
    is_class = [(ids != 0) & (ids != ignored) for ids in (before.ids, found.ids)]
    differs = is_class[0] & is_class[1] & (before.ids != found.ids)
    if differs.any():
        row, column = np.argwhere(differs)[0]
        names = {each.id: each.name for each in layout.classes}
        raise ContentError(
            f"{files[-1].label}: {np.count_nonzero(differs)} pixels have another class in "
            f"{join_truncated([file.label for file in files[:-1]], _MAX_LISTED)}, the first at x "
            f"{column}, y {row}: {names[int(found.ids[row, column])]} here, "
            f"{names[int(before.ids[row, column])]} there; correct one, or select fewer masks with "
            "--mask-name"
        )
    is_new = is_class[1] | ((before.ids == 0) & (found.ids == ignored))
    return before.joined_with(found, np.where(is_new, found.ids, before.ids))


def _read_case(item: SourcePair, task: ScanTask, data: PairData) -> ReadPair:
    """Returns an image of the INbreast release with the outlines of its annotation as mask."""
    layout = task.layout
    found = read_dicom(
        data[0],
        name=item.image.label,
        max_pixels=layout.max_pixels,
        reader=task.dicom_reader,
    )
    image = to_rgb(found.pixels) if layout.channels == "rgb" else found.pixels
    rois: list[inbreast.Roi] = []
    if item.mask is not None:
        rois = inbreast.read_rois(data[1], name=item.mask.label)
    label = item.image.label if item.mask is None else item.mask.label
    mask = inbreast.draw_rois(rois, layout.rois, *image.shape[:2], name=label)
    counts = inbreast.count_findings(rois)
    return ReadPair(image, MaskReading(mask), found.value_max, found.spacing_mm, counts)


_READERS = {"pairs": _read_image_and_mask, "inbreast": _read_case}


def _read_image(item: SourcePair, layout: Layout, data: bytes) -> np.ndarray:
    """Returns the image (H, W, C) in the channels of `layout`; grey RGB becomes one channel."""
    import cv2

    read = read_npy if is_npy(data) else read_image
    image = read(data, name=item.image.label, max_pixels=layout.max_pixels)
    channels = image.shape[2]
    check_storable(layout.height, layout.width, channels, name=item.image.label)
    if has_planes(channels):
        if layout.channels != "auto":
            raise ContentError(
                f"{item.image.label}: has {channels} channels, but --channels {layout.channels} is "
                "for grey and RGB images; leave the option out"
            )
        return image
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
) -> MaskReading:
    """Returns the whole mask as read; it must have the size of its image."""
    label = file.label
    if file.name.lower().endswith(".npz"):
        count = len(layout.file_ids or layout.classes)
        mask = read_npz_file(data, label, num_classes=count, max_pixels=layout.max_pixels)
    else:
        mask = read_mask_file(data, name=label, max_pixels=layout.max_pixels)
    check_size(item, file, mask.pixels.shape[:2], size)
    return read_mask(mask, _rules_of(layout), name=label)


@functools.lru_cache(maxsize=8)
def _rules_of(layout: Layout) -> MaskRules:
    return MaskRules(
        layout.classes,
        layout.ignore_id,
        layout.ignored,
        layout.mask_encoding,
        layout.has_ignore_id,
        layout.file_ids,
        layout.palette,
    )
