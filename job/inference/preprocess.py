"""Converts an image to the size, channels and full scale that the network takes."""

import logging
from typing import Literal

import numpy as np

from data_prep.imaging.arrays import has_planes
from data_prep.imaging.breast import frame
from data_prep.imaging.geometry import Geometry, apply_geometry
from data_prep.imaging.pixels import FEW_PIXELS, PixelFormat, convert
from data_prep.shards.manifest import Manifest
from flexunet.errors import ContentError

logger = logging.getLogger(__name__)

# 12-bit detectors store 0..4095 in 16-bit files.
_LARGEST_12_BIT = 4095
# A 16-bit image must exceed 1/_UNUSED of the full scale: a 12-bit image uses at most a sixteenth of
# 16 bits. 1/_UNUSED_AND_DARKEST applies to images that are darker than all images of the dataset.
_UNUSED, _UNUSED_AND_DARKEST = 16, 4


def to_model_pixels(
    image: np.ndarray,
    manifest: Manifest,
    *,
    name: str = "image",
    value_max: int | None = None,
    kind: Literal["stretch", "pad", "tile"] | None = None,
) -> tuple[np.ndarray, Geometry]:
    """Converts `image` (h, w, c) like the dataset: returns (H, W, C) pixels and the geometry.

    For an 8-bit dataset the upper byte of images that use 16 bits is taken. For a 16-bit dataset a
    few pixels above the full scale are clipped to it, as in `prep`, with a warning.

    Args:
        value_max: raw value of full intensity, if known; a few pixels above it are clipped, too.
        kind: of geometry; None: that of the dataset. "tile" keeps the original size, uncut.

    Raises:
        ContentError: `image` has another number of channels, other than grey and RGB; or it has 16
            bits and its values are far below, or above, the full scale
            of the dataset or `value_max`: it may be dark, or from a detector of fewer bits.
    """
    import cv2

    _check_channels(image, manifest, name)
    takes_upper_byte = manifest.bit_depth == 8 and image.dtype == np.uint16 and value_max is None
    if takes_upper_byte:
        _refuse_unused_bits(image, name)
    elif image.dtype == np.uint16:
        _check_full_scale(image, manifest, name, value_max)
    kind = kind or manifest.geometry
    size = manifest.image_height, manifest.image_width
    geometry = frame(
        image,
        height=size[0],
        width=size[1],
        kind=kind,
        crop=manifest.crop,
        flip=manifest.flip,
    )
    if kind == "tile":
        size = geometry.height, geometry.width
    if manifest.channels == 1 and image.shape[2] == 3:
        # As in prep: the luma of ITU-R BT.601, which keeps the value of equal channels.
        image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[:, :, np.newaxis]
    pixels = apply_geometry(image, geometry, *size, nearest=False).reshape(*size, -1)
    if takes_upper_byte:
        pixels = (pixels >> 8).astype(np.uint8)
    target = PixelFormat(manifest.channels, manifest.bit_depth, manifest.value_max)
    return convert(pixels, target, value_max=value_max), geometry


def _check_channels(image: np.ndarray, manifest: Manifest, name: str) -> None:
    """Refuses another number of channels; grey and RGB are converted into each other."""
    found, expected = image.shape[2], manifest.channels
    if found != expected and (has_planes(found) or has_planes(expected)):
        raise ContentError(
            f"{name}: an image of {found} channels, but the run was trained on images of {expected}"
        )


def _refuse_unused_bits(image: np.ndarray, name: str) -> None:
    """Refuses 12-bit images: their upper byte is nearly black, and the mask would be wrong."""
    highest = int(image.max())
    if highest <= _LARGEST_12_BIT:
        raise ContentError(
            f"{name}: 16-bit file whose largest value is {highest}, but the model was trained on "
            "8-bit images; give its full scale with --full-scale, or scale its range to "
            "0..255, save it with 8 bits and infer again"
        )


def _check_full_scale(
    image: np.ndarray, manifest: Manifest, name: str, value_max: int | None
) -> None:
    """Refuses an image with another full scale than `value_max` or the dataset.

    It would be many times too bright or too dark, and its mask wrong.
    """
    brightest = image.max(axis=2)
    highest, full = int(brightest.max()), value_max or manifest.value_max
    num_above = int(np.count_nonzero(brightest > full))
    whose = "in the dataset of the model" if value_max is None else "by --full-scale or the file"
    if num_above * FEW_PIXELS > brightest.size:
        raise ContentError(
            f"{name}: 16-bit file with values up to {highest}, but full intensity is {full} "
            f"{whose}; give its full scale with --full-scale, or scale its range to 0..{full}"
        )
    if num_above:
        logger.warning(
            "%s: %s above full intensity, up to %d, clipped to %d",
            name,
            "1 pixel is" if num_above == 1 else f"{num_above} pixels are",
            highest,
            full,
        )
    if value_max is not None or highest == int(brightest.min()):
        return
    share, lowest = _UNUSED, full
    if manifest.full_scale is not None:
        share, lowest = _UNUSED_AND_DARKEST, manifest.full_scale.lowest_max
    if highest <= full // share and highest < lowest:
        raise ContentError(
            f"{name}: 16-bit file whose largest value is {highest}, but full intensity is {full} "
            f"in {whose}; give its full scale with --full-scale (4095 for 12 bits; {full} if the "
            f"image is really this dark), or scale its range to 0..{full}"
        )
