"""Counts the values and colours of mask files, from which `decision/` finds their meaning.

The statistics of one file are small and can be added: `statistics_of(a) + statistics_of(b)`. Their
size is bounded, whatever the masks contain.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from data_prep.imaging.pixels import Pixels, grey_channel, is_uniform
from data_prep.masks.class_names import VOC_COLORS, VOID_COLOR
from data_prep.masks.color_map import Color
from data_prep.masks.files import MaskFile, is_jpeg, read_mask_file
from data_prep.masks.npz import read_npz_file

Kind = Literal["grey", "palette", "colour", "one-hot"]
Codes = npt.NDArray[np.integer[Any]]
Flags = npt.NDArray[np.bool_]

FLAT_RANGE = 12  # levels within 3 x 3 pixels of a solid area
VOID_LEVEL = 255
_BORDER_SIDE = 13  # pixels; no line of a void border is wider
# Shares of the pixels of a value that is a border. Measured: 0-2 % against 81 % of an area.
_MAX_DEEP = 0.05
_MIN_BESIDE = 0.8
_MIN_FLAT = 0.1  # of the pixels of a value with areas; discs of 5 pixels have 0.4
_MAX_KEPT = 256  # values or colours of one file
_MAX_MERGED = 1024  # values or colours of all files
_MAX_SET = 64  # values of a set
_MAX_SETS = 256
_MAX_STRAY = 4  # pixels of a value in a file on average; a class has more
_MIN_SOLID_IDS = 0.8  # of the ids of a file have areas; the levels of soft edges have none
_EXACT = 1 << 25  # flags above 24 bits of colour
_FLAT = 1 << 24


@dataclass(frozen=True)
class ValueCount:
    """The pixels of one value or colour.

    Attributes:
        num_flat: pixels whose 3 x 3 neighbours differ by 12 levels or less in each channel; all
            pixels of a grey mask that has only 0 and 255.
        num_solid: pixels whose 3 x 3 neighbours are equal; all pixels of such a mask.
        num_between: pixels of grey masks with a lower and a higher value within 3 x 3 pixels.
        num_deep: pixels whose 13 x 13 neighbours are equal; only counted for 255 and 224,224,192.
        num_beside: pixels with a solid area of another value than 0 within 13 x 13 pixels; counted
            for the same.
        num_files: files with this value.
    """

    num_pixels: int
    num_flat: int = 0
    num_solid: int = 0
    num_between: int = 0
    num_deep: int = 0
    num_beside: int = 0
    num_files: int = 1

    def __add__(self, other: "ValueCount") -> "ValueCount":
        return ValueCount(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def is_area(self) -> bool:
        """Whether the value has areas, not only lines, edges and single pixels."""
        return self.num_flat >= _MIN_FLAT * self.num_pixels > 0

    @property
    def is_stray(self) -> bool:
        """Whether the value has only a few pixels in a file, none of them in an area."""
        return not self.num_solid and self.num_pixels < _MAX_STRAY * self.num_files

    @property
    def is_border(self) -> bool:
        """Whether the value is a thin border around areas of other values."""
        is_thin = self.num_deep < _MAX_DEEP * self.num_pixels
        return is_thin and self.num_beside > _MIN_BESIDE * self.num_pixels


@dataclass(frozen=True)
class MaskStatistics:
    """The values and colours of one or more mask files.

    Attributes:
        kinds: number of files of each kind.
        levels: grey levels of the files of kind "grey", 0..65535.
        indices: indices into the palettes of the files of kind "palette".
        colors: colours of the files of kind "colour".
        palette: colour of each used index; the first one if files differ.
        num_classes: numbers of classes of the one-hot arrays.
        value_sets: number of files with exactly these grey levels or indices; sets of more than
            64 values are left out.
        id_counts: number of files by how many ids they have: levels or indices but 0 and 255.
        num_numbered: files whose ids are 1, 2, 3 and so on without a gap.
        num_ids, num_single_ids: ids of all files with two or more; and how many of them are one
            connected region in their file.
        num_empty: files of one value or colour.
        num_jpeg: files compressed as JPEG.
        num_16_bit: files with 16 bits a channel.
        num_alpha_shapes: files of one colour with a varying alpha channel.
        num_transparent: files of one colour that are transparent everywhere.
        num_alpha: files with a varying alpha channel.
        num_voc: files whose palette begins with the 21 colours of Pascal VOC.
        num_twins: files with two used indices of one colour.
        num_other_palettes: files where an index has another colour than in an earlier file.
        num_left_out: pixels of values that are not kept, because a file has too many values.
    """

    num_files: int = 0
    num_pixels: int = 0
    kinds: Mapping[Kind, int] = field(default_factory=Counter)
    levels: Mapping[int, ValueCount] = field(default_factory=dict)
    indices: Mapping[int, ValueCount] = field(default_factory=dict)
    colors: Mapping[Color, ValueCount] = field(default_factory=dict)
    palette: Mapping[int, Color] = field(default_factory=dict)
    num_classes: frozenset[int] = frozenset()
    value_sets: Mapping[frozenset[int], int] = field(default_factory=Counter)
    id_counts: Mapping[int, int] = field(default_factory=Counter)
    num_numbered: int = 0
    num_ids: int = 0
    num_single_ids: int = 0
    num_empty: int = 0
    num_jpeg: int = 0
    num_16_bit: int = 0
    num_alpha_shapes: int = 0
    num_transparent: int = 0
    num_alpha: int = 0
    num_voc: int = 0
    num_twins: int = 0
    num_other_palettes: int = 0
    num_left_out: int = 0

    def __add__(self, other: "MaskStatistics") -> "MaskStatistics":
        """Returns the statistics of the files of both."""
        differs = any(
            self.palette.get(index, color) != color for index, color in other.palette.items()
        )
        numbers = {
            name: getattr(self, name) + getattr(other, name)
            for name in (f.name for f in fields(self) if f.name.startswith("num_"))
            if name not in ("num_classes", "num_other_palettes")
        }
        return MaskStatistics(
            kinds=Counter(self.kinds) + Counter(other.kinds),
            levels=_add_counts(self.levels, other.levels),
            indices=_add_counts(self.indices, other.indices),
            colors=_add_counts(self.colors, other.colors),
            palette={**other.palette, **self.palette},
            num_classes=self.num_classes | other.num_classes,
            value_sets=Counter(
                dict((Counter(self.value_sets) + Counter(other.value_sets)).most_common(_MAX_SETS))
            ),
            id_counts=Counter(self.id_counts) + Counter(other.id_counts),
            num_other_palettes=self.num_other_palettes
            + max(other.num_other_palettes, int(differs)),
            **numbers,
        )


def _add_counts(
    first: Mapping[Any, ValueCount], second: Mapping[Any, ValueCount]
) -> dict[Any, Any]:
    result = dict(first)
    for value, count in second.items():
        result[value] = result[value] + count if value in result else count
    return _commonest(result, _MAX_MERGED)


def _commonest(counts: dict[Any, ValueCount], limit: int) -> dict[Any, ValueCount]:
    if len(counts) <= limit:
        return counts
    order = sorted(counts, key=lambda value: (-counts[value].num_flat, -counts[value].num_pixels))
    return {value: counts[value] for value in order[:limit]}


def read_statistics(data: bytes, *, name: str, max_pixels: int) -> MaskStatistics:
    """Returns the statistics of a mask file as `prep` reads it.

    Args:
        data: the whole file.
        name: name of the file; .npz is an array, other files are images.

    Raises:
        ContentError: the file is not a readable mask, or has more than `max_pixels` pixels.
    """
    if name.lower().endswith(".npz"):
        return statistics_of(read_npz_file(data, name, max_pixels=max_pixels))
    mask = read_mask_file(data, name=name, max_pixels=max_pixels)
    return statistics_of(mask, is_jpeg_file=is_jpeg(data))


def statistics_of(mask: MaskFile, *, is_jpeg_file: bool = False) -> MaskStatistics:
    """Returns the statistics of one mask.

    Args:
        is_jpeg_file: the mask was compressed as JPEG.
    """
    common: dict[str, Any] = {
        "num_files": 1,
        "num_pixels": mask.pixels.shape[0] * mask.pixels.shape[1],
        "num_jpeg": int(is_jpeg_file),
        "num_16_bit": int(mask.pixels.dtype == np.uint16),
    }
    if mask.num_classes is not None:
        kind: Kind = "one-hot"
        return MaskStatistics(
            kinds=Counter([kind]), num_classes=frozenset([mask.num_classes]), **common
        )
    if mask.alpha is not None:
        is_shape = is_uniform(mask.pixels) and not mask.is_transparent
        common |= {
            "num_alpha": int(not mask.is_transparent),
            "num_alpha_shapes": int(is_shape),
            "num_transparent": int(mask.is_transparent),
        }
    found = _of_values(mask, common)
    num_values = len(found.levels) + len(found.indices) + len(found.colors)
    is_empty = num_values == 1 and not found.num_alpha_shapes
    return replace(found, num_empty=int(is_empty))


def _of_values(mask: MaskFile, common: dict[str, Any]) -> MaskStatistics:
    if mask.indices is not None:
        return _of_palette(mask, mask.indices, common)
    plane = grey_channel(mask.pixels)
    if plane is not None:
        return MaskStatistics(kinds=Counter(["grey"]), **_of_levels(plane, "levels"), **common)
    colors, num_left_out = _color_counts(mask.pixels)
    return MaskStatistics(
        kinds=Counter(["colour"]), colors=colors, num_left_out=num_left_out, **common
    )


def _of_palette(mask: MaskFile, indices: Pixels, common: dict[str, Any]) -> MaskStatistics:
    fields_of_indices = _of_levels(indices, "indices")
    palette = {index: mask.color_of(index) for index in sorted(fields_of_indices["indices"])}
    is_voc = mask.palette[: len(VOC_COLORS)] == VOC_COLORS
    return MaskStatistics(
        kinds=Counter(["palette"]),
        palette=palette,
        num_voc=int(is_voc),
        num_twins=int(len(set(palette.values())) < len(palette)),
        **fields_of_indices,
        **common,
    )


def _of_levels(plane: Pixels, key: str) -> dict[str, Any]:
    """Returns the fields of a mask of levels or ids, (H, W) uint8 or uint16."""
    counts, num_left_out = _level_counts(plane)
    result: dict[str, Any] = {key: counts, "num_left_out": num_left_out}
    if len(counts) <= _MAX_SET and not num_left_out:
        result["value_sets"] = Counter([frozenset(counts)])
    ids = [value for value in sorted(counts) if value not in (0, VOID_LEVEL)]
    if ids and not num_left_out:
        result["id_counts"] = Counter([len(ids)])
        result["num_numbered"] = int(ids == list(range(1, len(ids) + 1)))
    num_solid = sum(counts[value].num_solid > 0 for value in ids)
    if len(ids) > 1 and num_solid >= _MIN_SOLID_IDS * len(ids):
        result |= {"num_ids": len(ids), "num_single_ids": _num_single(plane, ids)}
    return result


def _level_counts(plane: Pixels) -> tuple[dict[int, ValueCount], int]:
    """Returns the count of each value, and the pixels of values that are not kept."""
    every = flat = solid = _histogram(plane, None)
    between = np.zeros_like(every)
    is_solid = None
    # Most masks are black and white, and no rule asks for areas of these two.
    if not set(np.flatnonzero(every).tolist()) <= {0, VOID_LEVEL}:
        low, high = _neighbors(plane)
        is_solid = low == high
        flat = _histogram(plane, high - low <= FLAT_RANGE)
        solid = _histogram(plane, is_solid)
        between = _histogram(plane, (low < plane) & (plane < high))
    counts = {
        int(v): ValueCount(int(every[v]), int(flat[v]), int(solid[v]), int(between[v]))
        for v in np.flatnonzero(every)
    }
    # Black and white masks have no border.
    if VOID_LEVEL in counts and is_solid is not None:
        is_void = plane == VOID_LEVEL
        counts[VOID_LEVEL] += _border_count(is_void, is_solid & ~is_void & (plane != 0))
    kept = _commonest(counts, _MAX_KEPT)
    return kept, plane.size - sum(count.num_pixels for count in kept.values())


def _color_counts(pixels: Pixels) -> tuple[dict[Color, ValueCount], int]:
    """Returns the count of each colour (H, W, 3), and the pixels of colours that are not kept."""
    import cv2

    # Planes: NumPy takes five times as long for a channel of interleaved ones.
    low, high = _neighbors(pixels)
    first, second, third = cv2.split(high - low)
    difference = np.maximum(np.maximum(first, second), third)
    packed = np.zeros(pixels.shape[:2], np.uint32)
    for plane in cv2.split(pixels):
        packed <<= 8
        packed |= np.asarray(plane, np.uint8)
    red, green, blue = VOID_COLOR
    is_void = packed == (red << 16 | green << 8 | blue)
    border = None
    if is_void.any():
        border = _border_count(is_void, (difference == 0) & ~is_void & (packed != 0))
    packed |= np.where(difference <= FLAT_RANGE, np.uint32(_FLAT), np.uint32(0))
    packed |= np.where(difference == 0, np.uint32(_EXACT), np.uint32(0))
    # Neighbours are mostly equal: only the first of equal ones in a row is sorted.
    line = packed.ravel()
    starts = np.flatnonzero(np.concatenate([[True], line[1:] != line[:-1]]))
    lengths = np.diff(np.append(starts, line.size))
    keys, where = np.unique(line[starts], return_inverse=True)
    sums = np.bincount(where.ravel(), weights=lengths).astype(np.int64)
    totals: dict[int, list[int]] = {}
    for key, number in zip(keys.tolist(), sums.tolist(), strict=True):
        row = totals.setdefault(key & 0xFFFFFF, [0, 0, 0])
        row[0] += number
        row[1] += number if key & _FLAT else 0
        row[2] += number if key & _EXACT else 0
    counts: dict[Color, ValueCount] = {
        (key >> 16, key >> 8 & 255, key & 255): ValueCount(*row) for key, row in totals.items()
    }
    if border is not None:
        counts[VOID_COLOR] += border
    kept = _commonest(counts, _MAX_KEPT)
    return kept, packed.size - sum(count.num_pixels for count in kept.values())


def _histogram(plane: Pixels, where: Flags | None) -> npt.NDArray[np.int64]:
    """Returns the count of each value of (H, W), of the pixels `where`."""
    import cv2

    if plane.dtype == np.uint8 and plane.size < 2**24:
        # Counts in float32, which is exact up to 2**24 pixels.
        which = None if where is None else where.view(np.uint8)
        return cv2.calcHist([plane], [0], which, [256], [0, 256]).ravel().astype(np.int64)
    size = 256 if plane.dtype == np.uint8 else 65536
    return np.bincount((plane if where is None else plane[where]).ravel(), minlength=size)


def _neighbors(pixels: Pixels) -> tuple[Pixels, Pixels]:
    """Returns the lowest and the highest value of each channel within 3 x 3 pixels."""
    import cv2

    square = np.ones((3, 3), np.uint8)
    low, high = cv2.erode(pixels, square), cv2.dilate(pixels, square)
    return np.asarray(low).reshape(pixels.shape), np.asarray(high).reshape(pixels.shape)


def _border_count(is_void: Flags, is_area: Flags) -> ValueCount:
    """Returns `num_deep` and `num_beside` of the pixels `is_void`, (H, W).

    Args:
        is_area: the pixels of solid areas of other values.
    """
    import cv2

    square = np.ones((_BORDER_SIDE, _BORDER_SIDE), np.uint8)
    deep = cv2.erode(is_void.view(np.uint8), square)
    others = cv2.dilate(is_area.view(np.uint8), square)
    num_beside = int(np.count_nonzero(others[is_void]))
    return ValueCount(0, num_deep=int(np.count_nonzero(deep)), num_beside=num_beside, num_files=0)


def _num_single(plane: Codes, ids: Sequence[int]) -> int:
    """Returns how many of the ids are one connected region of `plane`."""
    import cv2
    from scipy import ndimage

    num_single = 0
    boxes = ndimage.find_objects(plane.astype(np.int32), ids[-1])
    for value in ids:
        inside = (plane[boxes[value - 1]] == value).view(np.uint8)
        num_single += cv2.connectedComponents(inside)[0] == 2
    return num_single
