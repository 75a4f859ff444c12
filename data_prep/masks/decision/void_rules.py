"""Decides whether the value 255 is void, which means ignored pixels, beside class ids.

A reading that ignores all foreground is hardly meant.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from data_prep.masks.class_names import color_map_text
from data_prep.masks.color_map import ClassColor, grey_level, parse_color_map, parse_ignored
from data_prep.masks.decision.findings import (
    BLACK_AND_WHITE,
    Finding,
    Reading,
    certain,
    nonzero_reading,
    uncertain,
)
from data_prep.masks.statistics import VOID_LEVEL, MaskStatistics, ValueCount

IDS_AND_VOID = Reading("index", "", "255", "values are class ids, and 255 is ignored")


def keep_foreground(
    finding: Finding, masks: MaskStatistics, classes: Sequence[ClassColor] | None
) -> Finding:
    """Returns the finding; readings that ignore all foreground are last, and never the only one.

    Args:
        classes: the classes that the user gives; None: not given.
    """
    kept = [each for each in finding.readings if _has_foreground(each, masks)]
    lost = [each for each in finding.readings if each not in kept]
    if not lost or (kept and not finding.is_certain):
        return Finding(finding.evidence, (*kept, *lost), finding.is_certain)
    others = [nonzero_reading()] if classes is None or len(classes) == 2 else []
    reason = f"without {lost[0].ignore} no foreground is left"
    return Finding((*finding.evidence, reason), (*others, *lost) if others else ())


def _has_foreground(reading: Reading, masks: MaskStatistics) -> bool:
    """Returns whether areas or lines of some foreground remain beside the ignored pixels."""
    ignored = parse_ignored((reading.ignore or "").split(";"))
    levels = {grey_level(color) for color in ignored}
    ids = {**masks.levels, **masks.indices}
    if masks.colors.keys().isdisjoint(ignored) and ids.keys().isdisjoint(levels):
        return True  # nothing is ignored
    background = (
        parse_color_map(reading.classes)[0].color if reading.classes else BLACK_AND_WHITE[0]
    )
    left = [count for color, count in masks.colors.items() if color not in (background, *ignored)]
    left += [count for value, count in ids.items() if value not in (0, *levels)]
    return any(not count.is_stray for count in left)


def encoding_with_void(
    masks: MaskStatistics, ids: Collection[int], classes: Sequence[ClassColor]
) -> Finding:
    """Returns the encoding of masks with the value 255, which no class has."""
    colour = Reading("colour", "", meaning="all masks have the colours of classes")
    number = len(classes)
    if masks.colors or set(ids) - {VOID_LEVEL} - set(range(number)):
        return certain(colour, "the masks have other values than class ids")
    counts = [each[VOID_LEVEL] for each in (masks.levels, masks.indices) if VOID_LEVEL in each]
    is_voc = masks.num_voc == masks.num_files
    if is_voc or all(count.is_border for count in counts):
        return certain(
            IDS_AND_VOID, "all values of the masks are class ids, and 255 is a void border"
        )
    reason = "the pixels of 255 are no border around areas, and no class has this value"
    if number == 2:
        words = f"all values but 0 are {classes[1].name}"
        nonzero = [replace(nonzero_reading(), classes="", meaning=words)]
    else:
        nonzero = []
    if set(ids) == {0, VOID_LEVEL} and number == 2:
        return uncertain(reason, *nonzero, IDS_AND_VOID)
    # The classes have the levels of their ids, so that 255 can be one more.
    colors = [(i, i, i) for i in range(number)] + [(VOID_LEVEL,) * 3]
    added = Reading(
        "colour",
        color_map_text([*(each.name for each in classes), f"class{number}"], colors),
        meaning=f"values are class ids, and 255 is the class {number}",
        has_added=True,
    )
    return uncertain(reason, IDS_AND_VOID, *nonzero, added)


def may_be_void(
    masks: MaskStatistics, levels: Mapping[int, ValueCount], classes: Sequence[ClassColor]
) -> bool:
    """Returns whether 255, the level of a class, may be void beside class ids.

    So it is if another id, whose level no class has, covers areas of the same masks.
    """
    known = {grey_level(entry.color) for entry in classes}
    ids = set(levels) - {VOID_LEVEL}
    if masks.colors or VOID_LEVEL not in levels or not ids <= set(range(len(classes))):
        return False
    return any(
        levels[each].num_solid and any({each, VOID_LEVEL} <= seen for seen in masks.value_sets)
        for each in ids - known
    )
