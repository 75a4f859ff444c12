"""Reads mask files with all that may carry classes: colours, palette indices and alpha.

The formats and their limits are those of `imaging/codecs.py`.
"""

from dataclasses import dataclass

import numpy as np

from data_prep.imaging.codecs import decoding, open_image, read_mask_pixels
from data_prep.imaging.pixels import Pixels

_PNG_SIGNATURE = b"\x89PNG"
_PNG_COLOR_TYPE = 25  # position of the byte
_PNG_PLAIN_TYPES = (0, 2)  # grey and RGB, without palette and alpha
_PLAIN_SIGNATURES = (b"\xff\xd8",)  # JPEG


@dataclass(frozen=True)
class MaskFile:
    """The content of a mask file.

    Attributes:
        pixels: (H, W) uint8 or uint16 grey, or (H, W, 3) uint8 RGB, without alpha.
        indices: (H, W) uint8 indices into the palette, None without a palette.
        alpha: (H, W) uint8, None without alpha or if it is the same everywhere.
    """

    pixels: Pixels
    indices: Pixels | None = None
    alpha: Pixels | None = None


def read_mask_file(data: bytes, *, name: str, max_pixels: int) -> MaskFile:
    """Returns the content of a mask file: PNG, JPEG, TIFF, BMP or GIF.

    Raises:
        ContentError: see `read_image`.
    """
    pixels = read_mask_pixels(data, name=name, max_pixels=max_pixels)
    if _is_plain(data) or pixels.dtype != np.uint8:
        return MaskFile(pixels)
    with decoding(data, name=name):
        image = open_image(data, name=name, max_pixels=max_pixels)
        if image.mode == "P":
            return MaskFile(pixels, indices=np.array(image))
        if image.mode not in ("LA", "RGBA"):
            return MaskFile(pixels)
        alpha = np.array(image.getchannel("A"))
    return MaskFile(pixels, alpha=None if (alpha == alpha[0, 0]).all() else alpha)


def _is_plain(data: bytes) -> bool:
    """Returns whether the file has neither a palette nor alpha, as its first bytes show."""
    if data.startswith(_PNG_SIGNATURE):
        return data[_PNG_COLOR_TYPE] in _PNG_PLAIN_TYPES
    return data.startswith(_PLAIN_SIGNATURES)
