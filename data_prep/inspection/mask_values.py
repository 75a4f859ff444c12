"""Describes the values and colours of masks: which are classes, ignored, blends, noise or unknown.

The meaning of the masks is decided in `masks/decision`; this module explains it value by value.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from data_prep.inspection.findings import OthersFinding, ValueFinding
from data_prep.masks.blends import is_blend
from data_prep.masks.coding import nearest_of, tolerances_of
from data_prep.masks.color_map import (
    ClassColor,
    Color,
    grey_level,
    parse_color_map,
    parse_ignored,
)
from data_prep.masks.decision.findings import MaskEncoding, Reading
from data_prep.masks.statistics import MaskStatistics, ValueCount

_MAX_NOISE = 4  # classes whose noise is counted apart
MAX_LISTED = 12  # values without a class
_MAX_VALUES = 64  # of the masks of a pair that are listed
_MIN_SOLID = 9  # pixels whose neighbours are equal


def describe_values(
    masks: MaskStatistics, reading: Reading | None, areas: Collection[Color] = ()
) -> tuple[tuple[ValueFinding, ...], tuple[OthersFinding, ...]]:
    """Returns the values of the masks, classes first; and noise, blends and rare values by kind.

    Args:
        reading: how the masks are read; None if that is not known.
        areas: values of no class for which masks cannot be read.
    """
    meanings = _Meanings(reading)
    values: list[tuple[str, int | None, Color | None, ValueCount]] = [
        *((str(level), level, _grey(level), count) for level, count in masks.levels.items()),
        *(
            (f"{index} ({_text(masks.palette[index])})", index, masks.palette[index], count)
            for index, count in masks.indices.items()
        ),
        *((_text(color), None, color, count) for color, count in masks.colors.items()),
    ]
    total = max(1, masks.num_pixels)
    merged: dict[tuple[str, str, str], ValueFinding] = {}
    for text, value_id, color, count in values:
        kind, words = meanings.of(value_id, color, count)
        if color in areas and kind not in (_CLASS, _IGNORED):
            kind, words = _AREA, _AREA
        share, num_files = count.num_pixels / total, count.num_files
        before = merged.get((kind, text, words))
        if before is not None:  # grey in some files, and in others beside colours
            share, num_files = share + before.share, num_files + before.num_files
        merged[kind, text, words] = ValueFinding(text, color, words, share, num_files)
    found = [(kind, value) for (kind, _, _), value in merged.items()]
    found.sort(key=lambda each: (_KINDS.index(each[0]), -each[1].share))
    listed = [each for each in found if each[0] in (_CLASS, _IGNORED)]
    listed += [each for each in found if each[0] in (_AREA, _UNKNOWN)][:MAX_LISTED]
    kept = {id(value) for _, value in listed}
    others = _joined([each for each in found if id(each[1]) not in kept])
    if masks.num_left_out:
        others.append(OthersFinding("rare values, not counted", 0, masks.num_left_out / total))
    return tuple(value for _, value in listed), tuple(others)


def _joined(values: Sequence[tuple[str, ValueFinding]]) -> list[OthersFinding]:
    """Returns the values by kind; noise by class, if it is of a few classes."""
    names = {value.looks_like for kind, value in values if kind == _NOISE}
    shares: dict[str, list[float]] = {}
    for kind, value in values:
        is_named = kind == _NOISE and len(names) <= _MAX_NOISE
        shares.setdefault(value.looks_like if is_named else kind, []).append(value.share)
    return [OthersFinding(name, len(each), sum(each)) for name, each in shares.items()]


Values = frozenset[tuple[int | None, Color | None]]
"""Values of masks: id or level, None for a colour; and how it is shown, None above 255."""


def values_of(masks: MaskStatistics) -> Values | None:
    """Returns the values of masks, None if they are too many to list, or not all are known."""
    number = len(masks.levels) + len(masks.indices) + len(masks.colors)
    if masks.num_left_out or masks.num_alpha_shapes or number > _MAX_VALUES:
        return None
    return frozenset[tuple[int | None, Color | None]](
        [
            *((level, _grey(level)) for level in masks.levels),
            *((index, masks.palette[index]) for index in masks.indices),
            *((None, color) for color in masks.colors),
        ]
    )


def are_known(values: Values | None, reading: Reading) -> bool:
    """Returns whether all values are of classes or ignored, so that masks can be read."""
    if values is None:
        return False
    none = ValueCount(0)
    # A mask of mixed ones has ids or colours, never both.
    encodings: tuple[MaskEncoding, ...] = ("index", "colour")
    readings = [replace(reading, encoding=each) for each in encodings]
    return any(
        all(meanings.of(*value, none)[0] in (_CLASS, _IGNORED) for value in values)
        for meanings in map(_Meanings, readings if reading.encoding == "mixed" else [reading])
    )


_CLASS, _IGNORED, _AREA, _UNKNOWN = "class", "ignored", "area of no class", "unknown"
_NOISE, _BLEND, _UNEXPLAINED = "noise of classes", "blends at edges", "unexplained"
_KINDS = (_CLASS, _IGNORED, _AREA, _UNKNOWN, _NOISE, _BLEND, _UNEXPLAINED)
_Meaning = tuple[str, str]  # kind, words


class _Meanings:
    """The meaning of values in a reading."""

    def __init__(self, reading: Reading | None) -> None:
        self._encoding = None if reading is None else reading.encoding
        classes = () if reading is None else parse_color_map(reading.classes)
        self._classes: tuple[ClassColor, ...] = classes
        ignored = () if reading is None else parse_ignored((reading.ignore or "").split(";"))
        self._ignored: tuple[Color, ...] = ignored
        self._colors = np.array([each.color for each in classes] + list(ignored), np.int64)

    def of(self, value_id: int | None, color: Color | None, count: ValueCount) -> _Meaning:
        """Returns the meaning of a value.

        Args:
            value_id: the level or the index into a palette; None for a colour.
            color: None for levels above 255.
        """
        if self._encoding == "nonzero":
            return self._of_nonzero(value_id, color)
        if value_id is not None and self._encoding in ("index", "mixed"):
            found = self._of_id(value_id, color)
            if found is not None or self._encoding == "index":
                return found or (_AREA, "id of no class")
        return self._of_color(color, count)

    def _of_nonzero(self, value_id: int | None, color: Color | None) -> _Meaning:
        if value_id is None:
            is_ignored, is_zero = color in self._ignored, color == (0, 0, 0)
        else:
            is_ignored = (value_id,) * 3 in self._ignored or self._has_ignored_color(color)
            is_zero = value_id == 0
        if is_ignored:
            return _IGNORED, _IGNORED
        return _CLASS, f"class {self._classes[not is_zero].name}"

    def _of_id(self, value: int, color: Color | None) -> _Meaning | None:
        is_class = value < len(self._classes)
        if self._has_ignored_color(color) or (not is_class and (value,) * 3 in self._ignored):
            return _IGNORED, _IGNORED
        return (_CLASS, f"class {self._classes[value].name}") if is_class else None

    def _has_ignored_color(self, color: Color | None) -> bool:
        # A grey of `--ignore` is an id, whatever index has that grey in the palette.
        return color is not None and grey_level(color) is None and color in self._ignored

    def _of_color(self, color: Color | None, count: ValueCount) -> _Meaning:
        if self._encoding == "alpha":
            return _UNKNOWN, "the shape is in the alpha channel"
        if color is None or not len(self._colors):
            return _UNKNOWN, _UNKNOWN
        if color in self._ignored:
            return _IGNORED, _IGNORED
        value = np.array(color, np.int64)
        nearest, distance = nearest_of(value[np.newaxis], self._colors)
        name = self._name(int(nearest[0]))
        if distance[0] == 0:
            return _CLASS, f"class {name}"
        if distance[0] <= tolerances_of(self._colors)[nearest[0]]:
            return _NOISE, f"noise of {name}"
        if count.num_solid >= _MIN_SOLID:
            return _AREA, _AREA
        if is_blend(value, self._colors):
            return _BLEND, f"blend, nearest {name}"
        return _UNEXPLAINED, f"unexplained, nearest {name}"

    def _name(self, number: int) -> str:
        return self._classes[number].name if number < len(self._classes) else "ignored"


def _grey(level: int) -> Color | None:
    return (level, level, level) if level <= 255 else None


def _text(color: Color) -> str:
    level = grey_level(color)
    return ",".join(map(str, color)) if level is None else str(level)
