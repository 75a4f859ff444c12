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

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from data_prep.imaging.pixels import Pixels, grey_channel
from data_prep.masks.blends import MARGIN, Box, assign_classes
from data_prep.masks.coding import (
    CodedMask,
    Flags,
    KnownColors,
    code_colors,
    code_grey,
    level_counts,
    lookup,
)
from data_prep.masks.color_map import MAX_CLASSES, ClassColor, Color, color_text, grey_level
from data_prep.masks.rules import (
    AS_8_BITS,
    MaskRules,
    NoClassError,
    index_table,
    option_to_add,
    options_to_ignore,
)
from data_prep.masks.solid_areas import FEW_COLORS, SolidArea, find_solid_areas, kind_of
from flexunet.errors import ContentError

ClassIds = npt.NDArray[np.uint8]
"""(H, W) uint8 class ids."""

NUM_COLORS_NAMED = 5
MAX_COLORS_KEPT = 1024  # of a mask, for the table of the dataset
_NUM_AREAS_NAMED = 3
_NOT_A_BLEND = 128  # a blend of two colours is closer than this to one of them
_MAX_ID_LIKE = 64


class UnmappedColor(NamedTuple):
    """A mask colour that is not exactly that of a class.

    Attributes:
        color: in the levels of the file; an alpha value three times.
        num_pixels: its pixels.
        nearest: id of the class, or the ignore id, whose colour is the nearest.
    """

    color: Color
    num_pixels: int
    nearest: int


@dataclass(frozen=True)
class MaskReading:
    """A mask as read.

    Attributes:
        ids: (H, W) uint8 class ids.
        unmapped_pixels: pixels whose colour is not exactly that of a class.
        unmapped_colors: the commonest of these colours, at most `MAX_COLORS_KEPT`.
        unexplained_pixels: unmapped pixels that are neither noise nor a blend of classes nearby;
            they have the class of the nearest colour.
    """

    ids: ClassIds
    unmapped_pixels: int = 0
    unmapped_colors: tuple[UnmappedColor, ...] = ()
    unexplained_pixels: int = 0

    def joined_with(self, other: "MaskReading", ids: ClassIds) -> "MaskReading":
        """Returns the reading `ids` of this mask together with `other`, with the pixels of both."""
        counts = Counter[tuple[Color, int]]()
        for each in (*self.unmapped_colors, *other.unmapped_colors):
            counts[each.color, each.nearest] += each.num_pixels
        kept = counts.most_common(MAX_COLORS_KEPT)
        return MaskReading(
            ids,
            self.unmapped_pixels + other.unmapped_pixels,
            tuple(UnmappedColor(color, number, nearest) for (color, nearest), number in kept),
            self.unexplained_pixels + other.unexplained_pixels,
        )


def read_classes(
    pixels: Pixels, rules: MaskRules, *, name: str, is_lossy: bool = False
) -> MaskReading:
    """Returns the class ids of a mask, and its unmapped pixels.

    Args:
        pixels: (H, W) or (H, W, 1) grey, uint8 or uint16, or (H, W, 3) uint8 RGB.
        name: name of the mask in errors.
        is_lossy: the mask was compressed as JPEG: it has noise, even if its colours are few.

    Raises:
        ContentError: the mask has an area of a colour of no class, or would be read as empty
            although it has other colours or ids, so the classes do not match it.
    """
    plane = grey_channel(pixels)
    if plane is None:
        coded = code_colors(pixels, known_colors(rules))
        return _read_coded(coded, rules, name, is_lossy=is_lossy)
    return _read_grey(plane, rules, name, is_lossy=is_lossy)


def read_nonzero(
    pixels: Pixels, rules: MaskRules, ignored_indices: Sequence[int] = ()
) -> MaskReading:
    """Returns the second class wherever a mask is not 0, such as numbers of single objects.

    Args:
        pixels: as for `read_classes`, or the indices of a palette, (H, W).
        ignored_indices: indices that are ignored beside the levels of `rules`.
    """
    plane = grey_channel(pixels)
    if plane is None:
        red, green, blue = (pixels[:, :, channel].astype(np.int32) for channel in range(3))
        plane = red << 16 | green << 8 | blue
        ignored = [color[0] << 16 | color[1] << 8 | color[2] for color in rules.ignored]
    else:
        levels = (grey_level(color) for color in rules.ignored)
        ignored = [*(level for level in levels if level is not None), *ignored_indices]
    ids = rules.as_dataset_ids((plane != 0).astype(np.uint8))
    if rules.ignore_id is not None:
        ids[np.isin(plane, ignored)] = rules.ignore_id
    return MaskReading(ids)


