"""Converts colours and grey levels of a mask to class ids and back.

The module defines the meaning of mask pixels; it does not depend on where masks come from.

Rules for reading a mask of any file format, if no encoding is given:
- A mask whose colours are all grey is a grey mask, also if it is stored as RGB or as a palette.
- A grey mask with only class ids (0..K-1) and ignored levels is an index mask, such as a 0/1 mask
  of two classes.
- In other masks, pixels with exactly the colour of a class get that class. `blends.py` has the
  rules for the other pixels, which count as unmapped. 16-bit grey masks are compared with the
  colours times 257 (65535 is white).
- A mask with an area of a colour of no class is rejected, see `solid_areas.py`.
- Ignored colours are read as the ignore id. In index masks, the ignore id itself may be such an id.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from data_prep.imaging.pixels import Pixels, grey_channel
from data_prep.masks.blends import MARGIN, assign_classes, nearest_of
from data_prep.masks.color_map import MAX_CLASSES, ClassColor, Color, grey_level
from data_prep.masks.solid_areas import FEW_COLORS, Box, SolidArea, find_solid_areas
from flexunet.errors import ContentError

Encoding = Literal["auto", "index", "colour", "alpha"]
"""What carries the classes: auto decides for each mask, see above."""
ClassIds = npt.NDArray[np.uint8]
"""(H, W) uint8 class ids."""

NUM_COLORS_NAMED = 5
_NUM_AREAS_NAMED = 3
_LEVELS_16_BIT = 257  # 65535 / 255: one 8-bit grey level in 16 bits
_NOT_A_BLEND = 128  # a blend of two colours is closer than this to one of them
_MAX_ID_LIKE = 64

READING_RULES = 2
"""Version of the rules by which masks are read; datasets record it. Datasets without it have 1.

