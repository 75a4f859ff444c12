"""Finds the breast in a mammogram, so that empty film need not be stored.

The search works on pixels, without files or datasets. The same pixels give the same box, so that
prediction crops an image like preparation. It expects dark film around a bright breast; labels are
not part of the breast, because they are not connected to it.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_prep.imaging.geometry import Box, Geometry, apply_geometry, fit
from data_prep.imaging.pixels import Pixels

Crop = Literal["none", "breast"]
Flip = Literal["none", "left", "right"]

_SEARCH_SIDE = 512  # pixels: the search uses a downscaled image
_TISSUE = 0.04  # of the range between the darkest pixel and the 99.5th percentile
_MARGIN = 0.01  # of the longer side, around the breast


@dataclass(frozen=True)
class Breast:
    """The box around the breast, in pixels, and whether the chest wall is on the left."""

    box: Box
    is_left: bool


def find_breast(image: Pixels) -> Breast | None:
    """Returns the box of the breast, None if all pixels have the same brightness.

    Args:
        image: (H, W, C) uint8 or uint16, larger is brighter.
    """
    import cv2

    height, width = image.shape[:2]
    tissue = _tissue(image)
    _, _, parts, centres = cv2.connectedComponentsWithStats(tissue)
    if len(parts) < 2:
        return None
    largest = 1 + int(np.argmax(parts[1:, cv2.CC_STAT_AREA]))
    left, top, columns, rows = (int(value) for value in parts[largest, :4])
    down, right = height / tissue.shape[0], width / tissue.shape[1]
    margin = round(_MARGIN * max(height, width))
    first_row = max(0, int(top * down) - margin)
    first_column = max(0, int(left * right) - margin)
    end_row = min(height, round((top + rows) * down) + margin)
    end_column = min(width, round((left + columns) * right) + margin)
    box = Box(first_row, first_column, end_row - first_row, end_column - first_column)
    return Breast(box, bool(centres[largest][0] < tissue.shape[1] / 2))


def frame(image: Pixels, *, height: int, width: int, kind: str, crop: Crop, flip: Flip) -> Geometry:
    """Returns the geometry of an image in the stored image of `height` x `width`.

    Args:
        image: (H, W, C) uint8 or uint16.
        kind: "stretch", "pad" or "tile", see `geometry.fit`.
        crop: "breast" removes everything around the breast.
        flip: the side of the chest wall in the stored image.
    """
    found = find_breast(image) if (crop, flip) != ("none", "none") else None
    return fit(
        image.shape[:2],
        (height, width),
        kind=kind,
        crop=found.box if found and crop == "breast" else None,
        is_flipped=found is not None and flip != "none" and found.is_left != (flip == "left"),
    )


def _tissue(image: Pixels) -> np.ndarray:
    """Returns a downscaled mask (h, w) uint8: 1 for pixels brighter than film, without spots."""
    import cv2

    height, width = image.shape[:2]
    scale = min(1.0, _SEARCH_SIDE / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    whole = fit((height, width), size, kind="stretch")
    small = apply_geometry(image, whole, *size, nearest=False).reshape(*size, -1).max(axis=2)
    dark, bright = float(small.min()), float(np.percentile(small, 99.5))
    tissue = (small > dark + _TISSUE * (bright - dark)).astype(np.uint8)
    return cv2.morphologyEx(tissue, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
