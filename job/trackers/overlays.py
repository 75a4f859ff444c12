"""Draws a case small, for a tracker: the contours of truth and prediction, as JPEG.

The report has larger images of a few cases. These are written after every epoch, so they are quick
and small.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.imaging.pixels import shown_channels
from data_prep.masks.color_map import ClassColor

Pixels = npt.NDArray[np.uint8]

_SIDE = 384  # of each of the two images at most, pixels
_MARGIN = 8
_LINE, _EDGE = 2, 4  # widths of a contour and of the contrasting line below it, pixels
_DARK, _BRIGHT = (0, 0, 0), (255, 255, 255)
_QUALITY = 85  # percent


def overlay_jpeg(
    image: npt.NDArray[Any], prediction: Pixels, truth: Pixels | None, classes: Sequence[ClassColor]
) -> tuple[int, int, bytes]:
    """Returns height, width and JPEG of an image with contours: at the left the truth, if known.

    Contours have the colours of the classes, on a wider line that is dark or bright.

    Args:
        image: (H, W, C), uint8 or uint16.
        prediction, truth: (H, W) class ids.
    """
    import cv2

    longest = max(prediction.shape)
    # Small images are enlarged, so that a contour does not cover what it surrounds.
    scale = _SIDE / longest if longest > _SIDE else _SIDE // longest
    size = tuple(max(1, round(side * scale)) for side in reversed(prediction.shape))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    canvas: Pixels = np.asarray(cv2.resize(_as_rgb(image), size, interpolation=method))
    parts = [canvas] if truth is None else [canvas, canvas.copy()]
    masks = [prediction] if truth is None else [truth, prediction]
    for part, ids in zip(parts, masks, strict=True):
        small = cv2.resize(ids, size, interpolation=cv2.INTER_NEAREST_EXACT)
        for each in classes:
            if each.id != 0:
                _draw_contours(part, np.asarray(small == each.id, np.uint8), each.color)
    if truth is not None:
        parts.insert(1, np.full((canvas.shape[0], _MARGIN, 3), _BRIGHT, np.uint8))
    whole = np.concatenate(parts, axis=1)
    # With the colours at full resolution: the lines are narrow.
    sampling = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    options = [cv2.IMWRITE_JPEG_QUALITY, _QUALITY, *sampling]
    is_written, data = cv2.imencode(".jpg", whole[..., ::-1], options)
    assert is_written  # noqa: S101 - it fails for no array of this kind
    return *whole.shape[:2], data.tobytes()


def _draw_contours(canvas: Pixels, region: Pixels, color: Sequence[int]) -> None:
    import cv2

    contours, _ = cv2.findContours(region, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    is_dark = float(np.dot(color, (0.299, 0.587, 0.114))) < 96
    cv2.drawContours(canvas, contours, -1, _BRIGHT if is_dark else _DARK, _EDGE)
    cv2.drawContours(canvas, contours, -1, tuple(map(int, color)), _LINE)


def _as_rgb(image: npt.NDArray[Any]) -> Pixels:
    """Returns (H, W, 3) uint8; 16-bit images are scaled to their own range."""
    pixels = shown_channels(image)
    if pixels.dtype != np.uint8:
        low, high = float(pixels.min()), float(pixels.max())
        pixels = ((pixels - low) * (255.0 / max(high - low, 1.0))).round().astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
