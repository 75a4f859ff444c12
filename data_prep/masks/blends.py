"""Gives each pixel of a mask a class: exact colours, noise around a colour, blends along edges.

Resampling and compression change the colours of a mask. A pixel that has no class colour is read by
its neighbourhood:

1. Noise: a colour within the tolerance of a class, among pixels of that class, is that class. Such
   pixels and those of exact colours are the seeds of a class.
2. Blend: if the nearest class has no seed nearby, but the colour is between those of two classes
   that have seeds nearby, the pixel gets the nearer of these two. With three or more classes
   nearby, it gets the nearest of them.
3. Else the pixel gets the nearest class and counts as unexplained.

So a soft edge between yellow and black is never read as the dark green of a third class.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Plane = npt.NDArray[np.uint8]
Colors = npt.NDArray[np.int64]

_MAX_TOLERANCE = 32  # levels of the largest channel difference
_MIN_SIMILAR = 6  # of 3 x 3 pixels, the pixel itself included
_WINDOWS = (5, 9)  # sides of the neighbourhood, pixels
_MAX_FROM_SEGMENT = 40.0
_MAX_DISTANCES = 2**18  # colours x classes compared at once: 6 MB


@dataclass(frozen=True)
class Assigned:
    """The classes of the pixels of one mask, and its unmapped pixels.

    Attributes:
        index: (H, W) int16, which of the K colours each pixel gets.
        is_exact: (H, W) bool, whether a pixel has exactly that colour.
        is_seed: (H, W) bool, exact pixels and noise around a class colour.
        is_unexplained: (H, W) bool, pixels that got the nearest class for want of a better reason.
    """

    index: npt.NDArray[np.int16]
    is_exact: npt.NDArray[np.bool_]
    is_seed: npt.NDArray[np.bool_]
    is_unexplained: npt.NDArray[np.bool_]


def tolerances_of(colors: Colors) -> npt.NDArray[np.int64]:
    """Returns how far noise may be from each of `colors` (K, C), (K,) levels."""
    differences = np.abs(colors[:, np.newaxis] - colors).max(axis=2)
    np.fill_diagonal(differences, 4 * _MAX_TOLERANCE)
    return np.minimum(_MAX_TOLERANCE, differences.min(axis=1) // 4)


def nearest_of(values: Colors, colors: Colors) -> tuple[Colors, Colors]:
    """Returns the index of the nearest of `colors` (K, C) for each of `values` (M, C).

    Also returns the largest channel difference to that colour, (M,). Nearest is the least sum of
    squares; of equally near colours, the first.
    """
    nearest = np.zeros(len(values), np.int64)
    block = max(1, _MAX_DISTANCES // len(colors))
    for start in range(0, len(values), block):
        difference = values[start : start + block, np.newaxis] - colors
        nearest[start : start + block] = (difference**2).sum(axis=2).argmin(axis=1)
    return nearest, np.abs(values - colors[nearest]).max(axis=1, initial=0)


def assign_classes(codes: npt.NDArray[np.int64], values: Colors, colors: Colors) -> Assigned:
    """Returns the class of each pixel.

    Args:
        codes: (H, W), which of `values` each pixel has.
        values: (M, C) distinct colours of the mask, 0..255.
        colors: (K, C) colours of the classes, distinct, 0..255.
    """
    nearest, distances = nearest_of(values, colors)
    is_near = distances <= tolerances_of(colors)[nearest]
    index = nearest.astype(np.int16)[codes]
    is_exact = (distances == 0)[codes]
    is_seed = is_exact | _is_noise(index, is_near[codes], is_exact)
    is_unexplained = np.zeros(index.shape, bool)
    if not is_seed.all():
        rows, columns = np.nonzero(~is_seed)
        rest = codes[rows, columns]
        nearby = _Nearby(index, is_seed, (rows, columns), len(colors))
        found, is_explained = _explained(values[rest], nearest[rest], nearby, colors)
        index[rows, columns] = found
        is_unexplained[rows, columns] = ~is_explained
    return Assigned(index, is_exact, is_seed, is_unexplained)


def _is_noise(
    index: npt.NDArray[np.int16], is_near: npt.NDArray[np.bool_], is_exact: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """Returns which pixels near a class colour are among pixels of that class."""
    import cv2

    is_noise = np.zeros(index.shape, bool)
    candidates = is_near & ~is_exact
    for class_index in np.unique(index[candidates]):
        of_class = (index == class_index) & is_near
        similar = cv2.boxFilter(
            of_class.view(np.uint8), -1, (3, 3), normalize=False, borderType=cv2.BORDER_REPLICATE
        )
        is_noise |= of_class & (similar >= _MIN_SIMILAR)
    return is_noise & candidates


class _Nearby:
    """Looks up which classes have seeds around some pixels."""

    def __init__(
        self,
        index: npt.NDArray[np.int16],
        is_seed: npt.NDArray[np.bool_],
        where: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]],
        num_classes: int,
    ) -> None:
        self._seeds = np.where(is_seed, index, -1)
        self._where, self._num_classes = where, num_classes

    def __call__(self, side: int) -> npt.NDArray[np.bool_]:
        """Returns whether each class has a seed in a square of `side` pixels, (N, K) bool."""
        import cv2

        square = np.ones((side, side), np.uint8)
        has_seed = np.zeros((len(self._where[0]), self._num_classes), bool)
        for class_index in np.unique(self._seeds):
            if class_index >= 0:
                of_class = (self._seeds == class_index).view(np.uint8)
                has_seed[:, class_index] = cv2.dilate(of_class, square)[self._where] > 0
        return has_seed


def _explained(
    values: Colors, nearest: Colors, nearby: _Nearby, colors: Colors
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.bool_]]:
    """Returns the class of each of N pixels, and whether the neighbourhood explains it.

    Args:
        values: (N, C) colours of the pixels.
        nearest: (N,) the class of the nearest colour.
    """
    result = nearest.astype(np.int16)
    is_open = np.ones(len(values), bool)
    for side in _WINDOWS:
        has_seed = nearby(side)
        is_open &= ~has_seed[np.arange(len(values)), nearest]
        left = np.flatnonzero(is_open)
        if not len(left):
            break
        # Few different pairs of colour and classes nearby; each is decided once.
        keys = np.concatenate([values[left], np.packbits(has_seed[left], axis=1)], axis=1)
        _, first, which = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        found = np.array([_between(values[i], has_seed[i], colors) for i in left[first]], np.int16)
        found = found[which.ravel()]
        result[left[found >= 0]] = found[found >= 0]
        is_open[left[found >= 0]] = False
    return result, ~is_open


def _between(value: Colors, has_seed: npt.NDArray[np.bool_], colors: Colors) -> int:
    """Returns the class of a blend of classes nearby, -1 if they do not explain the colour."""
    present = np.flatnonzero(has_seed)
    if len(present) < 2:
        return -1
    first, second = (present[each] for each in np.triu_indices(len(present), 1))
    start = colors[first].astype(np.float64)
    along = colors[second] - start
    position = ((value - start) * along).sum(axis=1) / (along**2).sum(axis=1)
    position = position.clip(0, 1)
    distance = np.linalg.norm(start + position[:, np.newaxis] * along - value, axis=1)
    best = distance.argmin()
    k0=((colors-value)**2).sum(1).argmin(); is_near=np.abs(colors[k0]-value).max()<=tolerances_of(colors)[k0]
    own = np.linalg.norm(colors - value, axis=1)
    if is_near and distance[best] > own.min() + 10: return -1
    if distance[best] <= _MAX_FROM_SEGMENT:
        return int(first[best] if position[best] < 0.5 else second[best])
    if len(present) < 3:
        return -1
    return int(present[((colors[present] - value) ** 2).sum(axis=1).argmin()])
