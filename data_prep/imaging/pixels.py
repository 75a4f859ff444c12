"""Converts pixels to the channels, bit depth and full scale of a dataset.

The module works on arrays in memory; it does not depend on files or datasets.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

MAX_CHANNELS = 64  # of an image
FEW_PIXELS = 1000  # one in this number of an image's pixels may be above the full scale

Pixels = npt.NDArray[Any]
"""(H, W) or (H, W, C) uint8 or uint16."""


def grey_channel(pixels: Pixels) -> Pixels | None:
    """Returns the channel (H, W) of an image whose channels are equal, None for colour images.

    Args:
        pixels: (H, W) or (H, W, C).
    """
    import cv2

    if pixels.ndim == 2:
        return pixels
    # Takes a third of the time of comparing every third byte.
    first, *others = cv2.split(pixels)
    is_grey = all(np.array_equal(first, other) for other in others)
    return np.asarray(first) if is_grey else None


def by_channels(function: Callable[[Pixels], Pixels], image: Pixels) -> Pixels:
    """Returns `function` of an image (H, W, C), applied to a few channels at once.

    OpenCV resizes at most four channels, and moves two with less precision than one.

    Args:
        function: treats channels alike; takes and returns 1, 3 or 4 of them.
    """
    channels = 1 if image.ndim == 2 else image.shape[2]
    if channels in (1, 3, 4):
        return function(image)
    parts, start = [], 0
    while start < channels:
        size = min(4, channels - start)
        size = 1 if size == 2 else size
        part = function(np.ascontiguousarray(image[..., start : start + size]))
        parts.append(part.reshape(*part.shape[:2], size))
        start += size
    return np.concatenate(parts, axis=2)


def shown_channels(image: Pixels) -> Pixels:
    """Returns the channels of (H, W, C) to show: grey and RGB as they are, else the first."""
    return image if image.shape[2] in (1, 3) else image[..., :1]


def is_uniform(pixels: Pixels) -> bool:
    """Returns whether all pixels of (H, W[, C]) are equal, as in unexposed or filler images."""
    first = pixels[0, 0]
    # The first row decides about almost all images.
    return bool(np.all(pixels[0] == first) and np.all(pixels == first))


def to_rgb(image: Pixels) -> Pixels:
    """Returns the image as (H, W, 3); repeats the channel of a grey image."""
    return image if image.shape[2] == 3 else np.repeat(image, 3, axis=2)


@dataclass(frozen=True)
class PixelFormat:
    """The channels, bit depth and full scale of all stored images."""

    channels: int
    bit_depth: Literal[8, 16]
    value_max: int


def convert(image: Pixels, pixel_format: PixelFormat, *, value_max: int | None = None) -> Pixels:
    """Returns `image`, (H, W, C), in the channels, bit depth and full scale of `pixel_format`.

    Values above the full scale are clipped to it.

    Args:
        value_max: raw value of full intensity in `image`, scaled to the dataset's. None: 255 for
            8 bits, and the dataset's value for 16 bits.
    """
    if pixel_format.channels == 3:
        image = to_rgb(image)
    dtype = np.uint8 if pixel_format.bit_depth == 8 else np.uint16
    if value_max is None:
        value_max = 255 if image.dtype == np.uint8 else pixel_format.value_max
    if value_max < np.iinfo(image.dtype).max:
        image = np.minimum(image, image.dtype.type(value_max))
    if value_max != pixel_format.value_max:
        # 65535**2 plus half of 65535 fits into 32 bits.
        scaled = image.astype(np.uint32) * pixel_format.value_max
        image = (scaled + value_max // 2) // value_max
    return image.astype(dtype, copy=False)
