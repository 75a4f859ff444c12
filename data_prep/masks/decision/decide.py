"""Decides how all masks of a dataset are read, from statistics of their files.

    statistics = read_statistics(data, name="a.png", max_pixels=10**8) + ...
    decision = decide_masks(statistics)
    if decision.reading is None:
        for reading in decision.candidates: print(reading.meaning, reading.arguments())

Options that the user gives are kept, and only the others are decided. A decision that is not
certain has no reading, but candidates to choose from. `level_rules.py`, `color_rules.py` and
`void_rules.py` have the rules.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from data_prep.masks.class_names import color_map_text, color_names, id_names
from data_prep.masks.color_map import ClassColor, Color, grey_level, parse_color_map
from data_prep.masks.decision.color_rules import (
    colors_of_palette,
    is_grey_palette,
    read_alpha,
    read_colors,
    read_palettes,
)
from data_prep.masks.decision.findings import (
    Finding,
    MaskEncoding,
    Reading,
    black_and_white,
    certain,
    grey_levels_reading,
    ids_reading,
    join_values,
    nonzero_reading,
    uncertain,
)
from data_prep.masks.decision.level_rules import NEAR, read_ids, read_levels
from data_prep.masks.decision.void_rules import (
    IDS_AND_VOID,
    encoding_with_void,
    keep_foreground,
    may_be_void,
)
from data_prep.masks.statistics import VOID_LEVEL, MaskStatistics, ValueCount


@dataclass(frozen=True)
class GivenOptions:
    """The options about masks that the user gives.

    Attributes:
        encoding: what carries the classes; "auto": not given.
        classes: None: not given.
        ignored: colours and levels of ignored pixels; None: not given.
        ignore_id: id of ignored pixels in index masks; None: not given.
        background: name or colour of the background, or "none"; None: not given. Classes are then
            named by their colours, because black is no background by itself.
    """

    encoding: MaskEncoding = "auto"
    classes: tuple[ClassColor, ...] | None = None
    ignored: tuple[Color, ...] | None = None
    ignore_id: int | None = None
    background: str | None = None


@dataclass(frozen=True)
class MaskDecision:
    """How all masks of a dataset are read.

    Attributes:
        reading: encoding, classes and ignored pixels; None if the decision is not certain.
        evidence: short sentences about the masks, without a full stop.
        candidates: the possible readings if the decision is not certain, the likeliest first; may
            be empty, if the files do not look like masks.
    """

    reading: Reading | None
    evidence: tuple[str, ...]
    candidates: tuple[Reading, ...] = ()

    @property
    def is_certain(self) -> bool:
        """Whether the masks have one reading only."""
        return self.reading is not None

    def with_first(self, reading: Reading) -> "MaskDecision":
        """Returns the decision with one of its candidates as the first; a certain one as it is."""
        others = (each for each in self.candidates if each != reading)
        return self if self.is_certain else replace(self, candidates=(reading, *others))


def decide_masks(masks: MaskStatistics, given: GivenOptions | None = None) -> MaskDecision:
    """Returns how the masks are read.

    Args:
        masks: the statistics of all masks, or of a sample.
        given: the options of the user, which are kept.
    """
    given = given or GivenOptions()
    if given.encoding != "auto" and given.classes is not None:
        finding = certain(_with_given(Reading(given.encoding, ""), given), "the options say so")
    elif given.classes is not None:
        finding = _encoding_of(masks, given, given.classes)
    else:
        finding = _by_encoding(_rest(masks, given), masks, given)
    if given.ignored is None:
        finding = keep_foreground(finding, masks, given.classes)
    readings = tuple(dict.fromkeys(_with_given(each, given) for each in finding.readings))
    if finding.is_certain:
        return MaskDecision(readings[0], finding.evidence)
    return MaskDecision(None, finding.evidence, readings)


def _with_given(reading: Reading, given: GivenOptions) -> Reading:
    classes = reading.classes
    if given.background is not None and given.classes is None:
        classes = _named_alike(reading)
    if given.classes is not None and not reading.has_added:
        names = [entry.name for entry in given.classes]
        classes = color_map_text(names, [entry.color for entry in given.classes])
    ignore = reading.ignore
    if given.ignored is not None:
        ignore = ";".join(_text_of(color) for color in given.ignored) or None
    return replace(reading, classes=classes, ignore=ignore)


def _named_alike(reading: Reading) -> str:
    """Returns the classes with names that do not say which is the background."""
    classes = parse_color_map(reading.classes)
    colors = [entry.color for entry in classes]
    names = [entry.name for entry in classes]
    if reading.encoding == "colour":
        names = color_names(colors)
    elif names[1:] == id_names(len(names))[1:]:
        names = [f"class{i}" for i in range(len(names))]
    return color_map_text(names, colors)


def _text_of(color: Color) -> str:
    level = grey_level(color)
    return ",".join(map(str, color)) if level is None else str(level)


@dataclass(frozen=True)
class _Values:
    """The values of masks without the ignored ones."""

    levels: dict[int, ValueCount]
    indices: dict[int, ValueCount]
    colors: dict[Color, ValueCount]
    palette: dict[int, Color]


def _rest(masks: MaskStatistics, given: GivenOptions) -> _Values:
    ignored = given.ignored or ()
    levels = {given.ignore_id, *(grey_level(color) for color in ignored)}
    return _Values(
        {value: count for value, count in masks.levels.items() if value not in levels},
        {
            index: count
            for index, count in masks.indices.items()
            if index not in levels and masks.palette[index] not in ignored
        },
        {color: count for color, count in masks.colors.items() if color not in ignored},
        dict(masks.palette),
    )


def _all_colors(values: _Values) -> dict[Color, ValueCount]:
    """Returns the colours of grey masks, palettes and colour masks together."""
    result = dict(values.colors)
    others = colors_of_palette(values.indices, values.palette)
    greys = {(v, v, v): count for v, count in values.levels.items() if v <= 255}
    for colors in (others, greys):
        for color, count in colors.items():
            result[color] = result[color] + count if color in result else count
    return result


def _by_encoding(values: _Values, masks: MaskStatistics, given: GivenOptions) -> Finding:
    if given.encoding == "auto":
        return _automatic(values, masks, has_background=given.background is not None)
    if given.encoding == "mixed":
        return certain(Reading("mixed", black_and_white().classes), "the options say so")
    if given.encoding == "nonzero":
        return certain(nonzero_reading(), "the options say so")
    if given.encoding == "alpha":
        return certain(read_alpha(), "the options say so")
    if given.encoding == "index":
        return _as_ids(values, masks)
    finding = read_colors(
        _all_colors(values),
        masks,
        given.ignored or (),
        has_background=given.background is not None,
    )
    if not values.colors and not values.indices and values.levels:
        grey = read_levels(values.levels, masks)
        if grey.is_certain and grey.readings[0].encoding == "colour":
            return grey
        levels = sorted(values.levels)
        if 2 <= len(levels) <= 32 and levels[-1] <= 255:
            return certain(grey_levels_reading(levels), f"the levels are {join_values(levels)}")
    return finding


def _as_ids(values: _Values, masks: MaskStatistics) -> Finding:
    """Returns the reading of ids, which the user asks for."""
    if masks.colors:
        return uncertain("some masks are in colour and have no palette, so they have no ids")
    if not values.levels:
        automatic = _automatic(values, masks)
        if automatic.readings and automatic.readings[0].encoding == "index":
            return _settled(automatic)
    ids = {**values.levels, **values.indices}
    if not ids or max(ids) > 255:
        return uncertain("the masks have no ids from 0 to 255")
    return _settled(read_ids(ids, masks))


def _settled(finding: Finding) -> Finding:
    """Returns the finding as certain if one reading has ids: the user asks for ids."""
    ids = tuple(each for each in finding.readings if each.encoding == "index")
    return Finding(finding.evidence, ids, is_certain=len(ids) == 1)


def _automatic(values: _Values, masks: MaskStatistics, *, has_background: bool = False) -> Finding:
    if masks.num_alpha_shapes:
        number = masks.num_alpha_shapes + masks.num_transparent
        evidence = (
            f"{number} of {masks.num_files} masks have one colour, and their shape is in the alpha "
            "channel"
        )
        if number == masks.num_files:
            return certain(read_alpha(), evidence)
        return uncertain(evidence, read_alpha())
    if masks.num_classes:
        return _one_hot(values, masks)
    if values.colors:
        return read_colors(_all_colors(values), masks, has_background=has_background)
    if not values.indices:
        finding = read_levels(values.levels, masks)
        if has_background or not finding.is_certain or finding.readings != (black_and_white(),):
            return finding
        return certain(black_and_white(), *finding.evidence, *_note_of_white(values.levels))
    if not values.levels or is_grey_palette(values.palette):
        finding = read_palettes(masks, values.indices)
        return finding if not values.levels else _with_grey(finding, values, masks)
    ids = {**values.indices}
    for level, count in values.levels.items():
        ids[level] = ids[level] + count if level in ids else count
    if set(values.levels) <= set(values.indices):
        return read_palettes(masks, values.indices)
    return uncertain(
        "some masks have a palette, others grey levels that are no index of it",
        *read_palettes(masks, values.indices).readings[:1],
        *read_colors(_all_colors(values), masks).readings[:1],
    )


def _note_of_white(levels: Mapping[int, ValueCount]) -> list[str]:
    """Returns a hint if white covers more than half of the pixels, as the space between cells."""
    num_pixels = sum(count.num_pixels for count in levels.values())
    num_white = sum(count.num_pixels for level, count in levels.items() if level >= 255 - NEAR)
    if num_white <= num_pixels // 2:
        return []
    share = num_white / num_pixels
    return [f"white covers {share:.0%}: if black is the object, give --background white"]


def _with_grey(finding: Finding, values: _Values, masks: MaskStatistics) -> Finding:
    """Returns the meaning of grey masks if some of them have a palette of greys."""
    levels = dict(values.levels)
    for color, count in colors_of_palette(values.indices, values.palette).items():
        level = color[0]
        levels[level] = levels[level] + count if level in levels else count
    together = read_levels(levels, masks)
    if finding.readings and together.readings[:1] != finding.readings[:1]:
        return together.doubted("some masks have a palette of greys")
    return together


def _one_hot(values: _Values, masks: MaskStatistics) -> Finding:
    numbers = sorted(masks.num_classes)
    if len(numbers) > 1:
        return uncertain(f"one-hot masks have different numbers of classes: {numbers}")
    others = {*values.levels, *values.indices}
    if masks.colors or others - set(range(numbers[0])):
        return uncertain("some masks are one-hot, others have values that are no ids of them")
    evidence = f"the masks are one-hot with {numbers[0]} classes"
    return certain(ids_reading(max(numbers[0], 2)), evidence)


def _encoding_of(
    masks: MaskStatistics, given: GivenOptions, classes: Sequence[ClassColor]
) -> Finding:
    """Returns the encoding of masks of given classes."""
    values = _rest(masks, given)
    if masks.num_alpha_shapes:
        finding = _automatic(values, masks)
        return finding if len(classes) == 2 else finding.doubted("alpha has two classes")
    ids = {*values.levels, *values.indices}
    known = {entry.color for entry in classes}
    if VOID_LEVEL in ids - set(range(len(classes))) and (VOID_LEVEL,) * 3 not in known:
        return encoding_with_void(masks, ids, classes)
    is_ids = not masks.colors and ids <= set(range(len(classes)))
    colors = _all_colors(values)
    is_colors = set(colors) <= known and all(value <= 255 for value in values.levels)
    if may_be_void(masks, values.levels, classes):
        return uncertain(
            "the masks have areas of class ids, and 255, the level of a class",
            IDS_AND_VOID,
            Reading("colour", "", meaning="255 is its class, and other ids are noise"),
        )
    if is_ids and is_colors and not _same_meaning(values, classes):
        return uncertain(
            "the indices of the palettes and their colours are of different classes",
            Reading("index", "", meaning="indices are class ids"),
            Reading("colour", "", meaning="colours are classes"),
        )
    if is_ids and not is_colors:
        return certain(Reading("index", ""), "all values of the masks are class ids")
    if is_colors or not _are_mixed(masks, values, classes):
        return certain(Reading("colour", ""), "the masks have the colours of classes")
    return uncertain(
        "some masks have class ids, others the colours of classes",
        Reading("mixed", "", meaning="each mask has class ids or colours"),
        Reading("colour", "", meaning="all masks have colours"),
    )


def _same_meaning(values: _Values, classes: Sequence[ClassColor]) -> bool:
    """Returns whether the indices and their colours are of the same classes."""
    by_color = {entry.color: entry.id for entry in classes}
    return all(by_color[values.palette[index]] == index for index in values.indices)


def _are_mixed(masks: MaskStatistics, values: _Values, classes: Sequence[ClassColor]) -> bool:
    """Returns whether some grey masks have class ids that are no colours of classes."""
    ids = set(range(len(classes)))
    levels = {grey_level(entry.color) for entry in classes}
    kept = {*values.levels, *values.indices}
    sets = [each & kept for each in masks.value_sets]
    return any(each <= ids and not each <= levels for each in sets)


def classes_of(reading: Reading) -> tuple[ClassColor, ...]:
    """Returns the classes of a reading."""
    return parse_color_map(reading.classes)
