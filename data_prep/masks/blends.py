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
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Colors = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

# Measured on 35 masks of seven public datasets, enlarged, reduced and compressed as JPEG. With a
# limit of 40 levels from the segment, JPEG leaves twice as many wrong pixels; with 80, more small
# objects are lost.
_MAX_FROM_SEGMENT = 60.0  # levels, Euclidean
_BLEND_MARGIN = 10.0  # levels by which a segment may be farther than a class within its tolerance
_MUCH_NEARER = 2.5  # a class that is nearer than those nearby by this factor is kept
_MAX_TOLERANCE = 32  # levels of the largest channel difference
_MIN_SIMILAR = 6  # of 3 x 3 pixels, the pixel itself included
_WINDOWS = (5, 9)  # sides of the neighbourhood, pixels
MARGIN = 6  # pixels around the unmapped ones that decide about them
_MAX_ENDS = 16  # classes nearby whose segments are compared; with more, the nearest is used
_MAX_DISTANCES = 2**18  # values compared at once: 6 MB


@dataclass(frozen=True)
class Assignment:
    """The class of each pixel of a mask, and how certain it is.

    Attributes:
        index: (H, W) int16, index of the colour that the pixel gets.
        is_exact: (H, W) bool, the pixel has exactly that colour.
        is_seed: (H, W) bool, exact pixels, and noise around a class colour.
        is_unexplained: (H, W) bool, pixels that are neither seeds nor blends.
        nearest: (M,) index of the nearest class colour of each distinct colour of the mask.
        distances: (M,) largest channel difference to that colour, levels.
        tolerances: (M,) largest difference that noise may have.
    """

    index: npt.NDArray[np.int16]
    is_exact: Flags
    is_seed: Flags
    is_unexplained: Flags
    nearest: Colors
    distances: Colors
    tolerances: Colors


