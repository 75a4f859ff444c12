"""Parses and checks colour maps: the classes of a dataset and their mask colours.

The module reads text only, no pixels and no files.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from flexunet.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Color = tuple[int, int, int]
"""Red, green and blue, 0..255 each. Three equal larger values are a grey level of 16 bits."""
Palette = tuple[tuple[int, Color], ...]
"""Indices and their colours."""
MAX_CLASSES = 256  # ids are stored in 8 bits
LEVELS_16_BIT = 257  # 65535 / 255: one 8-bit grey level in 16 bits
_MAX_LEVEL = 65535
Levels = TypeVar("Levels", int, "npt.NDArray[np.int64]")

NO_CLASS_COLOR: Color = (128, 128, 128)  # of pixels without a class, where classes are drawn


@dataclass(frozen=True)
class ClassColor:
    """A class and its mask colour (RGB, 0..255 each)."""

    id: int
    name: str
    color: Color


DEFAULT_CLASSES = (ClassColor(0, "background", (0, 0, 0)), ClassColor(1, "mass", (255, 255, 255)))


# The classes without --classes, until they were found from the masks; those of --format inbreast.
EARLIER_CLASSES = "background=0,0,0;mass=255,255,255"


@functools.lru_cache(maxsize=64)
def parse_color_map(text: str) -> tuple[ClassColor, ...]:
    """Returns the classes of a text like `background=0,0,0;mass=255,255,255`, ids in this order.

    Colours are `r,g,b` with 0..255 each, or `#rrggbb`.

    Raises:
        UsageError: another form, a duplicate name or colour, fewer than two classes or more than
            256.
    """
    parts = [part for part in re.split(r"[;\n]", text) if part.strip()]
    classes = tuple(_parse_class(i, part, text) for i, part in enumerate(parts))
    if not 2 <= len(classes) <= MAX_CLASSES:
        raise UsageError(
            f"classes {text!r}: {len(classes)} given, 2 to {MAX_CLASSES} are allowed; "
            "write name=r,g,b;name=r,g,b"
        )
    _refuse_twice("name", [entry.name for entry in classes], text)
    _refuse_twice("colour", [entry.color for entry in classes], text)
    return classes


@dataclass(frozen=True)
class DatasetClasses:
    """The classes of a dataset, and which of them the ids in mask files are.

    Attributes:
        classes: the classes in the order of their ids in the dataset.
        file_ids: their id in the dataset for each id in mask files; empty: the same.
    """

    classes: tuple[ClassColor, ...]
    file_ids: tuple[int, ...] = ()


FIRST_CLASS, NO_BACKGROUND = "first", "none"  # values of --background


def with_background(classes: Sequence[ClassColor], background: str) -> DatasetClasses:
    """Returns the classes with the background as class 0.

    Args:
        classes: the classes in the order of --classes, which is that of the ids in mask files.
        background: name or colour of a class; "first": the first one; "none": class 0 occurs
            nowhere, and all of `classes` have higher ids.

    Raises:
        UsageError: no class has this name or colour, or there are too many classes.
    """
    if background == FIRST_CLASS:
        return DatasetClasses(tuple(classes))
    if background == NO_BACKGROUND:
        return _without_background(classes)
    color = parse_color(background) or parse_color(",".join([background] * 3))
    found = [each.id for each in classes if background == each.name or color == each.color]
    if not found:
        named = ", ".join(f"{each.name} ({','.join(map(str, each.color))})" for each in classes)
        raise UsageError(
            f"--background {background!r} is no class; give the name or the colour of one, or "
            f"none: {named}"
        )
    order = [found[0], *(each.id for each in classes if each.id != found[0])]
    ordered = tuple(
        ClassColor(i, classes[old].name, classes[old].color) for i, old in enumerate(order)
    )
    file_ids = tuple(order.index(each.id) for each in classes)
    return DatasetClasses(ordered, () if file_ids == tuple(sorted(file_ids)) else file_ids)


def _without_background(classes: Sequence[ClassColor]) -> DatasetClasses:
    if len(classes) >= MAX_CLASSES:
        raise UsageError(f"--background none: at most {MAX_CLASSES - 1} classes are possible")
    taken = {each.color for each in classes}
    greys = ((level, level, level) for level in range(1, MAX_CLASSES))
    unused = ClassColor(0, NO_BACKGROUND, next(grey for grey in greys if grey not in taken))
    if any(each.name == NO_BACKGROUND for each in classes):
        raise UsageError("--background none: a class has the name 'none'; give it another one")
    moved = tuple(ClassColor(each.id + 1, each.name, each.color) for each in classes)
    return DatasetClasses((unused, *moved), tuple(each.id for each in moved))


def check_levels(classes: Sequence[ClassColor]) -> None:
    """Checks that no grey level of a class is the id of another one.

    Only needed if masks may hold ids or colours (`--mask-encoding auto`).

    Raises:
        UsageError: a level has two meanings.
    """
    for entry in classes:
        level = grey_level(entry.color)
        if level is not None and level < len(classes) and level != entry.id:
            raise UsageError(
                f"--classes: {entry.name!r} (id {entry.id}) has the grey level {level}, which is "
                f"the id of {classes[level].name!r}; give --mask-encoding colour if the masks have "
                "colours, or --mask-encoding index if they have ids"
            )


def parse_ignored(texts: Sequence[str]) -> tuple[Color, ...]:
    """Returns the colours of texts like `255` (a grey level), `224,224,192` or `#e0e0c0`.

    Grey levels may be up to 65535, for 16-bit masks. Empty texts are skipped.

    Raises:
        UsageError: another form.
    """
    return tuple(dict.fromkeys(_parse_ignored(text) for text in texts if text.strip()))


def check_ignored_levels(classes: Sequence[ClassColor], ignored: Sequence[Color]) -> None:
    """Checks that no ignored grey level is the id of a class.

    Only needed if masks may hold ids.

    Raises:
        UsageError: a level has two meanings.
    """
    for color in ignored:
        level = grey_level(color)
        if level is not None and level < len(classes):
            raise UsageError(
                f"--ignore {level} is the id of {classes[level].name!r}; if the masks have "
                "colours, give --mask-encoding colour, else remove it"
            )


def check_ignored(classes: Sequence[ClassColor], ignored: Sequence[Color]) -> None:
    """Checks that no ignored colour is the colour of a class.

    Raises:
        UsageError: a colour is both.
    """
    for entry in classes:
        level = grey_level(entry.color)
        in_16_bits = ((level * LEVELS_16_BIT,) * 3,) if level else ()
        for color in (entry.color, *in_16_bits):
            if color in ignored:
                raise UsageError(
                    f"--ignore {color_text(color)} is the colour of {entry.name!r}; "
                    "remove one of them"
                )


def check_ignore_id(classes: Sequence[ClassColor], ignore_id: int | None) -> None:
    """Checks that the ignore id cannot be confused with a class.

    Raises:
        UsageError: the ignore id is a class id, the grey level of a class, or above 255.
    """
    if ignore_id is None:
        return
    if not len(classes) <= ignore_id < MAX_CLASSES:
        raise UsageError(
            f"--ignore-id={ignore_id}: ids up to {len(classes) - 1} are classes, and the largest "
            f"possible id is {MAX_CLASSES - 1}; choose an id between them"
        )
    for entry in classes:
        if grey_level(entry.color) == ignore_id:
            raise UsageError(
                f"--ignore-id={ignore_id} is also the grey level of {entry.name!r} {entry.color}; "
                "give one of them another value"
            )


def free_ignore_id(classes: Sequence[ClassColor]) -> int:
    """Returns the largest id that is neither the id nor the grey level of a class.

    Raises:
        UsageError: there is none.
    """
    taken = {entry.id for entry in classes} | {grey_level(entry.color) for entry in classes}
    free = [value for value in range(MAX_CLASSES) if value not in taken]
    if not free:
        raise UsageError("--ignore needs a free id, but all 256 are classes; remove a class")
    return free[-1]


def grey_level(color: Color) -> int | None:
    """Returns the grey level of `color`, None if it is not grey."""
    return color[0] if color[0] == color[1] == color[2] else None


def color_text(color: Color) -> str:
    """Returns a colour as --ignore takes it: `r,g,b`, or a level of more than 8 bits."""
    return str(color[0]) if max(color) >= MAX_CLASSES else ",".join(map(str, color))


def to_8_bits(level: Levels) -> Levels:
    """Returns the nearest 8-bit level of a 16-bit one, or of an array of them."""
    return (level + LEVELS_16_BIT // 2) // LEVELS_16_BIT


def parse_color(text: str) -> Color | None:
    """Returns the colour of `r,g,b` (0..255 each) or `#rrggbb`, None for another form."""
    hexadecimal = re.fullmatch(r"#([0-9a-fA-F]{2})([0-9a-fA-F]{2})([0-9a-fA-F]{2})", text)
    decimal = re.fullmatch(r"(\d{1,3})\s*,\s*(\d{1,3})\s*,\s*(\d{1,3})", text, re.ASCII)
    if hexadecimal:
        red, green, blue = (int(value, 16) for value in hexadecimal.groups())
    elif decimal:
        red, green, blue = (int(value) for value in decimal.groups())
    else:
        return None
    return (red, green, blue) if max(red, green, blue) <= 255 else None


@functools.lru_cache(maxsize=256)
def _parse_ignored(text: str) -> Color:
    plain = text.strip()
    if re.fullmatch(r"\d{1,5}", plain, re.ASCII) and int(plain) <= _MAX_LEVEL:
        return (int(plain),) * 3
    color = parse_color(plain)
    if color is None:
        raise UsageError(
            f"--ignore {text!r} is not a grey level 0 to 255 (of 16-bit masks 0 to {_MAX_LEVEL}), "
            "r,g,b (0..255 each) or #rrggbb"
        )
    return color


def _refuse_twice(what: str, values: Sequence[str | Color], text: str) -> None:
    twice = [value for value in values if values.count(value) > 1]
    if twice:
        raise UsageError(f"classes {text!r}: {what} {twice[0]!r} is given twice; change one")


def _parse_class(class_id: int, part: str, text: str) -> ClassColor:
    name, found, color = (piece.strip() for piece in part.partition("="))
    value = parse_color(color)
    if not name or not found or value is None:
        raise UsageError(
            f"classes {text!r}: {part.strip()!r} is not name=r,g,b (0..255 each) or name=#rrggbb"
        )
    return ClassColor(class_id, name, value)
