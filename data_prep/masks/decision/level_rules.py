"""Finds the meaning of grey levels and ids: one plane of values in each mask.

Certain are 0 and 255; 0 and 1; ids without gaps that all have areas; 255 as a thin border around
areas of ids; evenly spaced levels from 0 to 255 that all have areas; and black and white with soft
edges of many levels, or noise. Anything else has several readings, between which the user chooses.
"""

from collections.abc import Callable, Mapping, Sequence

from data_prep.masks.decision.findings import (
    Finding,
    Reading,
    black_and_white,
    certain,
    grey_levels_reading,
    ids_reading,
    join_values,
    nonzero_reading,
    uncertain,
)
from data_prep.masks.statistics import VOID_LEVEL, MaskStatistics, ValueCount

Levels = Mapping[int, ValueCount]
MakeReading = Callable[[int, str | None], Reading]
"""Returns the reading of ids: their number, and the text of ignored values."""

NEAR = 32  # levels around black and white that noise reaches
_MIN_NEAR = 0.9  # of the pixels of a mask in black and white
_MAX_GAP_ID = 64  # higher values are grey levels, not ids with gaps
_MAX_CLASSES = 32  # grey levels that are proposed as classes
_MIN_SOLID = 9  # pixels
_MIN_APART = 20  # levels between areas in masks with noise or soft edges
_STEP_16_BIT = 257
_FEW_LEVELS = 8  # between black and white; more are soft edges
_MIN_INSTANCES = 3  # ids in the mask that has most
_MANY_IDS = 8
_IS_SINGLE = 0.75  # of all ids


def read_levels(levels: Levels, masks: MaskStatistics) -> Finding:
    """Returns the meaning of grey levels.

    Args:
        levels: counts of the levels that are not ignored, 0..65535.
        masks: the statistics of the files.
    """
    values = sorted(levels)
    if not values or values == [0]:
        return certain(black_and_white(), "no mask of the sample has foreground")
    if values[-1] > 255:
        return _read_16_bits(levels, masks)
    if values == [0, 255]:
        evidence = "the masks have the values 0 and 255"
        return certain(black_and_white(), evidence)
    if values == [0, 1]:
        return certain(ids_reading(2), "the masks have the values 0 and 1")
    if len(values) == 1:
        return _one_value(values[0])
    finding = _read_8_bits(levels, values, masks)
    if masks.num_16_bit and finding.is_certain:
        doubt = "the masks have 16 bits, as masks of instances often have"
        return finding.doubted(doubt, nonzero_reading())
    return finding


def _plain_ids(number: int, ignore: str | None) -> Reading:
    return ids_reading(number, ignore=ignore)


def read_ids(
    levels: Levels, masks: MaskStatistics, make_reading: MakeReading = _plain_ids
) -> Finding:
    """Returns the meaning of ids, 0..255, which may have gaps and 255 as ignored value.

    Args:
        make_reading: makes the reading of ids with their names and colours, if they have some.
    """
    values = [value for value in sorted(levels) if value != VOID_LEVEL]
    number = values[-1] + 1 if values else 1
    void = levels.get(VOID_LEVEL)
    ignore = None if void is None else "255"
    reading = make_reading(max(number, 2), ignore)
    seen = f"the masks have the ids {join_values(sorted(levels))}"
    doubt = instances_doubt(len(values) - 1, masks)
    if values != list(range(number)):
        missing = sorted(set(range(number)) - set(values))
        every = (reading, grey_levels_reading(values, ignore=ignore))
        finding = uncertain(
            f"{seen}; {join_values(missing)} {'is' if len(missing) == 1 else 'are'} missing",
            *(every if doubt is None else with_instances(every, len(values) - 1)),
        )
        return finding if doubt is None else finding.doubted(doubt)
    if void is not None and not void.is_border:
        return uncertain(
            f"{seen}; 255 is no border around areas, so it may be ignored pixels or a class",
            *_white_reading(levels, values),
            reading,
            grey_levels_reading([*values, VOID_LEVEL]),
            nonzero_reading(),
        )
    border = "" if void is None else "; the pixels of 255 are a thin border"
    finding = certain(reading, f"{seen}{border}")
    if doubt is not None:
        return Finding(finding.evidence, with_instances((reading,), len(values) - 1)).doubted(doubt)
    return _doubted_ids(finding, levels, values, make_reading, masks)


