"""Finds areas of a mask whose colour is of no class.

A blend along an edge is thin and changes from pixel to pixel; compression noise is close to its
class. What is neither is a label that the classes do not name, and nobody may guess it.

Limits: after resampling or JPEG compression, areas of under about 100 (JPEG: 400) pixels and lines
of 1 or 2 pixels cannot be told from blends, nor can a colour within the tolerance of a class.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_prep.masks.blends import Assigned

_MIN_DISTANCE = 12  # levels from the class, at least
_MAX_RANGE = 12  # levels within 3 x 3 pixels
_MAX_SPREAD = 24  # levels between the 5th and the 95th percentile of an area
_MIN_CENTRES = 9  # pixels whose 3 x 3 pixels are uniform
_MIN_PIXELS = 4  # of an area with sharp borders
_MIN_SHARP = 0.9  # share of the pixels around an area with sharp borders that have class colours


@dataclass(frozen=True)
class SolidArea:
    """A connected area of one colour of no class.

    Attributes:
        color: its median colour, C levels.
        num_pixels: number of its pixels.
        row, column: one of its pixels.
    """

    color: tuple[int, ...]
    num_pixels: int
    row: int
    column: int


def find_solid_areas(
    pixels: npt.NDArray[np.uint8], assigned: Assigned, distances: npt.NDArray[np.int64]
) -> list[SolidArea]:
    """Returns the solid areas of no class, the largest first.

    Args:
        pixels: (H, W, C) uint8.
        assigned: of the same mask.
        distances: (H, W) levels by which a pixel exceeds the tolerance of its nearest class, 0
            within it.
    """
    is_odd = ~assigned.is_seed & (distances > 0)
    if not is_odd.any():
        return []
    soft = _areas(pixels, _centres(pixels, is_odd), _MIN_CENTRES, _MAX_SPREAD)
    sharp = _sharp_areas(pixels, assigned, is_odd)
    return sorted([*soft, *sharp], key=lambda area: -area.num_pixels)
