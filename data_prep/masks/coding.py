"""Codes the pixels of a mask as indices into its distinct colours, and compares these with classes.

A mask has many pixels and mostly few colours: whatever depends on the colour alone is computed once
for each of them. The module does not decide what a pixel means.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.imaging.pixels import Pixels
from data_prep.masks.color_map import (
    LEVELS_16_BIT,
    MAX_CLASSES,
    ClassColor,
    Color,
    grey_level,
    to_8_bits,
)

Codes = npt.NDArray[np.integer]
"""(H, W) index of a pixel's colour among the distinct colours of the mask: uint8, uint16, int32."""
Colors = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Small = npt.NDArray[np.int16]
Lengths = npt.NDArray[np.int32]
Packed = npt.NDArray[np.uint32]
"""Colours as one number each: red, green and blue, 8 bits each, after 8 set bits."""

_MAX_TOLERANCE = 32  # levels of the largest channel difference
_MAX_DISTANCES = 2**18  # values compared at once: 1 MB
_BLOCK_PIXELS = 2**19  # of a block of rows; a block needs up to 200 bytes a pixel
_MAX_LISTED = 2**16  # colours; of more, a table of all possible ones is faster
_NUM_RGB = 2**24


@dataclass(frozen=True)
class KnownColors:
    """The K colours that have an id, (K, 3) in 8-bit levels, and their ids, (K,).

    Attributes:
        levels_16_bit: levels of 16-bit masks, and the place of their colours.
    """

    colors: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int64]
    levels_16_bit: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(
        cls, classes: Sequence[ClassColor], ignored: Sequence[Color] = (), ignore_id: int = 0
    ) -> "KnownColors":
        """Returns the colours of the classes and of ignored pixels, in 8 bits."""
        colors = [entry.color for entry in classes]
        ids = [entry.id for entry in classes]
        shallow = [color for color in ignored if max(color) < MAX_CLASSES]
        colors, ids = [*colors, *shallow], [*ids, *[ignore_id] * len(shallow)]
        return cls(np.array(colors), np.array(ids))

    @classmethod
    def of_16_bits(
        cls, classes: Sequence[ClassColor], ignored: Sequence[Color] = (), ignore_id: int = 0
    ) -> "KnownColors":
        """Returns the same for 16-bit grey, and the levels of these colours.

        A level of a class is that of 8 bits times 257. An ignored level may also be written as it
        is in the file.
        """
        known = cls.of(classes, ignored, ignore_id)
        deep = [color[0] for color in ignored if max(color) >= MAX_CLASSES]
        rows = [[to_8_bits(level)] * 3 for level in deep]
        colors = np.concatenate([known.colors, np.array(rows, np.int64).reshape(-1, 3)])
        ids = np.concatenate([known.ids, np.full(len(deep), ignore_id)])
        is_class = np.arange(len(colors)) < len(classes)
        levels: dict[int, int] = {level: len(known.ids) + i for i, level in enumerate(deep)}
        for i, color in enumerate(known.colors.tolist()):
            if color[0] == color[1] == color[2] and not is_class[i]:
                levels |= {color[0]: i, color[0] * LEVELS_16_BIT: i}
        for i, entry in reversed(list(enumerate(classes))):
            level = grey_level(entry.color)
            if level is not None:
                levels[level * LEVELS_16_BIT] = i  # if classes share a level, the first one
        return cls(colors, ids, tuple(levels.items()))

    def lists(self) -> tuple[list[list[int]], list[int]]:
        """Returns the colours and the ids as lists."""
        return self.colors.tolist(), self.ids.tolist()


@dataclass(frozen=True)
class Shades:
    """The M distinct colours of a mask, compared with the K colours of the classes.

    Attributes:
        values: (M, 3) uint8 colours of the mask, in 8-bit levels.
        colors: (K, 3) colours of the classes, in 8-bit levels.
        nearest: (M,) index of the nearest class colour.
        distances: (M,) largest channel difference to that colour, levels; 0 only if it is equal.
        tolerances: (M,) largest difference that noise around that colour may have.
    """

    values: npt.NDArray[np.uint8]
    colors: Colors
    nearest: Small
    distances: Small
    tolerances: Small

    @classmethod
    def of(
        cls, values: npt.NDArray[np.uint8], colors: Colors, exact: Small | None = None
    ) -> "Shades":
        """Compares `values` with `colors`.

        Args:
            exact: (M,) the colour that a value is exactly, -1 for none. None: an equal one. Values
                of more than 8 bits may be rounded to a colour that they do not have.
        """
        nearest, distances = nearest_of(values, colors)
        if exact is not None:
            nearest = np.where(exact >= 0, exact, nearest)
            distances = np.where(exact >= 0, 0, np.maximum(distances, 1)).astype(np.int16)
        return cls(values, colors, nearest, distances, tolerances_of(colors)[nearest])

    @property
    def is_exact(self) -> Flags:
        """(M,) the colour is that of a class."""
        found: Flags = self.distances == 0
        return found

    @property
    def is_near(self) -> Flags:
        """(M,) the colour is within the tolerance of a class."""
        found: Flags = self.distances <= self.tolerances
        return found