def _white_reading(levels: Levels, values: Sequence[int]) -> list[Reading]:
    """Returns the reading that only 255 is foreground, if no other id has an area."""
    if any(levels[value].is_area for value in values[1:]):
        return []
    named = join_values(values[1:])
    meaning = f"255 is the foreground, {named} {'is' if len(values) == 2 else 'are'} ignored"
    return [Reading("colour", black_and_white().classes, ";".join(map(str, values[1:])), meaning)]


def _one_value(value: int) -> Finding:
    return uncertain(
        f"all masks have only the value {value}", black_and_white(), ids_reading(max(value + 1, 2))
    )


def _read_8_bits(levels: Levels, values: Sequence[int], masks: MaskStatistics) -> Finding:
    others = [value for value in values if value != VOID_LEVEL]
    if others == [0, 1] and not _occur_together(masks, 1, VOID_LEVEL):
        return uncertain(
            "some masks have the values 0 and 1, others 0 and 255",
            Reading(
                "mixed",
                black_and_white().classes,
                meaning="1 and 255 are both the foreground",
            ),
            ids_reading(2, ignore="255"),
        )
    if is_black_and_white(levels):
        rivals = _rivals(levels) if not masks.num_jpeg else []
        return _ask_of_rivals(levels, rivals, masks) if rivals else _soft(levels)
    if others == list(range(len(others))) and len(others) > 1:
        return read_ids(levels, masks)
    thin = _thin_levels(levels)
    if thin:
        return _ask_of_thin(levels, thin)
    spaced = _evenly_spaced(levels)
    if spaced:
        evidence = f"the masks have areas of the evenly spaced grey levels {join_values(spaced)}"
        finding = certain(grey_levels_reading(spaced), evidence)
        if masks.num_jpeg or not _is_exact(levels, spaced):
            finding = finding.doubted(
                "the masks have noise, so one of the levels may be no class of its own"
            )
        return finding
    if others[-1] < _MAX_GAP_ID:
        return read_ids(levels, masks)
    return _uneven(levels)


def is_black_and_white(levels: Levels) -> bool:
    """Returns whether the levels are black and white with noise or soft edges."""
    num_pixels = sum(count.num_pixels for count in levels.values())
    black = [count for value, count in levels.items() if value <= NEAR]
    white = [count for value, count in levels.items() if value >= 255 - NEAR]
    between = [count for value, count in levels.items() if NEAR < value < 255 - NEAR]
    num_near = sum(count.num_pixels for count in (*black, *white))
    # Ids below 32 with 255 as ignored value have no levels near white but 255 itself.
    has_shades = bool(between) or len(white) > 1 or 255 not in levels
    return (
        num_near > _MIN_NEAR * num_pixels
        and has_shades
        and all(sum(each.num_flat for each in end) >= _MIN_SOLID for end in (black, white))
        and sum(each.num_flat for each in between) < _MIN_SOLID
    )


