"""Proposes the size of the stored images, or tiles, from the sizes of images and regions.

Pure functions on numbers.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

STEP = 128  # the default network of 8 levels needs sides divisible by it
MIN_AREA = 4  # pixels of a region that counts for the proposal
MIN_NOISY_AREA = 16  # the same in masks with noise or blends, which leave many tiny regions
_SIDES = (256, 512, 768, 1024)  # longer side of the sizes that are compared
_DEFAULT_SIDE = 512
_TILE = 512
_MAX_LOST = 0.01  # share of a class's regions that a size may lose
_MIN_KEPT = 3.0  # pixels of the smallest 5 % of a class's regions that a size must keep
_SAME_ASPECT = 1.1  # ratio of the widest to the narrowest, without the outer 5 %
_PADDED_ASPECT = 1.5


@dataclass(frozen=True)
class StoredSize:
    """A size of the stored images, and how images are fitted into it."""

    height: int
    width: int
    kind: str = "stretch"

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"

    @property
    def options(self) -> dict[str, Any]:
        """The options of `prep` that give it, without defaults."""
        pad = {"geometry": self.kind} if self.kind != "stretch" else {}
        if self.height != self.width:
            return {"image_height": self.height, "image_width": self.width, **pad}
        return ({} if self.height == _DEFAULT_SIDE else {"image_size": self.height}) | pad


@dataclass(frozen=True)
class ClassLoss:
    """The regions of a class that are not tiny, and how many of them a stored size would lose.

    Attributes:
        smallest: 5th percentile of their areas, pixels.
    """

    name: str
    number: int
    smallest: int
    lost: Mapping[StoredSize, int]


def stored_sizes(sizes: Counter[tuple[int, int]]) -> tuple[StoredSize, ...]:
    """Returns the sizes to compare, the smallest first; the last one is that of the images.

    Args:
        sizes: number of images by (height, width), at least one.
    """
    heights, widths = np.array([list(size) for size in sizes.elements()]).T
    low, high = np.percentile(heights / widths, [5, 95])
    is_uniform = high <= _SAME_ASPECT * low
    kind = "pad" if high > _PADDED_ASPECT * low else "stretch"
    aspect = float(np.median(heights / widths)) if is_uniform else 1.0
    longest = float(np.median(np.maximum(heights, widths)))
    own = -(-longest // STEP) * STEP
    sides = [side for side in _SIDES if side < own]
    if own <= _SIDES[-1]:
        sides.append(int(own))
    return tuple(_of_aspect(side, aspect, kind) for side in sides)


def _of_aspect(side: int, aspect: float, kind: str) -> StoredSize:
    """Returns the size with this longer side and about this height by width."""

    def rounded(length: float) -> int:
        return max(STEP, int(length / STEP + 0.5) * STEP)

    if aspect >= 1:
        return StoredSize(side, rounded(side / aspect), kind)
    return StoredSize(rounded(side * aspect), side, kind)


def proposed_size(
    sizes: Counter[tuple[int, int]], compared: Sequence[StoredSize], losses: Sequence[ClassLoss]
) -> tuple[dict[str, Any], str]:
    """Returns the options of `prep` for the size of the stored images, and the reason.

    Images of up to 512 pixels keep their size, rounded up to a multiple of 128. Of larger ones, the
    smallest size from 512 on is taken that loses at most 1 % of the regions of each class, and
    keeps 3 pixels of the smallest 5 %. If there is none, they are cut into tiles.
    """
    own = f"most images have {_shown(sizes.most_common(1)[0][0])} pixels"
    candidates = [size for size in compared if max(size.height, size.width) >= _DEFAULT_SIDE]
    if not candidates:
        size = compared[-1]
        return size.options, f"{own}; {size} is the next size with sides divisible by {STEP}"
    areas = [height * width for height, width in sizes.elements()]
    area = float(np.median(areas))
    for size in candidates:
        if _problem(losses, size, area) is None:
            return size.options, _why(own, size, compared, losses)
    largest = candidates[-1]
    problem = _problem(losses, largest, area)
    shorter = float(np.median([min(size) for size in sizes.elements()]))
    if shorter < _TILE:
        return largest.options, f"{own}; {problem}, but they are too small for tiles of {_TILE}"
    return {"tile": _TILE}, f"{own}; {problem}, tiles keep the original size"


def _problem(losses: Sequence[ClassLoss], size: StoredSize, area: float) -> str | None:
    """Returns why a stored size is too small for images of `area` pixels, None if it is not."""
    share, name = _worst(losses, size)
    if share > _MAX_LOST:
        return f"resizing to {size} would lose {share:.1%} of the regions of {name}"
    scale = min(1.0, _area(size) / area)
    for each in losses:
        kept = each.smallest * scale
        if each.number and kept < min(_MIN_KEPT, each.smallest):
            return (
                f"resizing to {size} would leave {kept:.1f} pixels of the smallest 5 % of the "
                f"regions of {each.name}"
            )
    return None


def _worst(losses: Sequence[ClassLoss], size: StoredSize) -> tuple[float, str]:
    """Returns the largest share of lost regions of a class, and its name."""
    shares = [(each.lost[size] / each.number, each.name) for each in losses if each.number]
    return max(shares, default=(0.0, ""))


def _why(
    own: str, size: StoredSize, compared: Sequence[StoredSize], losses: Sequence[ClassLoss]
) -> str:
    share, name = _worst(losses, size)
    if not any(each.number for each in losses):
        return f"{own}; there are no regions that {size} could lose"
    loses = f"loses {share:.1%} of the regions of {name}" if share else "loses no region"
    smaller = [each for each in compared if _area(each) < _area(size)]
    before = ""
    if smaller:
        other, of = _worst(losses, smaller[-1])
        number = f"{other:.1%} of {of}" if other else "none, too"
        before = f"; {smaller[-1]} would lose {number}"
    return f"{own}; {size} {loses}{before}"


def _area(size: StoredSize) -> int:
    return size.height * size.width


def _shown(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