@dataclass(frozen=True)
class CodedMask:
    """A mask as indices into its M distinct colours.

    Attributes:
        codes: (H, W).
        shades: the colours. Some may have no pixel.
        counts: (M,) pixels of each colour.
        ids: (K,) uint8 id of each class colour.
        is_16_bit: the codes are grey levels of 16 bits.
    """

    codes: Codes
    shades: Shades
    counts: npt.NDArray[np.integer]
    ids: npt.NDArray[np.uint8]
    is_16_bit: bool = False

    def color_of(self, code: int) -> Color:
        """Returns a colour in the levels of the file."""
        red, green, blue = self.colors_of(np.array([code]))[0].tolist()
        return red, green, blue

    def colors_of(self, codes: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
        """Returns colours (N, 3) in the levels of the file."""
        if self.is_16_bit:
            return np.repeat(codes[:, np.newaxis], 3, axis=1)
        return self.shades.values[codes]


def code_grey(plane: Pixels, counts: npt.NDArray[np.int64], known: KnownColors) -> CodedMask:
    """Codes a grey mask: the codes are its levels.

    Args:
        plane: (H, W) uint8 or uint16.
        counts: pixels of each level, up to the largest.
        known: for more than 256 levels, those `of_16_bits`.
    """
    number = len(counts)
    levels = np.arange(number)
    exact: Small | None = None
    if number > MAX_CLASSES:
        exact = np.full(number, -1, np.int16)
        for level, index in known.levels_16_bit:
            if level < number:
                exact[level] = index
        levels = to_8_bits(levels)
    elif plane.dtype != np.uint8:
        plane = plane.astype(np.uint8)
    values = np.repeat(levels.astype(np.uint8)[:, np.newaxis], 3, axis=1)
    shades = Shades.of(values, known.colors, exact)
    return CodedMask(plane, shades, counts, known.ids.astype(np.uint8), number > MAX_CLASSES)


def code_colors(pixels: Pixels, known: KnownColors) -> CodedMask:
    """Codes a mask of colours, (H, W, 3) uint8: first those of the classes, then its others.

    Neighbours mostly have one colour: only the first pixel of each run is compared.
    """
    blocks = list(row_blocks(pixels.shape))
    runs = [_runs(pixels[rows]) for rows in blocks]
    ours = _packed(known.colors.astype(np.uint8)[:, np.newaxis])
    order = np.argsort(ours)
    others = _distinct(found[~_find(found, ours, order)[1]] for found, _ in runs)
    table = _table_of(others)
    codes = np.empty(pixels.shape[:2], np.int32)
    counts = np.zeros(len(ours) + len(others), np.int32)
    for rows in blocks:
        found, lengths = runs.pop(0)  # not needed any more
        code, is_known = _find(found, ours, order)
        rest = found[~is_known]
        places = np.searchsorted(others, rest) if table is None else table[rest & (_NUM_RGB - 1)]
        code[~is_known] = len(ours) + places
        codes[rows] = np.repeat(code, lengths).reshape(codes[rows].shape)
        _add_counts(counts, code, lengths)
    del table
    values = np.empty((len(counts), 3), np.uint8)
    values[: len(ours)] = known.colors
    for channel, shift in enumerate((16, 8, 0)):
        values[len(ours) :, channel] = others >> shift & 255
    shades = Shades.of(values, known.colors)
    return CodedMask(codes, shades, counts, known.ids.astype(np.uint8))


def _add_counts(
    counts: npt.NDArray[np.integer], codes: npt.NDArray[np.integer], lengths: Lengths
) -> None:
    """Adds the pixels of runs to the counts of their codes."""
    if len(counts) > len(codes):  # not a pass over all colours for a few runs
        np.add.at(counts, codes, lengths)
    else:
        counts += np.bincount(codes, lengths, len(counts)).astype(counts.dtype)


def level_counts(plane: Pixels) -> npt.NDArray[np.int64]:
    """Returns the count of each value, up to the largest of the type or of `plane`."""
    import cv2

    if plane.dtype == np.uint8 and plane.size < 2**24:
        # Five times as fast; counts in float32, which is exact up to 2**24 pixels.
        histogram = cv2.calcHist([plane], [0], None, [256], [0, 256])
        return histogram.ravel().astype(np.int64)
    counts = np.zeros(int(plane.max()) + 1, np.int64)
    for rows in row_blocks(plane.shape):
        counts += np.bincount(plane[rows].ravel(), minlength=len(counts))
    return counts


def _runs(pixels: Pixels) -> tuple[Packed, Lengths]:
    """Returns the colours of the runs of equal pixels, and their lengths."""
    packed = _packed(pixels)
    starts = np.flatnonzero(packed[1:] != packed[:-1]).astype(np.int32) + 1
    starts = np.concatenate([np.zeros(1, np.int32), starts])
    return packed[starts], np.diff(starts, append=np.int32(packed.size))


def _packed(pixels: Pixels) -> Packed:
    """Returns the colours of (H, W, 3) pixels in the order of the rows, (H * W,)."""
    import cv2

    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2BGRA)).view("<u4").ravel()


