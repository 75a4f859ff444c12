"""Finds areas of a mask whose colour belongs to no class.

A blend along an edge is thin and changes from pixel to pixel, and noise is close to its class.
Any other area is a label that the classes do not name. Three kinds are found:

- soft: at least 9 connected pixels whose neighbours are all similar, of one colour on the whole;
- sharp: at least 4 connected pixels of exactly one colour, 2 x 2 of them in a square, with exact
  class colours around;
- noisy: connected pixels with a square of 8 x 8 pixels that are neither noise nor blends.

In a mask of few colours, which has no noise, sharp areas also count if their colour is within the
tolerance of the class around them, and so do lines of a colour that is no blend of any two classes.

Limits: after resampling, areas of under about 100 pixels (after JPEG compression 400) and lines of
1 or 2 pixels look like blends. Colours about
20 levels apart cannot be distinguished.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_prep.masks.blends import Assignment, Colors, Flags, is_blend

Box = tuple[slice, slice]
"""Rows and columns."""

_MIN_DISTANCE = 12  # levels from the nearest class, at least
_MAX_RANGE = 12  # levels within 3 x 3 pixels
_MAX_SPREAD = 24  # levels between the 5th and the 95th percentile of an area
_MIN_SOFT = 9  # pixels with similar neighbours
_MIN_SHARP = 4  # pixels
_MIN_NOISY = 8  # pixels, the side of a square; JPEG's blocks have this size
_MIN_EXACT = 0.9  # of the pixels around a sharp area
_MAX_LABELS = 1024  # colours of sharp areas of a mask; masks have a few
FEW_COLORS = 8  # unmapped colours of a mask without blends


@dataclass(frozen=True)
class SolidArea:
    """A connected area of one colour of no class.

    Attributes:
        color: its median colour, C levels.
        num_pixels: number of its pixels.
        row, column: its first pixel.
    """

    color: tuple[int, ...]
    num_pixels: int
    row: int
    column: int


def find_solid_areas(
    codes: npt.NDArray[np.integer], values: Colors, colors: Colors, assigned: Assignment
) -> list[SolidArea]:
    """Returns the areas of no class, the largest first.

    Args:
        codes: (H, W), index of the pixel's colour in `values`.
        values: (M, C) distinct colours of the mask, 0..255.
        colors: (K, C) distinct colours of the classes, 0..255.
        assigned: the classes of the same mask.
    """
    if assigned.is_exact.all():
        return []
    is_found = _soft_pixels(codes, values, assigned)
    is_found |= _SharpAreas(codes, values, colors, assigned).pixels()
    is_found |= _noisy_pixels(assigned)
    areas = [_area(codes, values, box, inside) for box, inside in _components(is_found)]
    return sorted(areas, key=lambda area: -area.num_pixels)


def _area(codes: npt.NDArray[np.integer], values: Colors, box: Box, inside: Flags) -> SolidArea:
    rows, columns = np.nonzero(inside)
    colors = values[codes[box][inside]]
    # An existing colour, not a median of each channel on its own.
    middle = np.median(colors, axis=0)
    color = colors[np.abs(colors - middle).sum(axis=1).argmin()]
    row, column = box[0].start + rows[0], box[1].start + columns[0]
    return SolidArea(tuple(color.tolist()), len(rows), int(row), int(column))


def _soft_pixels(codes: npt.NDArray[np.integer], values: Colors, assigned: Assignment) -> Flags:
    """Returns (H, W) bool, the pixels of soft areas."""
    import cv2

    result = np.zeros(codes.shape, bool)
    is_odd = assigned.distances > np.maximum(assigned.tolerances, _MIN_DISTANCE)
    odd = is_odd[codes] & ~assigned.is_seed
    if np.count_nonzero(odd) < _MIN_SOFT:
        return result
    pixels = values.astype(np.uint8)[codes]
    square = np.ones((3, 3), np.uint8)
    ranges = cv2.dilate(pixels, square) - cv2.erode(pixels, square)
    is_flat = (ranges.reshape(*codes.shape, -1) <= _MAX_RANGE).all(axis=2)
    for box, inside in _components(odd & is_flat):
        colors = pixels[box][inside]
        low, high = np.percentile(colors, (5, 95), axis=0)
        if len(colors) >= _MIN_SOFT and (high - low).max() <= _MAX_SPREAD:
            result[box] |= inside
    return result


def _noisy_pixels(assigned: Assignment) -> Flags:
    """Returns (H, W) bool, the pixels of noisy areas."""
    result = np.zeros(assigned.index.shape, bool)
    if np.count_nonzero(assigned.is_unexplained) >= _MIN_NOISY**2:
        for box, inside in _components(assigned.is_unexplained):
            if _has_square(inside, _MIN_NOISY):
                result[box] |= inside
    return result


def _equal_squares(codes: npt.NDArray[np.integer]) -> Flags:
    """Returns (H, W) bool, the pixels in squares of 2 x 2 pixels of one colour."""
    across = codes[:, 1:] == codes[:, :-1]
    down = codes[1:] == codes[:-1]
    square = across[1:] & across[:-1] & down[:, 1:]
    result = np.zeros(codes.shape, bool)
    for rows in (slice(None, -1), slice(1, None)):
        for columns in (slice(None, -1), slice(1, None)):
            result[rows, columns] |= square
    return result


class _SharpAreas:
    """Finds the sharp areas of one mask; see `find_solid_areas` for the arguments."""

    def __init__(
        self,
        codes: npt.NDArray[np.integer],
        values: Colors,
        colors: Colors,
        assigned: Assignment,
    ) -> None:
        self._codes, self._values, self._colors = codes, values, colors
        self._assigned = assigned

    def pixels(self) -> Flags:
        """Returns (H, W) bool, the pixels of sharp areas."""
        codes, is_off = self._codes, ~self._assigned.is_exact
        result = np.zeros(codes.shape, bool)
        cores = is_off
        if np.count_nonzero(np.bincount(codes[is_off])) > FEW_COLORS:
            # JPEG compression makes squares of one colour, but close to a class.
            is_far = self._assigned.distances > self._assigned.tolerances
            cores = _equal_squares(codes) & is_far[codes]
        if np.count_nonzero(np.bincount(codes[cores])) > _MAX_LABELS:
            return cores  # an enlarged photograph: the time for each of its colours would be large
        for box, merged in _components(cores):
            here = codes[box]
            for code in np.unique(here[merged]):
                for inner, inside in _components(merged & (here == code)):
                    place = _nested(box, inner)
                    if self._is_label(place, inside, int(code)):
                        result[place] |= inside
        return self._completed(result)

    def _completed(self, found: Flags) -> Flags:
        """Returns the areas with all connected pixels of the same colour."""
        result = found.copy()
        for code in np.unique(self._codes[found]):
            for box, inside in _components(self._codes == code):
                if (found[box] & inside).any():
                    result[box] |= inside
        return result

    def _is_label(self, place: Box, inside: Flags, code: int) -> bool:
        """Returns whether an area of colour `code` is a label, not noise or a blend."""
        import cv2

        if np.count_nonzero(inside) < _MIN_SHARP:
            return False
        assigned = self._assigned
        square = np.ones((3, 3), np.uint8)
        ring = cv2.dilate(inside.view(np.uint8), square).view(bool)
        ring &= self._codes[place] != code
        num_around = np.count_nonzero(ring)
        around = assigned.nearest[self._codes[place][ring & assigned.is_exact[place]]]
        if len(around) < _MIN_EXACT * num_around:
            return False
        if assigned.distances[code] <= assigned.tolerances[code]:
            num_own = np.count_nonzero(around == assigned.nearest[code])
            return bool(num_own >= _MIN_EXACT * num_around > 0)
        value = self._values[code]
        if not _has_square(inside, 2):
            # A line may be a blend with a class that is outside of the mask.
            return not is_blend(value, self._colors)
        return _has_square(inside, 4) or not is_blend(value, self._colors[np.unique(around)])


def _has_square(inside: Flags, side: int) -> bool:
    import cv2

    square = np.ones((side, side), np.uint8)
    # Outside of the area's box there is nothing; OpenCV's default border would continue the area.
    kept = cv2.erode(
        inside.view(np.uint8), square, borderType=cv2.BORDER_CONSTANT, borderValue=(0,)
    )
    return bool(kept.any())


def _components(flags: Flags) -> Iterator[tuple[Box, Flags]]:
    """Yields the bounding box of each connected part with a margin of 1 pixel, and its pixels."""
    import cv2

    _, labels, stats, _ = cv2.connectedComponentsWithStats(flags.view(np.uint8), connectivity=8)
    for label, (left, top, width, height, _) in enumerate(stats.tolist()):
        if label:
            rows = slice(max(top - 1, 0), top + height + 1)
            columns = slice(max(left - 1, 0), left + width + 1)
            yield (rows, columns), labels[rows, columns] == label


def _nested(outer: Box, inner: Box) -> Box:
    """Returns the box `inner`, which is relative to `outer`, relative to the mask."""
    rows, columns = (
        slice(out.start + into.start, out.start + into.stop)
        for out, into in zip(outer, inner, strict=True)
    )
    return rows, columns
