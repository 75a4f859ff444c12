"""Finds areas of a mask whose colour belongs to no class.

A blend along an edge is thin and changes from pixel to pixel, and noise is close to its class.
Any other area is a label that the classes do not name. Three kinds are found:

- soft: at least 9 connected pixels whose neighbours are all similar, of one colour on the whole;
- sharp: at least 4 connected pixels of exactly one colour, 2 x 2 of them in a square, with exact
  class colours around;
- noisy: connected pixels with a square of 8 x 8 pixels that are neither noise nor blends.

A sharp area with a square of 3 x 3 pixels needs no class colours around if its colour is no blend
of any two classes.

A mask of few colours has no noise, unless it is a JPEG file. There, 4 connected pixels also count
if their colour is no blend of any two classes. If the edges between its classes are sharp but for
one or two places, it has no blends either, and any 4 connected pixels count. Else the colours of
areas may also be within the tolerance of a class: of the class around them, or of one whose own
colour occurs in the mask. A mask without that colour may have the class in a slightly different
one.

Limits: after resampling, areas of under about 100 pixels (after JPEG compression 400) and lines of
1 or 2 pixels look like blends. Colours about 20 levels apart cannot be distinguished.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from data_prep.masks.blends import Assignment, Box, is_blend
from data_prep.masks.coding import Codes, Flags, Shades, lookup, row_blocks

_MIN_DISTANCE = 12  # levels from the nearest class, at least
_MAX_RANGE = 12  # levels within 3 x 3 pixels
_MAX_SPREAD = 24  # levels between the 5th and the 95th percentile of an area
_MIN_SOFT = 9  # pixels with similar neighbours
_MIN_SHARP = 4  # pixels
_MIN_NOISY = 8  # pixels, the side of a square; JPEG's blocks have this size
_MIN_EXACT = 0.9  # of the pixels around a sharp area
_MAX_LABELS = 1024  # colours of sharp areas of a mask; masks have a few
_SHARP_EDGES = 4  # sharp edges for each unmapped pixel between two classes, in a clean mask
_MIN_SHARP_EDGES = 16  # pairs of pixels
_MAX_BLENDS = 2  # connected parts; an area on an edge between two classes looks like one
_NEARBY = 9  # pixels, side of the square in which a pixel between two classes has both
FEW_COLORS = 8  # unmapped colours of a mask of few colours


@dataclass(frozen=True)
class SolidArea:
    """A connected area of one colour of no class.

    Attributes:
        code: its median colour, as an index into the colours of the mask.
        num_pixels: number of its pixels.
        row, column: its first pixel.
    """

    code: int
    num_pixels: int
    row: int
    column: int


Kind = Literal["clean", "few", "noisy"]
"""clean: few colours and sharp edges; few: few colours; noisy: others, and JPEG files."""


def kind_of(codes: Codes, shades: Shades) -> Kind:
    """Returns the kind of a whole mask of few colours.

    Most edges between the classes of a clean mask have pixels of both classes side by side.
    """
    import cv2

    classes = np.where(shades.is_exact, shades.nearest, np.int16(-1))
    index = lookup(classes, codes)
    num_sharp = 0
    for one, other in ((index[1:], index[:-1]), (index[:, 1:], index[:, :-1])):
        num_sharp += int(np.count_nonzero((one != other) & (one >= 0) & (other >= 0)))
    square = np.ones((_NEARBY,) * 2, np.uint8)
    highest = cv2.dilate(index, square)
    lowest = -cv2.dilate(np.where(index < 0, np.int16(-1 << 14), -index), square)
    num_between = int(np.count_nonzero((index < 0) & (highest >= 0) & (highest != lowest)))
    is_sharp = num_sharp >= max(_MIN_SHARP_EDGES, _SHARP_EDGES * num_between)
    return "clean" if is_sharp else "few"


def find_solid_areas(
    codes: Codes,
    shades: Shades,
    assigned: Assignment,
    counts: npt.NDArray[np.integer],
    kind: Kind,
) -> list[SolidArea]:
    """Returns the areas of no class, the largest first.

    Args:
        codes: (H, W), index of the pixel's colour in `shades`: the part of a mask with all unmapped
            pixels.
        assigned: the classes of the same pixels.
        counts: (M,) pixels of each colour in the whole mask.
        kind: of the whole mask.
    """
    if assigned.is_exact.all():
        return []
    if kind == "clean" and _num_blends(assigned) <= _MAX_BLENDS:
        by_color = _areas_by_color(codes, shades, ~assigned.is_exact)
        return sorted(by_color, key=lambda area: -area.num_pixels)
    is_found = _soft_pixels(codes, shades, assigned)
    num_exact = np.zeros(len(shades.colors), np.int64)
    np.add.at(num_exact, shades.nearest[shades.is_exact], counts[shades.is_exact])
    is_there = num_exact >= _MIN_SOFT if kind != "noisy" else None
    is_found |= _SharpAreas(codes, shades, assigned, is_there).pixels()
    is_found |= _noisy_pixels(assigned)
    areas = [_area(codes, shades, box, inside) for box, inside in _components(is_found, 1)]
    return sorted(areas, key=lambda area: -area.num_pixels)


def _num_blends(assigned: Assignment) -> int:
    """Returns the number of connected parts that are explained as blends."""
    import cv2

    flags = ~(assigned.is_seed | assigned.is_unexplained)
    return cv2.connectedComponents(flags.view(np.uint8), connectivity=8)[0] - 1


def _areas_by_color(codes: Codes, shades: Shades, flags: Flags) -> Iterator[SolidArea]:
    """Yields the areas of each colour in connected parts of `flags` that are not tiny."""
    for box, merged in _components(flags, _MIN_SHARP):
        here = codes[box]
        for code in np.unique(here[merged]):
            for inner, inside in _components(merged & (here == code), 1):
                yield _area(codes, shades, _nested(box, inner), inside)


def _area(codes: Codes, shades: Shades, box: Box, inside: Flags) -> SolidArea:
    own = codes[box][inside]
    # An existing colour, not a median of each channel on its own: the first of the nearest ones.
    distance = np.zeros(len(shades.values), np.float32)
    for channel in shades.values.T:
        distance += np.abs(channel - np.float32(np.median(lookup(channel, own[:, np.newaxis]))))
    distance[~_is_used(own, len(distance))] = np.inf
    is_nearest = lookup(distance == distance.min(), own[:, np.newaxis])
    code = int(own[is_nearest.argmax()])
    place = int(inside.argmax())
    row, column = divmod(place, inside.shape[1])
    return SolidArea(code, len(own), box[0].start + row, box[1].start + column)


def _is_used(codes: npt.NDArray[np.integer], number: int) -> Flags:
    """Returns which of `number` colours occur in `codes`, (number,)."""
    used = np.zeros(number, bool)
    used[codes] = True
    return used


def _soft_pixels(codes: Codes, shades: Shades, assigned: Assignment) -> Flags:
    """Returns (H, W) bool, the pixels of soft areas."""
    result = np.zeros(codes.shape, bool)
    is_odd = shades.distances > np.maximum(shades.tolerances, _MIN_DISTANCE)
    odd = lookup(is_odd, codes) & ~assigned.is_seed
    if np.count_nonzero(odd) < _MIN_SOFT:
        return result
    for rows in row_blocks(codes.shape):
        if odd[rows].any():
            odd[rows] &= _is_flat(codes, shades, rows)
    for box, inside in _components(odd, _MIN_SOFT):
        colors = shades.values[codes[box][inside]]
        low, high = np.percentile(colors, (5, 95), axis=0)
        if (high - low).max() <= _MAX_SPREAD:
            result[box] |= inside
    return result


def _is_flat(codes: Codes, shades: Shades, rows: slice) -> Flags:
    """Returns whether the 3 x 3 pixels around each pixel of `rows` are similar."""
    import cv2

    first, last = max(rows.start - 1, 0), min(rows.stop + 1, len(codes))
    pixels = shades.values[codes[first:last]]
    square = np.ones((3, 3), np.uint8)
    ranges = cv2.dilate(pixels, square) - cv2.erode(pixels, square)
    inside = ranges[rows.start - first : rows.stop - first]
    return np.asarray(cv2.inRange(inside, (0,) * 3, (_MAX_RANGE,) * 3)) > 0


def _noisy_pixels(assigned: Assignment) -> Flags:
    """Returns (H, W) bool, the pixels of noisy areas."""
    result = np.zeros(assigned.index.shape, bool)
    for box, inside in _components(assigned.is_unexplained, _MIN_NOISY**2):
        if _has_square(inside, _MIN_NOISY):
            result[box] |= inside
    return result


def _equal_squares(codes: Codes) -> Flags:
    """Returns (H, W) bool, the pixels in squares of 2 x 2 pixels of one colour."""
    across = codes[:, 1:] == codes[:, :-1]
    square = across[1:] & across[:-1]
    square &= codes[1:, 1:] == codes[:-1, 1:]
    result = np.zeros(codes.shape, bool)
    for rows in (slice(None, -1), slice(1, None)):
        for columns in (slice(None, -1), slice(1, None)):
            result[rows, columns] |= square
    return result


class _SharpAreas:
    """Finds the sharp areas of one mask; see `find_solid_areas` for the other arguments.

    Args:
        is_there: (K,) classes whose own colour occurs in the whole mask; None: it is noisy.
    """

    def __init__(
        self, codes: Codes, shades: Shades, assigned: Assignment, is_there: Flags | None
    ) -> None:
        self._codes, self._shades, self._assigned = codes, shades, assigned
        self._has_few = is_there is not None
        self._is_distinct = shades.is_near & ~shades.is_exact
        if is_there is not None:
            self._is_distinct &= is_there[shades.nearest]

    def pixels(self) -> Flags:
        """Returns (H, W) bool, the pixels of sharp areas."""
        codes, shades = self._codes, self._shades
        result = np.zeros(codes.shape, bool)
        cores = ~self._assigned.is_exact
        if self._has_few:
            result = self._no_blends(cores) | self._near_classes(cores)
        else:
            # JPEG compression makes squares of one colour, but close to a class.
            cores = _equal_squares(codes)
            cores &= lookup(shades.distances > shades.tolerances, codes)
        if self._num_colors(cores) > _MAX_LABELS:
            return cores  # an enlarged photograph: the time for each of its colours would be large
        for box, merged in _components(cores, _MIN_SHARP):
            here = codes[box]
            for code in np.unique(here[merged]):
                for inner, inside in _components(merged & (here == code), _MIN_SHARP):
                    place = _nested(box, inner)
                    if self._is_label(place, inside, int(code)):
                        result[place] |= inside
        return self._completed(result)

    def _no_blends(self, unmapped: Flags) -> Flags:
        """Returns (H, W) bool, unmapped pixels of colours that are no noise and no blends."""
        shades, result = self._shades, np.zeros(unmapped.shape, bool)
        is_odd = ~shades.is_near
        for code in np.flatnonzero(is_odd & _is_used(self._codes[unmapped], len(is_odd))):
            is_odd[code] = not is_blend(shades.values[code], shades.colors)
        for box, inside in _components(unmapped & lookup(is_odd, self._codes), _MIN_SHARP):
            result[box] |= inside
        return result

    def _near_classes(self, unmapped: Flags) -> Flags:
        """Returns (H, W) bool, the inside of areas near a class that also has its own colour."""
        import cv2

        result = np.zeros(unmapped.shape, bool)
        square = np.ones((3, 3), np.uint8)
        is_used = _is_used(self._codes, len(self._is_distinct))
        for code in np.flatnonzero(self._is_distinct & is_used):
            inner = cv2.erode((self._codes == code).view(np.uint8), square).view(bool)
            for box, inside in _components(inner, _MIN_SOFT):
                result[box] |= inside
        return result

    def _num_colors(self, flags: Flags) -> int:
        number = len(self._shades.values)
        used = np.zeros(number, bool)
        for rows in row_blocks(flags.shape):
            used |= _is_used(self._codes[rows][flags[rows]], number)
        return int(np.count_nonzero(used))

    def _completed(self, found: Flags) -> Flags:
        """Returns the areas with all connected pixels of the same colour."""
        if not found.any():
            return found
        result = found.copy()
        for code in np.unique(self._codes[found]):
            for box, inside in _components(self._codes == code, _MIN_SHARP):
                if (found[box] & inside).any():
                    result[box] |= inside
        return result

    def _is_label(self, place: Box, inside: Flags, code: int) -> bool:
        """Returns whether an area of colour `code` is a label, not noise or a blend."""
        import cv2

        assigned, shades = self._assigned, self._shades
        value = shades.values[code]
        is_near = bool(shades.is_near[code])
        may_be_square = not is_near and np.count_nonzero(inside) >= 3 * 3
        if may_be_square and _has_square(inside, 3) and not is_blend(value, shades.colors):
            return True
        square = np.ones((3, 3), np.uint8)
        ring = cv2.dilate(inside.view(np.uint8), square).view(bool)
        ring &= self._codes[place] != code
        num_around = np.count_nonzero(ring)
        around = shades.nearest[self._codes[place][ring & assigned.is_exact[place]]]
        if len(around) < _MIN_EXACT * num_around:
            return False
        if is_near:
            num_own = np.count_nonzero(around == shades.nearest[code])
            is_enclosed = bool(num_own >= _MIN_EXACT * num_around > 0)
            return is_enclosed or (
                self._has_few and bool(self._is_distinct[code]) and _has_square(inside, 2)
            )
        if not _has_square(inside, 2):
            # A line may be a blend with a class that is outside of the mask.
            return not is_blend(value, shades.colors)
        return _has_square(inside, 4) or not is_blend(value, shades.colors[np.unique(around)])


def _has_square(inside: Flags, side: int) -> bool:
    import cv2

    square = np.ones((side, side), np.uint8)
    # Outside of the area's box there is nothing; OpenCV's default border would continue the area.
    kept = cv2.erode(
        inside.view(np.uint8), square, borderType=cv2.BORDER_CONSTANT, borderValue=(0,)
    )
    return bool(kept.any())


def _components(flags: Flags, min_pixels: int) -> Iterator[tuple[Box, Flags]]:
    """Yields the bounding box of each connected part with a margin of 1 pixel, and its pixels.

    Args:
        min_pixels: smaller parts are left out.
    """
    import cv2

    if np.count_nonzero(flags) < min_pixels:
        return
    _, labels, stats, _ = cv2.connectedComponentsWithStats(
        np.ascontiguousarray(flags).view(np.uint8), connectivity=8
    )
    large = np.flatnonzero(stats[1:, cv2.CC_STAT_AREA] >= min_pixels) + 1
    for label in large.tolist():
        left, top, width, height, _ = stats[label].tolist()
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
