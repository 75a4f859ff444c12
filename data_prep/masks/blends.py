"""Gives each pixel of a mask a class: exact colours, noise around a colour, blends along edges.

Resampling and compression change the colours of a mask. A pixel without an exact class colour is
read by its neighbourhood:

1. Noise: a colour within the tolerance of a class, among pixels of that class, gets that class.
   These pixels and the exact ones are the seeds of a class.
2. Blend: if the nearest class has no seed nearby, and the colour is between the colours of two
   classes with seeds nearby, the pixel gets the nearer of these two. A colour within the tolerance
   of a class is a blend only if the two classes explain it about as well.
3. If two or more classes are nearby, the pixel gets the nearest of them, unless its colour is
   within the tolerance of another class.
4. Every other pixel gets the class of the nearest colour. It counts as unexplained, unless it is
   noise or a blend of this class with another one nearby.

So a soft edge between yellow and black is never read as the dark green of a third class.

Blocks of rows are read one after another, each with the rows around it that count.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_prep.masks.coding import Codes, Colors, Flags, Shades, Small, lookup, row_blocks

Box = tuple[slice, slice]
"""Rows and columns."""

# Measured on 35 masks of seven public datasets, enlarged, reduced and compressed as JPEG. With a
# limit of 40 levels from the segment, JPEG leaves twice as many wrong pixels; with 80, more small
# objects are lost.
_MAX_FROM_SEGMENT = 60.0  # levels, Euclidean
_BLEND_MARGIN = 10.0  # levels by which a segment may be farther than a class within its tolerance
_MUCH_NEARER = 2.5  # a class that is nearer than those nearby by this factor is kept
_MIN_SIMILAR = 6  # of 3 x 3 pixels, the pixel itself included
_WINDOW_STEP = 2  # pixels by which the neighbourhood grows: 5 x 5, then 9 x 9
_NUM_WINDOWS = 2
MARGIN = 6  # pixels around the unmapped ones that decide about them
_HALO = 1 + _WINDOW_STEP * _NUM_WINDOWS  # rows: seeds are decided by 3 x 3 pixels
_MAX_ENDS = 16  # classes nearby whose segments are compared; with more, the nearest is used
_MAX_DISTANCES = 2**18  # values compared at once: 6 MB
_WORD = 64  # bits


@dataclass(frozen=True)
class Assignment:
    """The class of each pixel of a mask, and how certain it is.

    Attributes:
        index: (H, W) int16, index of the colour that the pixel gets.
        is_exact: (H, W) bool, the pixel has exactly that colour.
        is_seed: (H, W) bool, exact pixels, and noise around a class colour.
        is_unexplained: (H, W) bool, pixels that are neither seeds nor blends.
    """

    index: Small
    is_exact: Flags
    is_seed: Flags
    is_unexplained: Flags


def assign_classes(codes: Codes, shades: Shades) -> Assignment:
    """Returns the class of each pixel.

    Args:
        codes: (H, W), index of the pixel's colour in `shades`.
    """
    index = lookup(shades.nearest, codes)
    is_exact = lookup(shades.is_exact, codes)
    result = Assignment(index, is_exact, is_exact.copy(), np.zeros(codes.shape, bool))
    for inner, outer in _parts(is_exact):
        # The rows of the halo get what they have when their own block is read.
        part = _assign_part(codes[outer], shades)
        inside = tuple(
            slice(into.start - out.start, into.stop - out.start)
            for into, out in zip(inner, outer, strict=True)
        )
        for whole, some in zip(
            (index, result.is_seed, result.is_unexplained),
            (part.index, part.is_seed, part.is_unexplained),
            strict=True,
        ):
            whole[inner] = some[inside]
    return result


def is_blend(value: npt.NDArray[np.integer], ends: Colors) -> bool:
    """Returns whether the colour `value` (C,) is between two of `ends` (P, C)."""
    if len(ends) < 2:
        return False
    distance = _nearer_end(value[np.newaxis].astype(np.int64), ends[np.newaxis])[1]
    return bool(distance[0] <= _MAX_FROM_SEGMENT)


def _parts(is_exact: Flags) -> Iterator[tuple[Box, Box]]:
    """Yields boxes with all unmapped pixels, and the same boxes with the pixels around them."""
    height, width = is_exact.shape
    for rows in row_blocks(is_exact.shape):
        columns = np.flatnonzero(~is_exact[rows].all(axis=0))
        if len(columns):
            first, last = int(columns[0]), int(columns[-1])
            yield (
                (rows, slice(first, last + 1)),
                (
                    slice(max(rows.start - _HALO, 0), min(rows.stop + _HALO, height)),
                    slice(max(first - _HALO, 0), min(last + 1 + _HALO, width)),
                ),
            )


def _assign_part(codes: Codes, shades: Shades) -> Assignment:
    index = lookup(shades.nearest, codes)
    is_exact, is_near = lookup(shades.is_exact, codes), lookup(shades.is_near, codes)
    is_seed = is_exact | _noise(index, is_near, is_exact)
    is_unexplained = np.zeros(index.shape, bool)
    where = np.nonzero(~is_seed)
    if len(where[0]):
        nearby = _Nearby(np.where(is_seed, index, np.int16(-1)), where, len(shades.colors))
        found, is_open = _explain(codes[where], shades, nearby)
        index[where] = found
        is_unexplained[where] = is_open
    return Assignment(index, is_exact, is_seed, is_unexplained)


def _noise(index: Small, is_near: Flags, is_exact: Flags) -> Flags:
    """Returns the inexact pixels near a class colour and among pixels of that class."""
    import cv2

    is_noise = np.zeros(index.shape, bool)
    candidates = np.flatnonzero(is_near & ~is_exact)
    if not len(candidates):
        return is_noise
    width = index.shape[1] + 2
    near = np.where(is_near, index, np.int16(-1))
    around = cv2.copyMakeBorder(near, 1, 1, 1, 1, cv2.BORDER_REPLICATE).ravel()
    row, column = np.divmod(candidates, index.shape[1])
    first = row * width + column
    own = near.ravel()[candidates]
    similar = np.zeros(len(candidates), np.uint8)
    for down in range(3):
        for right in range(3):
            similar += around[first + (down * width + right)] == own
    is_noise.ravel()[candidates] = similar >= _MIN_SIMILAR
    return is_noise


class _Nearby:
    """Finds the classes that have seeds around each of N pixels.

    Args:
        seeds: (H, W) class of the seeds, -1 elsewhere.
        where: rows and columns of the N pixels.
    """

    def __init__(
        self, seeds: Small, where: tuple[npt.NDArray[np.integer], ...], num_classes: int
    ) -> None:
        self._where, self._num_classes = where, num_classes
        self._words: list[npt.NDArray[np.integer]] = []
        for first in range(0, num_classes, _WORD):
            number = min(_WORD, num_classes - first)
            table = np.zeros(num_classes + 1, np.uint64)  # the last one for -1
            table[first : first + number] = np.uint64(1) << np.arange(number, dtype=np.uint64)
            size = next(size for size in (8, 16, 32, 64) if number <= size)
            self._words.append(table.astype(f"u{size // 8}")[seeds])

    def grow(self) -> npt.NDArray[np.integer]:
        """Returns the classes with a seed in the next larger square: bits of (N, K / 64) words."""
        self._words = [_spread(_spread(word).T).T for word in self._words]
        return np.stack([word[self._where] for word in self._words], axis=1)

    def has(self, keys: npt.NDArray[np.integer], index: npt.NDArray[np.integer]) -> Flags:
        """Returns whether class `index[i]` is in row i of `keys`, (N,)."""
        words = keys[np.arange(len(keys)), index // _WORD]
        return (words >> (index % _WORD).astype(words.dtype) & words.dtype.type(1)).astype(bool)

    def by_number(
        self, keys: npt.NDArray[np.integer]
    ) -> Iterator[tuple[npt.NDArray[np.intp], Colors]]:
        """Yields the rows of `keys` with P classes: the rows (n,) and their classes (n, P).

        P is 2 or more.
        """
        if keys.shape[1] == 1:
            patterns, which = np.unique(keys[:, 0], return_inverse=True)
            patterns = patterns[:, np.newaxis]
        else:
            patterns, which = np.unique(keys, axis=0, return_inverse=True)
        classes = np.arange(self._num_classes)
        has = np.stack([self.has(patterns, np.full(len(patterns), i)) for i in classes], axis=1)
        numbers = has.sum(axis=1)
        number_of_row = numbers[which.ravel()]
        place = np.zeros(len(patterns), np.int64)
        for number in np.unique(numbers[numbers >= 2]).tolist():
            chosen = np.flatnonzero(numbers == number)
            present = np.nonzero(has[chosen])[1].reshape(-1, number)
            place[chosen] = np.arange(len(chosen))
            rows = np.flatnonzero(number_of_row == number)
            yield rows, present[place[which.ravel()[rows]]]


def _spread(bits: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
    """Returns the bits of each pixel (H, W) together with those up to two rows away."""
    rim = np.zeros((_WINDOW_STEP, bits.shape[1]), bits.dtype)
    padded = np.concatenate([rim, bits, rim])
    two = padded[1:] | padded[:-1]
    four = two[2:] | two[:-2]
    five: npt.NDArray[np.integer] = four[:-1] | padded[4:]
    return five


def _explain(
    codes: npt.NDArray[np.integer], shades: Shades, nearby: _Nearby
) -> tuple[Small, Flags]:
    """Returns the class of each of N pixels, and whether the neighbourhood leaves it open.

    Args:
        codes: (N,) indices of the pixels' colours.
    """
    nearest, is_near = shades.nearest[codes], shades.is_near[codes]
    result = nearest.copy()
    is_open = np.ones(len(codes), bool)
    for _ in range(_NUM_WINDOWS):
        keys = nearby.grow()
        is_kept = nearby.has(keys, nearest)
        is_open &= ~(is_kept & is_near)
        left = np.flatnonzero(is_open)
        if not len(left):
            break
        for rows, present in nearby.by_number(keys[left]):
            chosen = left[rows]
            found, is_blend = _between(codes[chosen], shades, present)
            is_new = (found >= 0) & ~is_kept[chosen]
            result[chosen[is_new]] = found[is_new]
            is_open[chosen[is_new | is_blend]] = False
    # The others keep the nearest colour, even if only one class is nearby. With that class, up to
    # half of the wrong pixels of JPEG masks are right, but two to five times as many small objects
    # are lost, and thin lines with them.
    return result, is_open


def _between(
    codes: npt.NDArray[np.integer], shades: Shades, present: Colors
) -> tuple[Small, Flags]:
    """Returns the class of each blend of the classes `present`, and whether it is between two.

    The class is -1 for colours that these classes do not explain.

    Args:
        codes: (N,) indices of colours.
        present: (N, P) indices of two or more classes.
    """
    result, is_blend = np.full(len(codes), -1, np.int16), np.zeros(len(codes), bool)
    block = max(1, _MAX_DISTANCES // present.shape[1] ** 2)
    for start in range(0, len(codes), block):
        some = slice(start, start + block)
        code = codes[some]
        values = shades.values[code].astype(np.int64)
        ends = shades.colors[present[some]]
        if ends.shape[1] <= _MAX_ENDS:
            nearer, distance = _nearer_end(values, ends)
        else:
            nearer, distance = np.zeros(len(ends), np.int64), np.full(len(ends), np.inf)
        own = np.sqrt(((values - shades.colors[shades.nearest[code]]) ** 2).sum(axis=1))
        among = ((values[:, np.newaxis] - ends) ** 2).sum(axis=2)
        # Compared with a segment, a class within its tolerance is preferred.
        is_own = shades.is_near[code] & (distance > own + _BLEND_MARGIN)
        is_blend[some] = (distance <= _MAX_FROM_SEGMENT) & ~is_own
        is_own |= ~is_blend[some] & (_MUCH_NEARER * own < np.sqrt(among.min(axis=1)))
        place = np.where(is_blend[some], nearer, among.argmin(axis=1))
        found = np.take_along_axis(present[some], place[:, np.newaxis], axis=1)[:, 0]
        result[some] = np.where(is_own, -1, found)
    return result, is_blend


def _nearer_end(values: Colors, ends: Colors) -> tuple[Colors, npt.NDArray[np.float64]]:
    """Returns the nearer end of the nearest segment between two of P ends, and its distance.

    Args:
        values: (N, C) colours.
        ends: (N, P, C) the ends for each colour.
    """
    first, second = np.triu_indices(ends.shape[1], 1)
    start = ends[:, first].astype(np.float64)  # (N, pairs, C)
    along = ends[:, second] - start
    offset = values[:, np.newaxis] - start
    position = ((offset * along).sum(axis=2) / (along**2).sum(axis=2)).clip(0, 1)
    distance = np.linalg.norm(offset - position[:, :, np.newaxis] * along, axis=2)
    best = distance.argmin(axis=1)
    rows = np.arange(len(values))
    nearer: Colors = np.where(position[rows, best] < 0.5, first[best], second[best])
    return nearer, distance[rows, best]