def _find(
    found: Packed, ours: Packed, order: npt.NDArray[np.intp]
) -> tuple[npt.NDArray[np.int32], Flags]:
    """Returns the place of each of `found` in `ours`, and whether it is there.

    Args:
        order: sorts `ours`.
    """
    ascending = ours[order]
    place = np.searchsorted(ascending, found).clip(max=len(ours) - 1)
    return order[place].astype(np.int32), ascending[place] == found


def _distinct(parts: Iterable[Packed]) -> Packed:
    """Returns the distinct values of all parts, in ascending order."""
    found = np.zeros(0, np.uint32)
    seen: Flags | None = None
    for part in parts:
        if seen is None:
            found = np.union1d(found, part)
            if len(found) > _MAX_LISTED:
                seen = np.zeros(_NUM_RGB, bool)
                seen[found & (_NUM_RGB - 1)] = True
        else:
            seen[part & (_NUM_RGB - 1)] = True
    if seen is None:
        return found
    return np.flatnonzero(seen).astype(np.uint32) | np.uint32(0xFF << 24)


def _table_of(others: Packed) -> npt.NDArray[np.int32] | None:
    """Returns the place of each colour in `others`, None if a search is faster."""
    if len(others) <= _MAX_LISTED:
        return None
    table = np.zeros(_NUM_RGB, np.int32)
    table[others & (_NUM_RGB - 1)] = np.arange(len(others), dtype=np.int32)
    return table


def tolerances_of(colors: Colors) -> Small:
    """Returns how far noise may be from each of `colors` (K, C): (K,) levels.

    Equal colours, which levels of 16 bits may be rounded to, do not limit each other.
    """
    differences = np.abs(colors[:, np.newaxis] - colors).max(axis=2)
    differences[differences == 0] = 4 * _MAX_TOLERANCE
    return np.minimum(_MAX_TOLERANCE, differences.min(axis=1) // 4).astype(np.int16)


def nearest_of(values: npt.NDArray[np.integer], colors: Colors) -> tuple[Small, Small]:
    """Returns the index of the nearest of `colors` (K, C) for each of `values` (M, C).

    Also returns the largest channel difference to that colour, (M,). The distance is the sum of
    squares; if several colours are equally near, the first is used.

    Args:
        values, colors: levels 0..255.
    """
    nearest, distances = (np.zeros(len(values), np.int16) for _ in range(2))
    # float32 holds these whole numbers exactly.
    double = 2 * colors.T.astype(np.float32)
    squares = (colors**2).sum(axis=1).astype(np.float32)
    levels = colors.astype(np.int16)
    block = max(1, _MAX_DISTANCES // len(colors))
    for start in range(0, len(values), block):
        some = slice(start, start + block)
        nearest[some] = (squares - values[some].astype(np.float32) @ double).argmin(axis=1)
        difference = np.abs(values[some].astype(np.int16) - levels[nearest[some]])
        distances[some] = difference.max(axis=1)
    return nearest, distances


def lookup(table: npt.NDArray[Any], codes: Codes) -> npt.NDArray[Any]:
    """Returns `table[codes]`, (H, W), in little memory.

    Args:
        table: (M,), for uint8 codes at most 256 values.
    """
    import cv2

    if codes.dtype == np.uint8:
        full = np.zeros(256, np.uint8 if table.dtype == bool else table.dtype)
        full[: len(table)] = table
        return np.asarray(cv2.LUT(codes, full)).view(table.dtype)
    result = np.empty(codes.shape, table.dtype)
    for rows in row_blocks(codes.shape):
        np.take(table, codes[rows], out=result[rows], mode="clip")
    return result


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Yields consecutive rows of an array (H, W, ...), with a bounded number of pixels."""
    size = max(1, _BLOCK_PIXELS // shape[1])
    for start in range(0, shape[0], size):
        yield slice(start, min(start + size, shape[0]))
