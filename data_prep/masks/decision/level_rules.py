"""Finds the meaning of grey levels and ids: one plane of values in each mask.

Certain are 0 and 255; 0 and 1; ids without gaps; 255 as a thin border around ids; evenly spaced
solid levels from 0 to 255; and black and white with soft or noisy edges. Anything else has several
readings, between which the user chooses.
"""

from collections.abc import Mapping, Sequence

from data_prep.masks.decision.findings import (
    Finding,
    Reading,
    black_and_white,
    certain,
    grey_levels_reading,
    ids_reading,
    join_values,
    uncertain,
)
from data_prep.masks.statistics import VOID_LEVEL, MaskStatistics, ValueCount

Levels = Mapping[int, ValueCount]

NEAR = 32  # levels around black and white that noise reaches
_MIN_NEAR = 0.9  # of the pixels of a mask in black and white
_MAX_GAP_ID = 64  # higher values are grey levels, not ids with gaps
_MAX_CLASSES = 32  # grey levels that are proposed as classes
_MIN_SOLID = 9  # pixels
_STEP_16_BIT = 257
_MIN_INSTANCES = 3  # ids in the mask that has most
_FEW_FILES = 3
_MANY_IDS = 8
_IS_SINGLE = 0.9  # of all ids


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
        return finding.doubted("the masks have 16 bits, as masks of instances often have")
    return finding


def read_ids(levels: Levels, masks: MaskStatistics, ids: Reading | None = None) -> Finding:
    """Returns the meaning of ids, 0..255, which may have gaps and 255 as ignored value.

    Args:
        ids: the reading of these ids, if they have names or colours; else they have none.
    """
    values = [value for value in sorted(levels) if value != VOID_LEVEL]
    number = values[-1] + 1 if values else 1
    void = levels.get(VOID_LEVEL)
    reading = ids or ids_reading(max(number, 2), ignore=None if void is None else "255")
    seen = f"the masks have the ids {join_values(sorted(levels))}"
    if values != list(range(number)):
        missing = sorted(set(range(number)) - set(values))
        return uncertain(
            f"{seen}; {join_values(missing)} {'is' if len(missing) == 1 else 'are'} missing",
            reading,
            grey_levels_reading(values, ignore=reading.ignore),
        )
    if void is not None and not void.is_border:
        return uncertain(
            f"{seen}; the pixels of 255 are areas, which may be ignored pixels or a class",
            reading,
            grey_levels_reading([*values, VOID_LEVEL]),
        )
    doubt = _doubt_of_ids(levels, values, masks)
    evidence = [seen if void is None else f"{seen}; the pixels of 255 are a thin border"]
    finding = certain(reading, *evidence)
    return finding if doubt is None else finding.doubted(doubt)


def note_of_white(levels: Levels) -> list[str]:
    """Returns a hint if white covers more than half of the pixels, as the space between cells."""
    num_pixels = sum(count.num_pixels for count in levels.values())
    num_white = sum(count.num_pixels for level, count in levels.items() if level >= 255 - NEAR)
    if num_white <= num_pixels // 2:
        return []
    share = num_white / num_pixels
    return [f"white covers {share:.0%}: if black is the object, give --background white"]


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
        return _soft(levels)
    if others == list(range(len(others))) and len(others) > 1:
        return read_ids(levels, masks)
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


def _soft(levels: Levels) -> Finding:
    num_between = sum(NEAR < value < 255 - NEAR for value in levels)
    evidence = "the masks are black and white, with soft edges or noise"
    finding = certain(black_and_white(), evidence)
    if num_between != 1 or len(levels) != 3:
        return finding
    middle = next(value for value in levels if 0 < value < 255)
    asked = uncertain(
        f"the masks have the values {join_values(sorted(levels))}; {middle} has no solid area",
        black_and_white(f"{middle} is the edge of the white areas"),
        Reading(
            "colour",
            black_and_white().classes,
            str(middle),
            f"white is the foreground, {middle} is ignored",
        ),
        grey_levels_reading(sorted(levels)),
    )
    return asked


def _evenly_spaced(levels: Levels) -> list[int]:
    """Returns the levels of the solid areas if they are evenly spaced from 0 to 255."""
    found = solid_levels(levels)
    if len(found) < 3 or found[0] != 0 or found[-1] != 255:
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
    found = solid_levels(levels)
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
        "which are no classes; save class ids below 255 with 8 bits"
    )
    spaced = _evenly_spaced(scaled)
    if spaced and all(value % _STEP_16_BIT == 0 for value in values):
        return Finding(finding.evidence, (grey_levels_reading(spaced),))
    return finding


def _occur_together(masks: MaskStatistics, first: int, second: int) -> bool:
    return any({first, second} <= values for values in masks.value_sets)


def _doubt_of_ids(levels: Levels, values: Sequence[int], masks: MaskStatistics) -> str | None:
    """Returns why the values may be no class ids, None if nothing suggests it."""
    if masks.num_jpeg:
        return "the files are JPEG, which changes ids; save the masks as PNG"
    rare = [
        value for value in values[2:] if not levels[value].num_solid and _is_rare(levels, value)
    ]
    if rare and len(rare) == len(values) - 2:
        return f"the pixels of {join_values(rare)} may be noise of compression"
    return _doubt_of_instances(masks)


def _is_rare(levels: Levels, value: int) -> bool:
    return 100 * levels[value].num_pixels < levels[1].num_pixels


def _doubt_of_instances(masks: MaskStatistics) -> str | None:
    """Returns why the ids may be numbers of single objects in each mask, such as cells."""
    sets = [values - {VOID_LEVEL} for values in masks.value_sets]
    is_numbered = all(values == set(range(len(values))) for values in sets)
    most = max((len(values) for values in sets), default=1) - 1
    varies = len({len(values) for values in sets if len(values) > 1}) > 1
    is_single = masks.num_single_ids >= _IS_SINGLE * masks.num_ids > 0
    if not (is_numbered and is_single):
        return None
    if (varies and most >= _MIN_INSTANCES) or (masks.num_files < _FEW_FILES and most >= _MANY_IDS):
        return (
            "each mask numbers its regions from 1, so the values may be single objects, which are "
            "no classes"
        )
    return None