def known_colors(rules: MaskRules, *, is_16_bit: bool = False) -> KnownColors:
    """Returns the colours that have an id.

    Args:
        is_16_bit: of masks with grey levels of 16 bits.
    """
    ignored = () if rules.ignore_id is None else rules.ignored
    make = KnownColors.of_16_bits if is_16_bit else KnownColors.of
    return make(rules.read_classes, ignored, rules.ignore_id or 0)


def to_colors(class_ids: npt.NDArray[Any], classes: Sequence[ClassColor]) -> Pixels:
    """Returns the colours (H, W, 3) uint8 of class ids (H, W); an ignore id becomes its own grey.

    `read_classes` converts them back to the same ids.
    """
    table = np.repeat(np.arange(MAX_CLASSES, dtype=np.uint8)[:, np.newaxis], 3, axis=1)
    for entry in classes:
        table[entry.id] = entry.color
    return np.take(table, class_ids, axis=0)


def _read_grey(plane: Pixels, rules: MaskRules, name: str, *, is_lossy: bool) -> MaskReading:
    exact = _read_exact(plane, rules)
    if exact is not None:
        return MaskReading(exact)
    counts = level_counts(plane)
    levels = np.flatnonzero(counts)
    as_index = index_table(rules)
    if rules.encoding == "auto" and levels[-1] < MAX_CLASSES and (as_index[levels] >= 0).all():
        return MaskReading(as_index.astype(np.uint8)[plane])
    known = known_colors(rules, is_16_bit=bool(levels[-1] >= MAX_CLASSES))
    coded = code_grey(plane, counts[: levels[-1] + 1], known)
    return _read_coded(coded, rules, name, is_lossy=is_lossy)


def _read_exact(plane: Pixels, rules: MaskRules) -> ClassIds | None:
    """Returns the class ids of a mask with only the grey levels of the classes, like most masks.

    Returns None for other masks. No level of one class is the id of another, see
    `parse_color_map`. Takes half the time of counting the levels.
    """
    import cv2

    found = _ids_of_levels(rules)
    if plane.dtype != np.uint8 or found is None:
        return None
    table, no_class = found
    read = np.asarray(cv2.LUT(plane, table), np.uint8)
    return None if (read == no_class).any() else read


@functools.lru_cache(maxsize=8)
def _ids_of_levels(rules: MaskRules) -> tuple[ClassIds, int] | None:
    """Returns the id of each grey level, (256,), and the id of the others; None if none is free."""
    known = known_colors(rules)
    is_grey = (known.colors == known.colors[:, :1]).all(axis=1)
    free = np.setdiff1d(np.arange(MAX_CLASSES), known.ids)
    if not len(free):
        return None
    table = np.full(256, free[-1], np.uint8)
    # If classes share a level, the first one is used.
    table[known.colors[is_grey, 0][::-1]] = known.ids[is_grey][::-1]
    return table, int(free[-1])


def _read_coded(coded: CodedMask, rules: MaskRules, name: str, *, is_lossy: bool) -> MaskReading:
    shades = coded.shades
    ids = lookup(coded.ids[shades.nearest], coded.codes)
    counts = np.where(shades.is_exact, 0, coded.counts)
    num_colors = int(np.count_nonzero(counts))
    if not num_colors:
        return MaskReading(ids)
    has_few = num_colors <= FEW_COLORS and not is_lossy
    if has_few:
        _refuse_ignore_id(coded, np.flatnonzero(counts), rules, name=name)
    # Most masks have unmapped pixels only along the edges of a few areas.
    box = _box_around(lookup(~shades.is_exact, coded.codes))
    codes = np.ascontiguousarray(coded.codes[box])
    assigned = assign_classes(codes, shades)
    kind = kind_of(coded.codes, shades) if has_few else "noisy"
    areas = find_solid_areas(codes, shades, assigned, coded.counts, kind)
    if areas:
        _refuse_areas(areas, box, coded, rules, name=name)
    ids[box] = lookup(coded.ids, assigned.index)
    common = _commonest(counts, MAX_COLORS_KEPT)
    colors = zip(
        map(tuple, coded.colors_of(common).tolist()),
        counts[common].tolist(),
        coded.ids[shades.nearest[common]].tolist(),
        strict=True,
    )
    num_unexplained = int(np.count_nonzero(assigned.is_unexplained))
    kept = tuple(UnmappedColor(*each) for each in colors)
    reading = MaskReading(ids, int(counts.sum()), kept, num_unexplained)
    if _is_empty(ids, rules.ignore_id):
        _refuse_unexplained(reading, coded, np.flatnonzero(counts), rules, name=name)
    return reading


def _commonest(counts: npt.NDArray[np.integer], number: int) -> npt.NDArray[np.intp]:
    """Returns the places of the largest counts above 0, the first of equal ones first."""
    largest = np.partition(counts, -number)[-number] if len(counts) > number else 0
    above = np.flatnonzero(counts > largest)
    if largest:
        above = np.concatenate([above, np.flatnonzero(counts == largest)[: number - len(above)]])
    # In blocks of equal counts, places ascend.
    return above[np.argsort(-counts[above].astype(np.int64), kind="stable")]