def tolerances_of(colors: Colors) -> Colors:
    """Returns how far noise may be from each of `colors` (K, C): (K,) levels."""
    differences = np.abs(colors[:, np.newaxis] - colors).max(axis=2)
    np.fill_diagonal(differences, 4 * _MAX_TOLERANCE)
    return np.minimum(_MAX_TOLERANCE, differences.min(axis=1) // 4)


def nearest_of(values: Colors, colors: Colors) -> tuple[Colors, Colors]:
    """Returns the index of the nearest of `colors` (K, C) for each of `values` (M, C).

    Also returns the largest channel difference to that colour, (M,). The distance is the sum of
    squares; if several colours are equally near, the first is used.
    """
    nearest = np.zeros(len(values), np.int64)
    block = max(1, _MAX_DISTANCES // len(colors))
    for start in range(0, len(values), block):
        difference = values[start : start + block, np.newaxis] - colors
        nearest[start : start + block] = (difference**2).sum(axis=2).argmin(axis=1)
    return nearest, np.abs(values - colors[nearest]).max(axis=1, initial=0)


def assign_classes(codes: npt.NDArray[np.integer], values: Colors, colors: Colors) -> Assignment:
    """Returns the class of each pixel.

    Args:
        codes: (H, W), index of the pixel's colour in `values`.
        values: (M, C) distinct colours of the mask, 0..255.
        colors: (K, C) distinct colours of the classes, 0..255.
    """
    nearest, distances = nearest_of(values, colors)
    tolerances = tolerances_of(colors)[nearest]
    index = nearest.astype(np.int16)[codes]
    is_exact = (distances == 0)[codes]
    is_near = distances <= tolerances
    is_seed = is_exact | _noise(index, is_near[codes], is_exact)
    is_unexplained = np.zeros(index.shape, bool)
    if not is_seed.all():
        where = np.nonzero(~is_seed)
        nearby = _Nearby(np.where(is_seed, index, -1), where, len(colors))
        rest = codes[where]
        found, is_open = _explain(values[rest], nearest[rest], is_near[rest], nearby, colors)
        index[where] = found
        is_unexplained[where] = is_open
    return Assignment(index, is_exact, is_seed, is_unexplained, nearest, distances, tolerances)


def is_blend(value: Colors, ends: Colors) -> bool:
    """Returns whether the colour `value` (C,) is between two of `ends` (P, C)."""
    if len(ends) < 2:
        return False
    return bool(_nearer_end(value[np.newaxis], ends)[1][0] <= _MAX_FROM_SEGMENT)


def _noise(index: npt.NDArray[np.int16], is_near: Flags, is_exact: Flags) -> Flags:
    """Returns the inexact pixels near a class colour and among pixels of that class."""
    import cv2

    is_noise = np.zeros(index.shape, bool)
    candidates = is_near & ~is_exact
    for class_index in np.flatnonzero(np.bincount(index[candidates])):
        of_class = (index == class_index) & is_near
        similar = cv2.boxFilter(
            of_class.view(np.uint8), -1, (3, 3), normalize=False, borderType=cv2.BORDER_REPLICATE
        )
        is_noise |= of_class & (similar >= _MIN_SIMILAR)
    return is_noise & candidates


class _Nearby:
    """Finds the classes that have seeds around each of N pixels."""

    def __init__(
        self,
        seeds: npt.NDArray[np.int16],
        where: tuple[npt.NDArray[np.integer], ...],
        num_classes: int,
    ) -> None:
        self._seeds, self._where, self._num_classes = seeds, where, num_classes

    def within(self, side: int) -> npt.NDArray[np.uint8]:
        """Returns the classes with a seed in a square of `side` pixels: (N, K / 8) packed bits."""
        import cv2

        square = np.ones((side, side), np.uint8)
        bits = np.zeros((len(self._where[0]), -(-self._num_classes // 8)), np.uint8)
        for class_index in np.flatnonzero(np.bincount(self._seeds[self._seeds >= 0])):
            of_class = (self._seeds == class_index).view(np.uint8)
            has_seed = cv2.dilate(of_class, square)[self._where]
            bits[:, class_index // 8] |= has_seed * np.uint8(1 << 7 - class_index % 8)
        return bits


def _has_bit(bits: npt.NDArray[np.uint8], index: Colors) -> Flags:
    """Returns whether bit `index[i]` of row i of `bits` is set, (N,)."""
    found: Flags = (bits[np.arange(len(bits)), index // 8] >> (7 - index % 8) & 1).astype(bool)
    return found


def _explain(
    values: Colors, nearest: Colors, is_near: Flags, nearby: _Nearby, colors: Colors
) -> tuple[npt.NDArray[np.int16], Flags]:
    """Returns the class of each of N pixels, and whether the neighbourhood leaves it open.

    Args:
        values: (N, C) colours of the pixels.
        nearest: (N,) the class of the nearest colour.
        is_near: (N,) the colour is within the tolerance of that class.
    """
    result = nearest.astype(np.int16)
    is_open = np.ones(len(values), bool)
    for side in _WINDOWS:
        bits = nearby.within(side)
        is_kept = _has_bit(bits, nearest)
        is_open &= ~(is_kept & is_near)
        left = np.flatnonzero(is_open)
        if not len(left):
            break
        patterns, which = np.unique(bits[left], axis=0, return_inverse=True)
        order = np.argsort(which.ravel(), kind="stable")
        ends = np.cumsum(np.bincount(which.ravel(), minlength=len(patterns)))
        for pattern, chosen in zip(patterns, np.split(left[order], ends[:-1]), strict=True):
            present = np.flatnonzero(np.unpackbits(pattern, count=len(colors)))
            found, is_blend = _between(values[chosen], is_near[chosen], present, colors)
            is_new = (found >= 0) & ~is_kept[chosen]
            result[chosen[is_new]] = found[is_new]
            is_open[chosen[is_new | is_blend]] = False
    return result, is_open


def _between(
    values: Colors, is_near: Flags, present: Colors, colors: Colors
) -> tuple[Colors, Flags]:
    """Returns the class of each blend of the classes `present`, and whether it is between two.

    The class is -1 for colours that these classes do not explain.

    Args:
        values: (N, C) colours.
        is_near: (N,) a colour is within the tolerance of its nearest class.
        present: (P,) indices of classes.
    """
    result, is_blend = np.full(len(values), -1), np.zeros(len(values), bool)
    if len(present) < 2:
        return result, is_blend
    block = max(1, _MAX_DISTANCES // max(len(colors), len(present) ** 2))
    for start in range(0, len(values), block):
        some = slice(start, start + block)
        nearer, distance = _nearer_end(values[some], colors[present])
        squares = ((values[some, np.newaxis] - colors) ** 2).sum(axis=2)
        own = np.sqrt(squares.min(axis=1))
        among = squares[:, present]
        # Compared with a segment, a class within its tolerance is preferred.
        is_own = is_near[some] & (distance > own + _BLEND_MARGIN)
        is_blend[some] = (distance <= _MAX_FROM_SEGMENT) & ~is_own
        is_own |= ~is_blend[some] & (_MUCH_NEARER * own < np.sqrt(among.min(axis=1)))
        found = present[np.where(is_blend[some], nearer, among.argmin(axis=1))]
        result[some] = np.where(is_own, -1, found)
    return result, is_blend


def _nearer_end(values: Colors, ends: Colors) -> tuple[Colors, npt.NDArray[np.float64]]:
    """Returns the nearer end of the nearest segment between two of `ends` (P, C), and its distance.

    Args:
        values: (N, C) colours.
    """
    if len(ends) > _MAX_ENDS:
        return np.zeros(len(values), np.int64), np.full(len(values), np.inf)
    first, second = np.triu_indices(len(ends), 1)
    start = ends[first].astype(np.float64)  # (pairs, C)
    along = ends[second] - start
    offset = values[:, np.newaxis] - start  # (N, pairs, C)
    position = ((offset * along).sum(axis=2) / (along**2).sum(axis=1)).clip(0, 1)
    distance = np.linalg.norm(offset - position[:, :, np.newaxis] * along, axis=2)
    best = distance.argmin(axis=1)
    rows = np.arange(len(values))
    nearer: Colors = np.where(position[rows, best] < 0.5, first[best], second[best])
    return nearer, distance[rows, best]
