"""Defines how masks may be read, and what a rule found about them."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from data_prep.masks.class_names import color_map_text, id_color, id_names, with_id_colors
from data_prep.masks.color_map import Color

MaskEncoding = Literal["auto", "index", "colour", "alpha", "nonzero", "mixed"]
"""Values of --mask-encoding; auto: one decision for all masks; mixed: each mask by itself."""

BLACK_AND_WHITE: tuple[Color, ...] = ((0, 0, 0), (255, 255, 255))


@dataclass(frozen=True)
class Reading:
    """One way to read all masks of a dataset.

    Attributes:
        encoding: what carries the classes, never "auto".
        classes: the classes as text of --classes.
        ignore: ignored pixels as text of --ignore, None if no pixels are ignored.
        meaning: the reading in words, for people who choose between several.
        has_added: the classes are those that the user gives, and one more.
    """

    encoding: MaskEncoding
    classes: str
    ignore: str | None = None
    meaning: str = ""
    has_added: bool = False

    @property
    def options(self) -> dict[str, str]:
        """The options of `prep` that ask for this reading: field names of `PrepConfig`."""
        ignore = {} if self.ignore is None else {"ignore": self.ignore}
        return {"mask_encoding": self.encoding, "classes": self.classes, **ignore}

    def arguments(self, names: Sequence[str] = ("mask_encoding", "classes", "ignore")) -> str:
        """Returns these options as text of a command line, quoted for a shell."""
        return " ".join(
            f"--{name.replace('_', '-')} {shlex.quote(value)}"
            for name, value in self.options.items()
            if name in names
        )


@dataclass(frozen=True)
class Finding:
    """The result of a rule.

    Attributes:
        evidence: short sentences without a full stop.
        readings: the possible readings, the likeliest first.
        is_certain: the first reading is right; there is one.
    """

    evidence: tuple[str, ...]
    readings: tuple[Reading, ...] = ()
    is_certain: bool = False

    def doubted(self, reason: str, *more: Reading) -> "Finding":
        """Returns the same readings, and more, as an uncertain finding with the reason."""
        return Finding((*self.evidence, reason), (*self.readings, *more))


def certain(reading: Reading, *evidence: str) -> Finding:
    """Returns a finding with one reading."""
    return Finding(evidence, (reading,), is_certain=True)


def uncertain(evidence: str, *readings: Reading) -> Finding:
    """Returns a finding that leaves the choice between readings."""
    return Finding((evidence,), readings)


def black_and_white(meaning: str = "white is the foreground") -> Reading:
    """Returns the reading of black background and white foreground."""
    return Reading("colour", color_map_text(id_names(2), BLACK_AND_WHITE), meaning=meaning)


def nonzero_reading(ignore: str | None = None) -> Reading:
    """Returns the reading of all values above 0 as one class."""
    meaning = "all values but 0 are the foreground, as numbers of single objects are"
    if ignore is not None:
        meaning += f"; {ignore} is ignored"
    return Reading("nonzero", black_and_white().classes, ignore, meaning)


def ids_reading(
    number: int,
    *,
    names: Sequence[str] = (),
    colors: Sequence[Color | None] = (),
    ignore: str | None = None,
) -> Reading:
    """Returns the reading of ids 0 to `number` - 1.

    Args:
        names: names of the classes; empty: class1, class2, ...
        colors: colours of the classes; empty, or None for a class: any.
    """
    if not colors:
        is_plain = number == 2 and ignore is None
        colors = BLACK_AND_WHITE if is_plain else [id_color(i) for i in range(number)]
    text = color_map_text(names or id_names(number), with_id_colors(colors))
    meaning = f"values 0 to {number - 1} are classes"
    if ignore is not None:
        meaning += f", {ignore} is ignored"
    return Reading("index", text, ignore, meaning)


def grey_levels_reading(levels: Sequence[int], *, ignore: str | None = None) -> Reading:
    """Returns the reading of grey levels as classes, the lowest is class 0."""
    colors: list[Color] = [(level, level, level) for level in levels]
    named = join_values(levels)
    text = color_map_text(id_names(len(levels)), colors)
    meaning = f"the grey levels {named} are classes"
    if ignore is not None:
        meaning += f", {ignore} is ignored"
    return Reading("colour", text, ignore, meaning)


def join_values(values: Sequence[int], limit: int = 8) -> str:
    """Returns the values as text: 0, 1, 2, ...; long lists are cut."""
    shown = ", ".join(map(str, values[:limit]))
    return f"{shown}, ..., {values[-1]}" if len(values) > limit else shown