def _refuse_ignore_id(
    coded: CodedMask, off: npt.NDArray[np.integer], rules: MaskRules, *, name: str
) -> None:
    """Rejects a mask with the ignore id as a grey level beside colours of classes.

    Args:
        off: the unmapped colours of a mask with few of them. Among the levels of blends and noise,
            that level means nothing.
    """
    level = rules.ignore_id if rules.has_ignore_id else None
    if level is not None and (level,) * 3 in [coded.color_of(each) for each in off.tolist()]:
        raise ContentError(
            f"{name}: has colours, and the grey level {level}, which is only an id (--ignore-id); "
            f"to ignore its pixels give {options_to_ignore([(level,) * 3], rules)}, else choose "
            "another --ignore-id"
        )


def _box_around(flags: Flags) -> Box:
    """Returns the rows and columns of all set pixels, with the neighbourhood that counts."""
    rows, columns = (np.flatnonzero(flags.any(axis=axis)) for axis in (1, 0))
    top, left = (max(int(each[0]) - MARGIN, 0) for each in (rows, columns))
    return slice(top, int(rows[-1]) + MARGIN + 1), slice(left, int(columns[-1]) + MARGIN + 1)


def _is_empty(class_ids: ClassIds, ignore_id: int | None) -> bool:
    foreground = class_ids if ignore_id is None else class_ids[class_ids != ignore_id]
    return not foreground.any()


def _refuse_areas(
    areas: Sequence[SolidArea], box: Box, coded: CodedMask, rules: MaskRules, *, name: str
) -> NoReturn:
    shown = areas[:_NUM_AREAS_NAMED]
    colors = list(dict.fromkeys(coded.color_of(area.code) for area in shown))
    found = [
        f"{area.num_pixels} pixels of {_named(coded.color_of(area.code))} at row "
        f"{box[0].start + area.row}, column {box[1].start + area.column}"
        for area in shown
    ]
    more = f" and {len(areas) - len(found)} more" if len(areas) > len(found) else ""
    raise NoClassError(
        f"{name}: has areas of a colour of no class: {'; '.join(found)}{more}; "
        f"{_remedy(colors, rules)}",
        list(dict.fromkeys(coded.color_of(area.code) for area in areas)),
    )


def _remedy(colors: Sequence[Color], rules: MaskRules) -> str:
    """Returns what reads or ignores pixels of `colors`, in the levels of the file."""
    added, options = option_to_add(colors[0], rules), options_to_ignore(colors, rules)
    remedies = [
        *([f"add {added}"] if added else []),
        *([f"ignore these pixels with {options}"] if options else []),
    ]
    return ", or ".join(remedies) or AS_8_BITS


def _named(color: Color) -> str:
    """Returns a colour in the levels of the file, in words."""
    kind = "colour" if max(color) < MAX_CLASSES else "grey level"
    return f"{kind} {color_text(color)}"


def _refuse_unexplained(
    reading: MaskReading,
    coded: CodedMask,
    off: npt.NDArray[np.integer],
    rules: MaskRules,
    *,
    name: str,
) -> None:
    """Rejects a mask that would become empty although it seems to have foreground.

    The faint rest of a lesion warped out of the image is a blend, close to the background's colour.
    A colour far from it, or grey levels 0, 1, 2 and so on without a gap, indicate a mask of other
    classes. Its foreground would be lost without a message.

    Args:
        off: the unmapped colours.
    """
    colors = coded.colors_of(off)
    levels = np.unique(colors)
    is_grey = np.all(colors == colors[:, :1])
    known = [level for each in rules.read_classes if (level := grey_level(each.color)) is not None]
    seen = np.union1d(levels, [level for level in known if level <= levels[-1]])
    is_id_like = is_grey and levels[-1] < _MAX_ID_LIKE and len(seen) == levels[-1] + 1
    # Grey of 9 to 15 bits in a 16-bit file, where white is not 65535.
    is_scaled = levels[-1] > 255
    if not (is_id_like or is_scaled or coded.shades.distances[off].max() >= _NOT_A_BLEND):
        return
    found = [each.color for each in reading.unmapped_colors[:NUM_COLORS_NAMED]]
    remedy = _remedy(found, rules)
    if is_id_like:
        remedy = f"if these are ids, give all {levels[-1] + 1} --classes; else {remedy}"
    raise NoClassError(
        f"{name}: would be read as empty, but has {reading.unmapped_pixels} pixels in colours of "
        f"no class: {', '.join(map(_named, found))}; {remedy}",
        found,
    )
