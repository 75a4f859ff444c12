"""Finds the meaning of colours, palettes and alpha channels in masks.

The colours of solid areas are classes. Colours near a commoner one are its noise, and colours
between two commoner ones are blends along edges.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from data_prep.masks.blends import is_blend
from data_prep.masks.class_names import (
    VOC_NAMES,
    VOID_COLOR,
    color_map_text,
    color_names,
    id_color,
    id_names,
)
from data_prep.masks.color_map import Color, grey_level
from data_prep.masks.decision.findings import (
    BLACK_AND_WHITE,
    Finding,
    Reading,
    black_and_white,
    certain,
    ids_reading,
    nonzero_reading,
    uncertain,
)
from data_prep.masks.decision.level_rules import (
    NEAR,
    instances_doubt,
    read_ids,
    read_levels,
    with_instances,
)
from data_prep.masks.statistics import VOID_LEVEL, MaskStatistics, ValueCount

Colors = Mapping[Color, ValueCount]

_BLACK: Color = (0, 0, 0)
_FEW_COLORS = 64  # of all masks; more are noise or blends
_FEW_THIN = 8  # colours without an area in masks of few colours
_MAX_TWIN = 3  # levels in each channel between two colours of one class
_MAX_CLASSES = 64
_MIN_SOLID = 9  # pixels
_MIN_SOLID_SHARE = 0.9  # of the pixels of all masks; photographs have less
_MIN_NOISY = 64  # solid pixels of a class in masks with noise or blends
_RARE_BACKGROUND = 0.05  # of all pixels
_MANY_COLORS = 6
_FEW_FILES = 3


def read_alpha() -> Reading:
    """Returns the reading of the alpha channel."""
    return Reading("alpha", black_and_white().classes, meaning="opaque is the foreground")


def read_palettes(masks: MaskStatistics, indices: Mapping[int, ValueCount]) -> Finding:
    """Returns the meaning of masks with palettes.

    Args:
        indices: counts of the indices that are not ignored.
    """
    palette = {index: color for index, color in masks.palette.items() if index in indices}
    colors = colors_of_palette(indices, palette)
    by_color = read_colors(colors, masks)
    if masks.num_voc == masks.kinds["palette"]:
        return read_voc(masks, indices)
    if is_grey_palette(palette):
        if all(grey_level(color) == index for index, color in palette.items()):
            return read_levels(indices, masks)
        if [palette[index] for index in sorted(palette)] == list(BLACK_AND_WHITE):
            black, white = (indices[index] for index in sorted(palette))
            return read_levels({0: black, 255: white}, masks)

    def with_colors(number: int, ignore: str | None) -> Reading:
        colors = [palette.get(index) for index in range(number)]
        return ids_reading(number, colors=colors, ignore=ignore)

    finding = read_ids(indices, masks, with_colors)
    if not finding.is_certain:
        ids = [each for each in finding.readings if each.encoding != "colour"]
        finding = Finding(finding.evidence, (*ids, *by_color.readings[:1]))
    return _doubted_palette(finding, by_color, masks, palette)


def _doubted_palette(
    finding: Finding, by_color: Finding, masks: MaskStatistics, palette: Mapping[int, Color]
) -> Finding:
    """Returns the finding, uncertain if the colours of the palettes mean something else."""
    reason = None
    if masks.num_other_palettes:
        reason = "the palettes of the masks differ"
    elif masks.num_twins:
        reason = "two indices of a palette have the same colour"
    elif _BLACK in palette.values() and palette.get(0) != _BLACK:
        reason = "black is not index 0 of the palette"
    if reason is None:
        return finding
    readings = dict.fromkeys((*finding.readings, *by_color.readings[:1]))
    return Finding((*finding.evidence, reason), tuple(readings))


def read_voc(masks: MaskStatistics, indices: Mapping[int, ValueCount]) -> Finding:
    """Returns the reading of masks with the palette of Pascal VOC: 255 is ignored."""
    inner = [index for index in indices if index != VOID_LEVEL]
    number = max(len(VOC_NAMES), 1 + max(inner, default=0))
    names = [*VOC_NAMES, *id_names(256)[len(VOC_NAMES) :]][:number]
    colors = [masks.palette.get(index, id_color(index)) for index in range(number)]
    reading = ids_reading(number, names=names, colors=colors, ignore="255")
    evidence = "the masks have the palette of Pascal VOC, whose index 255 is ignored"
    finding = certain(reading, evidence, "the classes have the names of Pascal VOC")
    doubt = instances_doubt(len(inner) - 1, masks)
    if doubt is None:
        return finding
    return Finding((*finding.evidence, doubt), with_instances((reading,), len(inner) - 1))


def is_grey_palette(palette: Mapping[int, Color]) -> bool:
    """Returns whether all colours are grey."""
    return all(grey_level(color) is not None for color in palette.values())


def colors_of_palette(
    indices: Mapping[int, ValueCount], palette: Mapping[int, Color]
) -> dict[Color, ValueCount]:
    """Returns the counts of the colours of indices."""
    result: dict[Color, ValueCount] = {}
    for index, count in indices.items():
        color = palette[index]
        result[color] = result[color] + count if color in result else count
    return result


def read_colors(
    colors: Colors,
    masks: MaskStatistics,
    ignored: tuple[Color, ...] = (),
    *,
    has_background: bool = False,
) -> Finding:
    """Returns the meaning of masks in colour.

    Args:
        colors: counts of the colours of all masks.
        ignored: colours that are ignored.
        has_background: the user says which colour is the background.
    """
    found = [color for color in solid_colors(colors) if color not in ignored]
    if not found or len(found) > _MAX_CLASSES:
        return uncertain("the masks have many colours, as photographs have")
    share = _share_near(colors, found, masks.num_left_out)
    void = colors.get(VOID_COLOR)
    ignore = None
    if void is not None and VOID_COLOR in found and void.is_border:
        found.remove(VOID_COLOR)
        ignore = ",".join(map(str, VOID_COLOR))
    named = join_colors(found)
    evidence = f"the masks have areas of the colours {named}, and {share:.1%} of all pixels are so"
    if ignore:
        evidence += f"; {ignore} is a thin border"
    if len(found) < 2:
        return uncertain(f"all masks have one colour, {named}", _of_colors([*found, (255, 0, 0)]))
    if share < _MIN_SOLID_SHARE:
        return uncertain(f"{evidence}, which is little for masks", _of_colors(found, ignore))
    if _BLACK not in found and not has_background:
        by_size = sorted(found, key=lambda color: -colors[color].num_pixels)
        readings = [
            _of_colors([first, *(color for color in found if color != first)], ignore)
            for first in by_size[:3]
        ]
        return uncertain(f"{evidence}; none of them is black, so any may be class 0", *readings)
    found = sorted(found, key=lambda color: color != _BLACK)
    notes = [] if has_background else _note_of_black(colors)
    finding = certain(_of_colors(found, ignore), evidence, *notes)
    return _doubted_colors(finding, colors, found, masks, ignore)


def _note_of_black(colors: Colors) -> list[str]:
    """Returns a hint if black is rare, as where every pixel has a label."""
    share = colors[_BLACK].num_pixels / sum(count.num_pixels for count in colors.values())
    if share >= _RARE_BACKGROUND:
        return []
    return [f"black covers {share:.1%}: if it is no background, give --background none"]


def _share_near(colors: Colors, found: list[Color], num_left_out: int) -> float:
    """Returns the share of pixels with a colour near one of `found`."""
    values = np.array(list(colors))
    distances = np.stack([np.abs(values - color).max(axis=1) for color in found])
    counts = np.array([count.num_pixels for count in colors.values()])
    num_near = counts[distances.min(axis=0) <= NEAR].sum()
    return float(num_near / max(counts.sum() + num_left_out, 1))


def _doubted_colors(
    finding: Finding, colors: Colors, found: list[Color], masks: MaskStatistics, ignore: str | None
) -> Finding:
    """Returns the finding, uncertain if some colours may be no classes."""
    thin = _thin_colors(colors)
    if thin:
        return _thin(finding, colors, found, thin, ignore)
    shades = _shades_of_lines(colors, found)
    if shades:
        found = [color for color in found if color not in shades]
        of_lines = replace(finding, readings=(_of_colors(found, ignore),))
        return _thin(of_lines, colors, found, shades, ignore)
    twins = [color for color in found if _is_twin(color, colors, found)]
    kept = [color for color in found if color not in twins]
    if twins and len(kept) > 1:
        reason = f"{join_colors(twins)} is nearly the colour of another class, or the same class"
        merged = replace(
            _of_colors(kept, ignore), meaning=f"{join_colors(twins)} is noise of another class"
        )
        return Finding((*finding.evidence, reason), (merged, *finding.readings))
    rare = [color for color in found[1:] if colors[color].num_flat < _MIN_NOISY]
    if rare and len(colors) > _FEW_COLORS:
        kept = [color for color in found if color not in rare]
        without = [_of_colors(kept, _join_ignored(ignore, rare))] if len(kept) > 1 else []
        reason = (
            f"{join_colors(rare)} covers a few pixels only: a class, or a mistake to be ignored"
        )
        return finding.doubted(reason, *without)
    once = [color for color in found[1:] if colors[color].num_files == 1]
    if masks.num_files >= _FEW_FILES and len(once) >= max(_MANY_COLORS, 0.8 * len(found[1:])):
        reason = f"{len(once)} colours are in one mask only, so colours may be single objects"
        return finding.doubted(reason, *(() if masks.num_jpeg else (nonzero_reading(ignore),)))
    return finding


def _thin(
    finding: Finding, colors: Colors, found: list[Color], thin: list[Color], ignore: str | None
) -> Finding:
    """Returns the readings of a few colours without an area: edges or single pixels, or lines."""
    named = join_colors(thin)
    is_one = len(thin) == 1
    areas = np.array(found)
    edges = replace(finding.readings[0], meaning=f"{named}: edges of other areas, or noise")
    ignored = _of_colors(found, _join_ignored(ignore, thin))
    lines = _of_colors([*found, *thin], ignore)
    is_edge = all(colors[color].is_stray or is_blend(np.array(color), areas) for color in thin)
    readings = (edges, ignored, lines) if is_edge else (lines, edges, ignored)
    reason = f"{named} {'has' if is_one else 'have'} no area"
    return Finding((*finding.evidence, reason), readings)


def _join_ignored(ignore: str | None, colors: list[Color]) -> str:
    return ";".join([*([ignore] if ignore else []), *(",".join(map(str, each)) for each in colors)])


def _is_twin(color: Color, colors: Colors, found: list[Color]) -> bool:
    """Returns whether a commoner colour is a few levels away."""
    number = colors[color].num_pixels
    return any(
        0 < max(abs(a - b) for a, b in zip(color, other, strict=True)) <= _MAX_TWIN
        and (colors[other].num_pixels, other) > (number, color)
        for other in found
    )


def _of_colors(colors: list[Color], ignore: str | None = None) -> Reading:
    if set(colors) == set(BLACK_AND_WHITE):
        names = ["background", "foreground"]
    else:
        names = ["background", *color_names(colors[1:])]
    first = ",".join(map(str, colors[0]))
    meaning = f"{first} is class 0, {join_colors(colors[1:])} are the others"
    if ignore is not None:
        meaning += f", {ignore} is ignored"
    return Reading("colour", color_map_text(names, colors), ignore, meaning)


def join_colors(colors: list[Color], limit: int = 6) -> str:
    """Returns the colours as text: 0,0,0; 255,0,0; long lists are cut."""
    shown = "; ".join(",".join(map(str, color)) for color in colors[:limit])
    return f"{shown} and {len(colors) - limit} more" if len(colors) > limit else shown


def solid_colors(colors: Colors) -> list[Color]:
    """Returns the colours of solid areas in the order of red, green, blue.

    Masks of a few colours have all with areas as classes. In other masks, colours near a commoner
    one are its noise, and colours between two commoner ones are blends.
    """
    thin = _without_area(colors)
    if len(colors) <= _FEW_COLORS and len(thin) <= _FEW_THIN:
        areas = sorted(color for color in colors if color not in thin)
        return areas if len(areas) > 1 else sorted(colors)
    found: list[Color] = []
    for color in sorted(colors, key=lambda color: (-colors[color].num_flat, color)):
        if colors[color].num_flat < _MIN_SOLID:
            break
        distances = [max(abs(a - b) for a, b in zip(color, other, strict=True)) for other in found]
        if min(distances, default=255) > NEAR and not _is_rare_blend(color, colors, found):
            found.append(color)
    ends = [_near_end(color) for color in found]
    if len(found) == 2 and set(ends) == set(BLACK_AND_WHITE):
        return [*BLACK_AND_WHITE]
    return sorted(found)


def _without_area(colors: Colors) -> list[Color]:
    # A border of ignored pixels is thin.
    return sorted(c for c, count in colors.items() if not count.is_area and c != VOID_COLOR)


def _thin_colors(colors: Colors) -> list[Color]:
    """Returns the colours without an area, if there are few beside two or more with areas."""
    thin = _without_area(colors)
    is_few = len(colors) <= _FEW_COLORS and len(thin) <= _FEW_THIN
    return thin if is_few and len(colors) - len(thin) > 1 else []


def _shades_of_lines(colors: Colors, found: list[Color]) -> list[Color]:
    """Returns the thin colours between two others, where only the background has an area."""
    thin = [color for color in _without_area(colors) if color in found]
    if len(thin) < 2 or len(found) - len(thin) != 1:
        return []
    others = {color: [other for other in found if other != color] for color in thin}
    return [color for color in thin if is_blend(np.array(color), np.array(others[color]))]


def _is_rare_blend(color: Color, colors: Colors, found: list[Color]) -> bool:
    """Returns whether a colour is between two commoner ones and mostly at edges."""
    count = colors[color]
    if 2 * count.num_solid > count.num_pixels:
        return False
    return is_blend(np.array(color), np.array(found).reshape(-1, 3))


def _near_end(color: Color) -> Color | None:
    for end in BLACK_AND_WHITE:
        if max(abs(a - b) for a, b in zip(color, end, strict=True)) <= NEAR:
            return end
    return None