def _rivals(levels: Levels) -> list[int]:
    """Returns the levels near black or white that have areas beside a commoner one.

    Of many levels, those close to the commoner one are noise.
    """
    distance = _MIN_APART if len(levels) > _MAX_CLASSES else 0
    found: list[int] = []
    for is_white in (False, True):
        end = [v for v in levels if (v >= 255 - NEAR if is_white else v <= NEAR)]
        end = [v for v in end if levels[v].num_solid >= max(_MIN_SOLID, levels[v].num_pixels // 10)]
        end.sort(key=lambda value: levels[value].num_pixels)
        found += [value for value in end[:-1] if abs(value - end[-1]) > distance]
    return sorted(found)


def _ask_of_rivals(levels: Levels, rivals: Sequence[int], masks: MaskStatistics) -> Finding:
    """Returns the readings of levels near black or white: noise, or classes of their own."""
    named = join_values(rivals)
    # The edges of many levels have a few flat pixels.
    least = _MIN_SOLID if len(levels) > _MAX_CLASSES else 0
    areas = [v for v in sorted(levels) if levels[v].is_area and levels[v].num_solid >= least]
    every = [each for each in areas if NEAR < each < 255 - NEAR or each in rivals]
    classes = grey_levels_reading(sorted({0, 255, *every}))
    noise = black_and_white(f"{named}: noise of black or white")
    is_beside = any(
        _occur_together(masks, rival, other)
        for rival in rivals
        for other in areas
        if other != rival and abs(other - rival) <= NEAR
    )
    return uncertain(
        f"the masks have areas of {join_values(areas)}: several levels near black or white",
        *((classes, noise) if is_beside else (noise, classes)),
    )


def _soft(levels: Levels) -> Finding:
    thin = _thin_levels(levels)
    if thin:
        return _ask_of_thin(levels, thin)
    return certain(black_and_white(), "the masks are black and white, with soft edges or noise")


def _thin_levels(levels: Levels) -> list[int]:
    """Returns the levels between black and white that have no area, if there are few."""
    between = [value for value in sorted(levels) if NEAR < value < 255 - NEAR]
    has_ends = min(levels) <= NEAR and max(levels) >= 255 - NEAR
    if not has_ends or len(between) > _FEW_LEVELS:
        return []
    return [value for value in between if not levels[value].is_area]


def _ask_of_thin(levels: Levels, thin: Sequence[int]) -> Finding:
    """Returns the readings of a few levels without an area: edges of other areas, or lines."""
    every = [value for value in sorted(levels) if NEAR < value < 255 - NEAR]
    kept = [0, *(value for value in every if value not in thin), 255]
    named = join_values(thin)
    is_one = len(thin) == 1
    classes = grey_levels_reading(kept).classes
    edges = Reading(
        "colour",
        classes,
        meaning=f"{named} {'is the edge' if is_one else 'are the edges'} of other areas",
    )
    ignored = Reading(
        "colour",
        classes,
        ";".join(map(str, thin)),
        f"{named} {'is' if is_one else 'are'} ignored",
    )
    lines = grey_levels_reading([0, *every, 255])
    num_between = sum(levels[value].num_between for value in thin)
    is_edge = 2 * num_between >= sum(levels[value].num_pixels for value in thin)
    return uncertain(
        f"the masks have the values {join_values(sorted(levels))}; {named} "
        f"{'has' if is_one else 'have'} no area",
        *((edges, ignored, lines) if is_edge else (lines, edges, ignored)),
    )


def _evenly_spaced(levels: Levels) -> list[int]:
    """Returns the levels of the solid areas if they are evenly spaced from 0 to 255."""
    found = solid_levels(levels)
    if len(found) < 3 or found[0] != 0 or found[-1] != 255:
        return []
    if not all(levels[value].is_area for value in found[1:-1]):
        return []
    step = 255 / (len(found) - 1)
    is_even = all(abs(level - i * step) <= 1 for i, level in enumerate(found))
    return found if is_even else []


def solid_levels(levels: Levels) -> list[int]:
    """Returns the levels of solid areas; those around a commoner level are its noise."""
    if len(levels) <= _MAX_CLASSES:
        return sorted(value for value, count in levels.items() if count.num_pixels)
    found: list[int] = []
    order = sorted(levels, key=lambda value: -levels[value].num_flat)
    for value in order:
        is_noise = any(abs(value - other) <= NEAR // 2 for other in found)
        if not is_noise and levels[value].num_flat >= _MIN_SOLID:
            found.append(value)
    return sorted(found)


def _is_exact(levels: Levels, found: Sequence[int]) -> bool:
    """Returns whether nearly all flat pixels have one of the levels."""
    every = sum(count.num_flat for count in levels.values())
    return sum(levels[value].num_flat for value in found) >= 0.98 * every


def _uneven(levels: Levels) -> Finding:
    every = solid_levels(levels)
    found = [value for value in every if levels[value].is_area or value in (every[0], every[-1])]
    solid = sum(levels[value].num_flat for value in found)
    if len(found) < 2 or len(found) > _MAX_CLASSES:
        return uncertain("the masks have many grey levels, as photographs have")
    share = solid / sum(count.num_pixels for count in levels.values())
    readings = [grey_levels_reading(found)]
    if len(found) == 2:
        readings[0] = Reading("colour", readings[0].classes, meaning=f"{found[1]} is foreground")
    return uncertain(
        f"the masks have areas of the grey levels {join_values(found)}, {share:.0%} of all "
        "pixels; they are neither ids nor evenly spaced from 0 to 255",
        *readings,
        *([grey_levels_reading(every)] if len(found) < len(every) <= _MAX_CLASSES else []),
    )


def _read_16_bits(levels: Levels, masks: MaskStatistics) -> Finding:
    scaled: dict[int, ValueCount] = {}
    for value, count in levels.items():
        level = round(value / _STEP_16_BIT)
        scaled[level] = scaled[level] + count if level in scaled else count
    if set(levels) <= {0, 65535}:
        return certain(black_and_white(), "the masks have the 16-bit values 0 and 65535")
    if not masks.num_left_out and is_black_and_white(scaled):
        return _soft(scaled)
    values = sorted(levels)
    finding = uncertain(
        f"the masks have 16-bit values: {join_values(values)}; they may be ids of single objects, "
        "which are no classes; save class ids below 255 with 8 bits",
        nonzero_reading(),
    )
    spaced = _evenly_spaced(scaled)
    if spaced and all(value % _STEP_16_BIT == 0 for value in values):
        return Finding(finding.evidence, (grey_levels_reading(spaced), *finding.readings))
    return finding


def _occur_together(masks: MaskStatistics, first: int, second: int) -> bool:
    return any({first, second} <= values for values in masks.value_sets)


def _doubted_ids(
    finding: Finding,
    levels: Levels,
    values: Sequence[int],
    make_reading: MakeReading,
    masks: MaskStatistics,
) -> Finding:
    """Returns the finding, uncertain if some values may be no class ids."""
    if masks.num_jpeg:
        return finding.doubted("the files are JPEG, which changes ids; save the masks as PNG")
    rare = [
        value for value in values[2:] if not levels[value].num_solid and _is_rare(levels, value)
    ]
    if rare and len(rare) == len(values) - 2:
        reason = f"the pixels of {join_values(rare)} may be noise of compression"
    else:
        rare = [value for value in values[1:] if levels[value].is_stray]
        reason = (
            f"{join_values(rare)} covers a few pixels only: a class, or a mistake to be ignored"
        )
    if not rare or len(rare) == len(values) - 1:
        return finding
    ignore = ";".join(map(str, [*rare, *([VOID_LEVEL] if VOID_LEVEL in levels else [])]))
    kept = [value for value in values if value not in rare]
    is_last = kept == list(range(len(kept)))
    without = (
        make_reading(len(kept), ignore) if is_last else grey_levels_reading(kept, ignore=ignore)
    )
    return Finding(finding.evidence, (without, *finding.readings)).doubted(reason)


def _is_rare(levels: Levels, value: int) -> bool:
    return 100 * levels[value].num_pixels < levels[1].num_pixels


def instances_doubt(num_ids: int, masks: MaskStatistics) -> str | None:
    """Returns why ids may be numbers of single objects, such as cells; None if they hardly are.

    Args:
        num_ids: different ids of all masks.
    """
    is_single = masks.num_single_ids >= _IS_SINGLE * masks.num_ids > 0
    if not is_single:
        return None
    is_numbered = masks.num_numbered == sum(masks.id_counts.values())
    if is_numbered and len(masks.id_counts) > 1 and max(masks.id_counts) >= _MIN_INSTANCES:
        return (
            "each mask numbers its regions from 1, so the values may be single objects, which are "
            "no classes"
        )
    if num_ids >= _MANY_IDS:
        return (
            f"most of the {num_ids} ids are one region in each mask, so they may be single "
            "objects, which are no classes"
        )
    return None


def with_instances(readings: tuple[Reading, ...], num_ids: int) -> tuple[Reading, ...]:
    """Returns readings of ids that may be numbers of single objects, and that of all as one class.

    Of few ids it is the last one: organs have one region each too.
    """
    nonzero = nonzero_reading(readings[0].ignore)
    return (*readings, nonzero) if num_ids < _MANY_IDS else (nonzero, *readings)