Until version 1, a mask with colours had the ignore id as a grey level, too.
"""


@dataclass(frozen=True)
class MaskRules:
    """How the masks of a dataset are read.

    Attributes:
        classes: the classes in the order of their ids.
        ignore_id: id of pixels that are ignored everywhere, None without such pixels.
        encoding: what carries the classes.
        ignored: distinct colours, none of them of a class, that are read as the ignore id.
        has_ignore_id: index masks may hold the ignore id. It is no grey level of other masks.
    """

    classes: tuple[ClassColor, ...]
    ignore_id: int | None = None
    ignored: tuple[Color, ...] = ()
    encoding: Encoding = "auto"
    has_ignore_id: bool = False


@dataclass(frozen=True)
class MaskReading:
    """A mask as read.

    Attributes:
        ids: (H, W) uint8 class ids.
        unmapped_pixels: pixels whose colour is not exactly that of a class.
        unmapped_colors: the commonest of these colours with their number of pixels.
        unexplained_pixels: unmapped pixels that are neither noise nor a blend of classes nearby;
            they have the class of the nearest colour.
    """

    ids: ClassIds
    unmapped_pixels: int = 0
    unmapped_colors: tuple[tuple[Color, int], ...] = ()
    unexplained_pixels: int = 0

    def joined_with(self, other: "MaskReading", ids: ClassIds) -> "MaskReading":
        """Returns the reading `ids` of this mask together with `other`, with the pixels of both."""
        colors = Counter(dict(self.unmapped_colors))
        colors.update(dict(other.unmapped_colors))
        return MaskReading(
            ids,
            self.unmapped_pixels + other.unmapped_pixels,
            tuple(colors.most_common(NUM_COLORS_NAMED)),
            self.unexplained_pixels + other.unexplained_pixels,
        )


def read_classes(pixels: Pixels, rules: MaskRules, *, name: str) -> MaskReading:
    """Returns the class ids of a mask, and its unmapped pixels.

    Args:
        pixels: (H, W) or (H, W, 1) grey, uint8 or uint16, or (H, W, 3) uint8 RGB.
        name: name of the mask in errors.

    Raises:
        ContentError: the mask has an area of a colour of no class, or would be read as empty
            although it has other colours or ids, so the classes do not match it.
    """
    known = KnownColors.of(rules)
    plane = grey_channel(pixels)
    coded = _code_colors(pixels, known) if plane is None else _code_grey(plane, known, rules)
    return coded if isinstance(coded, MaskReading) else _read_coded(coded, known, rules, name)


def to_colors(class_ids: npt.NDArray[Any], classes: Sequence[ClassColor]) -> Pixels:
    """Returns the colours (H, W, 3) uint8 of class ids (H, W); an ignore id becomes its own grey.

    `read_classes` converts them back to the same ids.
    """
    table = np.repeat(np.arange(MAX_CLASSES, dtype=np.uint8)[:, np.newaxis], 3, axis=1)
    for entry in classes:
        table[entry.id] = entry.color
    return np.take(table, class_ids, axis=0)


@dataclass(frozen=True)
class KnownColors:
    """The K colours that have an id, (K, 3), and their ids, (K,)."""

    colors: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int64]

    @classmethod
    def of(cls, rules: MaskRules) -> "KnownColors":
        """Returns the colours of the classes and of ignored pixels."""
        colors = [entry.color for entry in rules.classes]
        ids = [entry.id for entry in rules.classes]
        if rules.ignore_id is not None:
            colors = [*colors, *rules.ignored]
            ids = [*ids, *[rules.ignore_id] * len(rules.ignored)]
        return cls(np.array(colors), np.array(ids))

    def lists(self) -> tuple[list[list[int]], list[int]]:
        """Returns the colours and the ids as lists."""
        return self.colors.tolist(), self.ids.tolist()


def index_table(rules: MaskRules) -> npt.NDArray[np.int64]:
    """Returns the id of each level of an index mask, (256,); -1 for other levels."""
    table = np.full(MAX_CLASSES, -1)
    for color in rules.ignored:
        level = grey_level(color)
        if level is not None and rules.ignore_id is not None:
            table[level] = rules.ignore_id
    if rules.has_ignore_id and rules.ignore_id is not None:
        table[rules.ignore_id] = rules.ignore_id
    for entry in rules.classes:
        table[entry.id] = entry.id
    return table


@dataclass(frozen=True)
class _Coded:
    """A mask as indices into its M distinct colours.

    Attributes:
        codes: (H, W).
        values: (M, 3) colours in 8-bit levels.
        named: (M, 3) the same colours in the levels of the file.
    """

    codes: npt.NDArray[np.integer]
    values: npt.NDArray[np.int64]
    named: npt.NDArray[np.int64]


def _code_grey(plane: Pixels, known: KnownColors, rules: MaskRules) -> _Coded | MaskReading:
    """Returns the indices of the grey levels; or the ids, if all levels are of classes."""
    exact = _read_exact(plane, known)
    if exact is not None:
        return MaskReading(exact)
    levels = np.flatnonzero(level_counts(plane))
    as_index = index_table(rules)
    if rules.encoding == "auto" and levels[-1] < MAX_CLASSES and (as_index[levels] >= 0).all():
        return MaskReading(as_index.astype(np.uint8)[plane])
    table = np.zeros(levels[-1] + 1, np.int32)
    table[levels] = np.arange(len(levels))
    named = np.repeat(levels[:, np.newaxis], 3, axis=1)
    return _Coded(table[plane], _to_8_bits(named, known) if levels[-1] > 255 else named, named)


def _to_8_bits(levels: npt.NDArray[np.int64], known: KnownColors) -> npt.NDArray[np.int64]:
    """Returns 16-bit grey `levels` (M, 3) in 8 bits; only exact class colours become such."""
    rounded = (levels + _LEVELS_16_BIT // 2) // _LEVELS_16_BIT
    is_grey = (known.colors == known.colors[:, :1]).all(axis=1)
    is_class = np.isin(rounded[:, 0], known.colors[is_grey, 0])
    is_off = is_class & (rounded * _LEVELS_16_BIT != levels)[:, 0]
    beside = np.where(levels < rounded * _LEVELS_16_BIT, rounded - 1, rounded + 1)
    return np.where(is_off[:, np.newaxis], beside.clip(0, 255), rounded)


def _read_exact(plane: Pixels, known: KnownColors) -> ClassIds | None:
    """Returns the class ids of a mask with only the grey levels of the classes, like most masks.

    Returns None for other masks. No level of one class is the id of another, see
    `parse_color_map`. Takes half the time of counting the levels.
    """
    import cv2

    is_grey = (known.colors == known.colors[:, :1]).all(axis=1)
    free = np.setdiff1d(np.arange(MAX_CLASSES), known.ids)
    if plane.dtype != np.uint8 or not len(free):
        return None
    no_class = free[-1]
    table = np.full(256, no_class, np.uint8)
    # If classes share a level, the first one is used.
    table[known.colors[is_grey, 0][::-1]] = known.ids[is_grey][::-1]
    read = np.asarray(cv2.LUT(plane, table), np.uint8)
    return None if (read == no_class).any() else read


def level_counts(plane: Pixels) -> npt.NDArray[np.int64]:
    """Returns the count of each value, up to the largest of the type or of `plane`."""
    import cv2

    if plane.dtype == np.uint8 and plane.size < 2**24:
        # Five times as fast; counts in float32, which is exact up to 2**24 pixels.
        histogram = cv2.calcHist([plane], [0], None, [256], [0, 256])
        return histogram.ravel().astype(np.int64)
    return np.bincount(plane.ravel())


def _code_colors(pixels: Pixels, known: KnownColors) -> _Coded | MaskReading:
    """Returns the indices of the colours; or the ids, if all colours are of classes."""
    packed = pixels[..., 0].astype(np.uint32)
    for channel in (1, 2):
        packed <<= 8
        packed |= pixels[..., channel]
    codes = np.zeros(packed.shape, np.int32)
    rest = np.ones(packed.shape, bool)
    # Most pixels have exactly a class colour: only the others are sorted and compared.
    for index, (red, green, blue) in enumerate(known.colors.tolist()):
        exact = packed == (red << 16 | green << 8 | blue)
        np.putmask(codes, exact, index)
        rest &= ~exact
    if not rest.any():
        return MaskReading(known.ids.astype(np.uint8)[codes])
    others, where = np.unique(packed[rest], return_inverse=True)
    codes[rest] = len(known.ids) + where
    shades = np.stack([others >> 16, (others >> 8) & 255, others & 255], axis=1)
    values = np.concatenate([known.colors, shades.astype(np.int64)])
    return _Coded(codes, values, values)


def _read_coded(coded: _Coded, known: KnownColors, rules: MaskRules, name: str) -> MaskReading:
    nearest, distances = nearest_of(coded.values, known.colors)
    ids = np.take(known.ids.astype(np.uint8)[nearest], coded.codes)
    is_off = np.take(distances > 0, coded.codes)
    counts = np.bincount(coded.codes[is_off], minlength=len(coded.values))
    off = np.flatnonzero(counts)
    off = off[np.argsort(-counts[off], kind="stable")]
    num_unexplained = 0
    _refuse_ignore_id(coded.named[off], rules, name=name)
    if len(off):
        # Most masks have unmapped pixels only along the edges of a few areas.
        box = _box_around(is_off)
        codes = coded.codes[box]
        assigned = assign_classes(codes, coded.values, known.colors)
        areas = find_solid_areas(codes, coded.values, known.colors, assigned)
        if areas:
            _refuse_areas(areas, box, name=name)
        ids[box] = known.ids[assigned.index]
        num_unexplained = int(np.count_nonzero(assigned.is_unexplained))
    colors = tuple(
        (_as_color(coded.named[each]), int(counts[each])) for each in off[:NUM_COLORS_NAMED]
    )
    reading = MaskReading(ids, int(counts.sum()), colors, num_unexplained)
    if len(off) and _is_empty(ids, rules.ignore_id):
        _refuse_unexplained(reading, coded.named[off], distances[off].max(), rules.classes, name)
    return reading


def _refuse_ignore_id(off_colors: npt.NDArray[np.int64], rules: MaskRules, *, name: str) -> None:
    """Rejects a mask with the ignore id as a grey level beside colours of classes.

    Only in a mask of few colours: among the levels of blends and noise, that level means nothing.

    Args:
        off_colors: (M, 3) the unmapped colours.
    """
    level = rules.ignore_id if rules.has_ignore_id else None
    if level is None or len(off_colors) > FEW_COLORS or not (off_colors == level).all(axis=1).any():
        return
    ignored = ";".join(_written(color) for color in rules.ignored)
    option = f'"{ignored};{level}"' if ignored else level
    raise ContentError(
        f"{name}: has colours, and the grey level {level}, which is only an id (--ignore-id); to "
        f"ignore its pixels give --ignore {option}, else choose another --ignore-id"
    )


def _box_around(flags: npt.NDArray[np.bool_]) -> Box:
    """Returns the rows and columns of all set pixels, with the neighbourhood that counts."""
    rows, columns = (np.flatnonzero(flags.any(axis=axis)) for axis in (1, 0))
    top, left = (max(int(each[0]) - MARGIN, 0) for each in (rows, columns))
    return slice(top, int(rows[-1]) + MARGIN + 1), slice(left, int(columns[-1]) + MARGIN + 1)


def _is_empty(class_ids: ClassIds, ignore_id: int | None) -> bool:
    foreground = class_ids if ignore_id is None else class_ids[class_ids != ignore_id]
    return not foreground.any()


def _refuse_areas(areas: Sequence[SolidArea], box: Box, *, name: str) -> None:
    found = [
        f"{area.num_pixels} pixels of colour {_written(area.color)} at row "
        f"{box[0].start + area.row}, column {box[1].start + area.column}"
        for area in areas[:_NUM_AREAS_NAMED]
    ]
    more = f" and {len(areas) - len(found)} more" if len(areas) > len(found) else ""
    color = _written(areas[0].color)
    raise ContentError(
        f"{name}: has areas of a colour of no class: {'; '.join(found)}{more}; add the colour to "
        f"--classes, or ignore these pixels with --ignore {color}"
    )


def _written(color: tuple[int, ...]) -> str:
    return ",".join(map(str, color))


def _refuse_unexplained(
    reading: MaskReading,
    off_colors: npt.NDArray[np.int64],
    farthest: int,
    classes: Sequence[ClassColor],
    name: str,
) -> None:
    """Rejects a mask that would become empty although it seems to have foreground.

    The faint rest of a lesion warped out of the image is a blend, close to the background's colour.
    A colour far from it, or grey levels 0, 1, 2 and so on without a gap, indicate a mask of other
    classes. Its foreground would be lost without a message.

    Args:
        off_colors: (M, 3) the unmapped colours.
        farthest: the largest distance of these colours to a class, levels.
    """
    levels = np.unique(off_colors)
    is_grey = np.all(off_colors == off_colors[:, :1])
    known = [level for entry in classes if (level := grey_level(entry.color)) is not None]
    seen = np.union1d(levels, [level for level in known if level <= levels[-1]])
    is_id_like = is_grey and levels[-1] < _MAX_ID_LIKE and len(seen) == levels[-1] + 1
    # Grey of 9 to 15 bits in a 16-bit file, where white is not 65535.
    is_scaled = levels[-1] > 255
    if is_id_like or is_scaled or farthest >= _NOT_A_BLEND:
        colors = ", ".join(str(color) for color, _ in reading.unmapped_colors)
        raise ContentError(
            f"{name}: would be read as empty, but has {reading.unmapped_pixels} pixels in colours "
            f"of no class: {colors}; give the colours of these masks with --classes"
        )


def _as_color(values: npt.NDArray[np.int64]) -> Color:
    red, green, blue = values.tolist()
    return red, green, blue
