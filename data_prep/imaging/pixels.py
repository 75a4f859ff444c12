"""Pixels in memory: their type, channels, bit depth and full scale.

Owns what the stored pictures of a dataset have in common, and how a picture becomes one of them.
It must not know files or datasets.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

FEW_PIXELS = 1000  # one of so many pixels of a picture may be above the full scale

Pixels = npt.NDArray[Any]
"""(H, W) or (H, W, C) uint8 or uint16."""


def grey_channel(pixels: Pixels) -> Pixels | None:
    """Returns the one channel (H, W) of a picture whose channels are alike, None for colours.

    Args:
        pixels: (H, W) or (H, W, C).
    """
    import cv2

    if pixels.ndim == 2:
        return pixels
    # A third of the time that comparing every third byte takes.
    first, *others = cv2.split(pixels)
    is_grey = all(np.array_equal(first, other) for other in others)
    return np.asarray(first) if is_grey else None


def to_rgb(image: Pixels) -> Pixels:
    """Returns (H, W, 3); a grey picture gets its channel three times."""
    return image if image.shape[2] == 3 else np.repeat(image, 3, axis=2)


@dataclass(frozen=True)
class PixelFormat:
    """What every stored picture has in common."""

    channels: Literal[1, 3]
    bit_depth: Literal[8, 16]
    value_max: int


def convert(image: Pixels, pixel_format: PixelFormat, *, value_max: int | None = None) -> Pixels:
    """Returns `image`, (H, W, C), in the channels, bit depth and full scale of `pixel_format`.

    Values above the full scale become that.

    Args:
        value_max: raw value of full intensity in `image`, which becomes the dataset's. None: 255
            of 8 bits, and of 16 bits what it is in the dataset.
    """
    if pixel_format.channels == 3:
        image = to_rgb(image)
    dtype = np.uint8 if pixel_format.bit_depth == 8 else np.uint16
    if value_max is None:
        value_max = 255 if image.dtype == np.uint8 else pixel_format.value_max
    if value_max < np.iinfo(image.dtype).max:
        image = np.minimum(image, image.dtype.type(value_max))
    if value_max != pixel_format.value_max:
        # 65535**2 and the half of 65535 fit into 32 bits.
        scaled = image.astype(np.uint32) * pixel_format.value_max
        image = (scaled + value_max // 2) // value_max
    return image.astype(dtype, copy=False)
