"""Resizes, pads, crops and mirrors an image into its stored form, and undoes it.

Pure functions on pixels, without files or datasets.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_prep.imaging.pixels import Pixels, by_channels


@dataclass(frozen=True)
class Box:
    """A rectangular part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Geometry:
    """The position of a source image in the stored image, in pixels.

    Attributes:
        kind: "stretch" (fills the stored image), "pad" (keeps the aspect ratio; the rest is 0) or
            "tile" (a part at its own size, upper left; the rest is 0).
        source_height: height of the source image.
        source_width: width of the source image.
        top: first row of the source in the stored image.
        left: first column of the source in the stored image.
        height: rows of the source in the stored image.
        width: columns of the source in the stored image.
        crop: the part of the source that is stored; None: all of it.
        is_flipped: the part is mirrored left to right.
    """

    kind: str
    source_height: int
    source_width: int
    top: int
    left: int
    height: int
    width: int
    crop: Box | None = None
    is_flipped: bool = False

    @property
    def part(self) -> Box:
        """The part of the source image that is stored."""
        return self.crop or Box(0, 0, self.source_height, self.source_width)


def fit(
    source: tuple[int, int],
    target: tuple[int, int],
    *,
    kind: str,
    crop: Box | None = None,
    is_flipped: bool = False,
) -> Geometry:
    """Returns the geometry that fits an image, or a part of it, into the target size.

    Args:
        source: height and width of the source image.
        target: height and width of the stored image.
        kind: "stretch", "pad" to keep the aspect ratio and centre the image, or "tile" to keep the
            size and ignore the target.
        crop: the part of the source to use; None: all of it.
        is_flipped: mirror the part left to right.

    Raises:
        ValueError: a size below 1, or an unknown kind.
    """
    height, width = (crop.height, crop.width) if crop else source
    target_height, target_width = target
    if min(height, width, target_height, target_width) < 1:
        raise ValueError(
            f"cannot fit {height}x{width} into {target_height}x{target_width}: sizes start at 1"
        )
    if kind == "stretch":
        return Geometry(kind, *source, 0, 0, target_height, target_width, crop, is_flipped)
    if kind == "tile":
        return Geometry(kind, *source, 0, 0, height, width, crop, is_flipped)
    if kind != "pad":
        raise ValueError(f"unknown geometry {kind!r}; known: pad, stretch, tile")
    scale = min(target_height / height, target_width / width)
    inner_height = min(target_height, max(1, round(height * scale)))
    inner_width = min(target_width, max(1, round(width * scale)))
    top = (target_height - inner_height) // 2
    left = (target_width - inner_width) // 2
    inner = inner_height, inner_width
    return Geometry(kind, *source, top, left, *inner, crop, is_flipped)


def apply_geometry(
    pixels: Pixels, geometry: Geometry, target_height: int, target_width: int, *, nearest: bool
) -> Pixels:
    """Returns `pixels` fitted into (target_height, target_width[, C]), padded with 0; dtype kept.

    Args:
        pixels: (source_height, source_width) or (source_height, source_width, C).
        nearest: True for masks: no new values, aligned with the resized image.

    Raises:
        ValueError: `pixels` do not have the source size.
    """
    if pixels.shape[:2] != (geometry.source_height, geometry.source_width):
        raise ValueError(f"pixels {pixels.shape} do not have the source size of {geometry}")
    part = pixels[_slices(geometry.part)]
    if geometry.is_flipped:
        part = part[:, ::-1]
    inner = _resize(part, geometry.height, geometry.width, nearest=nearest)
    if (geometry.height, geometry.width) == (target_height, target_width):
        return inner
    result = np.zeros((target_height, target_width, *pixels.shape[2:]), pixels.dtype)
    result[_inside(geometry)] = inner
    return result


def kept_lines(geometry: Geometry) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Returns the source rows and columns that `apply_geometry` keeps for a mask."""
    box = geometry.part
    rows, columns = (np.arange(length, dtype=np.int32) for length in (box.height, box.width))
    if geometry.is_flipped:
        columns = columns[::-1]
    rows = _resize(rows[:, np.newaxis], geometry.height, 1, nearest=True)[:, 0]
    columns = _resize(columns[np.newaxis], 1, geometry.width, nearest=True)[0]
    return box.top + rows, box.left + columns


def undo_geometry(pixels: Pixels, geometry: Geometry, *, nearest: bool) -> Pixels:
    """Returns the source image restored from the stored image to its size; keeps the dtype.

    Cropped parts are 0.

    Args:
        pixels: (H, W) or (H, W, C), the stored image or a mask of its size.
        nearest: True for masks.

    Raises:
        ValueError: `pixels` are too small for the geometry.
    """
    inner = pixels[_inside(geometry)]
    if inner.shape[:2] != (geometry.height, geometry.width):
        raise ValueError(f"pixels {pixels.shape} are too small for {geometry}")
    box = geometry.part
    part = _resize(inner, box.height, box.width, nearest=nearest)
    if geometry.is_flipped:
        part = np.ascontiguousarray(part[:, ::-1])
    if geometry.crop is None:
        return part
    whole = geometry.source_height, geometry.source_width, *part.shape[2:]
    result = np.zeros(whole, part.dtype)
    result[_slices(box)] = part
    return result


def _inside(geometry: Geometry) -> tuple[slice, slice]:
    return _slices(Box(geometry.top, geometry.left, geometry.height, geometry.width))


def _slices(box: Box) -> tuple[slice, slice]:
    return slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)


def _resize(pixels: Pixels, height: int, width: int, *, nearest: bool) -> Pixels:
    import cv2

    if pixels.shape[:2] == (height, width):
        return pixels.copy()
    source = np.ascontiguousarray(pixels)
    if nearest:
        # INTER_NEAREST samples the corner of a pixel and would shift a mask by up to half a pixel
        # against its image; the exact variant samples the centre.
        result = cv2.resize(source, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
        return result.reshape(height, width, *pixels.shape[2:])
    resized = by_channels(lambda part: _resize_smoothly(part, height, width), source)
    return resized.reshape(height, width, *pixels.shape[2:])


def _resize_smoothly(source: Pixels, height: int, width: int) -> Pixels:
    """Resizes each axis separately: INTER_AREA to shrink it, then INTER_LINEAR to enlarge it."""
    import cv2

    smaller = min(height, source.shape[0]), min(width, source.shape[1])
    if smaller != source.shape[:2]:
        source = cv2.resize(source, smaller[::-1], interpolation=cv2.INTER_AREA)
    if smaller != (height, width):
        source = cv2.resize(source, (width, height), interpolation=cv2.INTER_LINEAR)
    return source
