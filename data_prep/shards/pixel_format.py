"""Chooses channels, bit depth and full scale for all images of a dataset.

Determines the raw value of full intensity if files do not state it. The module uses facts from pass
1 only; it does not read or write images.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from data_prep.imaging.pixels import FEW_PIXELS, PixelFormat, Pixels
from data_prep.shards.source_pairs import EncodedSample


def full_scales(full_scale: int | None) -> tuple[int, ...]:
    """Returns the possible raw values of full intensity: the given one, or 255, 511 ... 65535."""
    return tuple(2**bits - 1 for bits in range(8, 17)) if full_scale is None else (full_scale,)


def num_above(image: Pixels, full_scale: int | None) -> tuple[int, ...]:
    """Returns how many pixels of (H, W, C) are above each of `full_scales`; none for 8 bits."""
    if image.dtype == np.uint8:
        return ()
    brightest = image.max(axis=2)
    top = int(brightest.max())
    return tuple(
        int(np.count_nonzero(brightest > scale)) if top > scale else 0
        for scale in full_scales(full_scale)
    )


class MeasuredImage(Protocol):
    """The facts about an image that its format needs; see `EncodedSample`."""

    @property
    def image_id(self) -> str:
        """Id of the source image."""
        ...

    @property
    def channels(self) -> int:
        """Number of channels."""
        ...

    @property
    def bit_depth(self) -> int:
        """Bits of a channel."""
        ...

    @property
    def max_value(self) -> int:
        """Largest raw value, or full intensity if the file states it."""
        ...

    @property
    def num_above(self) -> tuple[int, ...]:
        """Pixels above each of `full_scales`; empty if the file states its full scale."""
        ...

    @property
    def num_source_pixels(self) -> int:
        """Pixels of the source image."""
        ...


_FEW_IMAGES = 10  # one in this number of images may have pixels above the full scale
_SPARED_BITS = 2  # that clipping must save: for one bit, darker images are better than lost values


def common_pixel_format(
    samples: Iterable[MeasuredImage], full_scale: int | None = None
) -> PixelFormat:
    """Returns the smallest format for all images: grey only if all are grey.

    All images have 1 or 3 channels, or all have the same other number.

    `value_max` is 255 for 8 bits, else `full_scale`. If that is None, it is 2**bits - 1 with the
    bits that the images need: a 12-bit detector stores 0..4095 in 16-bit files. A few pixels of a
    few images, such as burned-in markers, are ignored if the others need two bits less; see
    `clipped`. A full scale stated in a file is never ignored.
    """
    most_channels, is_shallow, stated = 1, True, 255
    unstated = {}
    for sample in samples:
        most_channels = max(most_channels, sample.channels)
        is_shallow &= sample.bit_depth == 8
        if sample.num_above:
            unstated[sample.image_id] = sample
        else:
            stated = max(stated, sample.max_value)
    if is_shallow:
        return PixelFormat(most_channels, 8, 255)
    found = full_scale or max(2 ** stated.bit_length() - 1, _full_scale(list(unstated.values())))
    return PixelFormat(most_channels, 16, found)


def _full_scale(images: Sequence[MeasuredImage]) -> int:
    """Returns the full scale of 16-bit images that do not state it, 255 without such images."""
    highest = max((image.max_value for image in images), default=0)
    num_bits = max(8, highest.bit_length())
    num_few = len(images) // _FEW_IMAGES
    for place, scale in _sparing(images, num_bits):
        if sum(image.num_above[place] > 0 for image in images) <= num_few:
            return scale
    return 2**num_bits - 1


def _sparing(images: Sequence[MeasuredImage], num_bits: int) -> Iterator[tuple[int, int]]:
    """Yields (index, full scale) for the full scales above which every image has few pixels.

    Yields only scales that need clearly fewer bits than `num_bits`, the smallest first.
    """
    for place, scale in enumerate(full_scales(None)):
        if scale.bit_length() <= num_bits - _SPARED_BITS and all(
            each.num_above[place] * FEW_PIXELS <= each.num_source_pixels for each in images
        ):
            yield place, scale


def sparing_scale(samples: Iterable[EncodedSample], value_max: int) -> int | None:
    """Returns the smallest full scale, clearly below `value_max`, that would clip few pixels.

    Returns None if there is none. If many images have such pixels, only the user knows whether they
    are markers. Used only if no full scale was given.
    """
    images = list({each.image_id: each for each in samples if each.num_above}.values())
    found = _sparing(images, value_max.bit_length()) if images else iter(())
    return next((scale for _, scale in found), None)


def clipped(
    samples: Iterable[EncodedSample], value_max: int, full_scale: int | None
) -> list[tuple[EncodedSample, int]]:
    """Returns the images with pixels above `value_max` and their number, largest number first.

    Args:
        full_scale: the given full scale, or None.
    """
    place = full_scales(full_scale).index(value_max)
    images = {sample.image_id: sample for sample in samples if sample.num_above}.values()
    found = [(each, each.num_above[place]) for each in images if each.num_above[place]]
    return sorted(found, key=lambda each: (-each[1], each[0].id))
