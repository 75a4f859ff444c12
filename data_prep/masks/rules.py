"""Defines how the masks of a dataset are read: classes, encoding and ignored pixels.

For errors, it words the options that change this; `prep` accepts them beside the options in use.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from data_prep.masks.color_map import (
    MAX_CLASSES,
    ClassColor,
    Color,
    Palette,
    check_levels,
    color_text,
    grey_level,
    to_8_bits,
)
from flexunet.errors import ContentError, UsageError

READING_RULES = 4
"""Version of the rules by which masks are read; datasets record it. Datasets without it have 1.

With version 1, the ignore id was also a grey level of masks with colours. Until version 2, areas
of a colour near a class could be read as this class beside areas of its own colour. Until version
3, ignored colours of a palette did not count where its indices are read.
"""

Encoding = Literal["auto", "index", "colour", "alpha", "nonzero"]
"""What carries the classes: auto decides for each mask, see `reading.py`."""


class NoClassError(ContentError):
    """A mask has values of no class, which are neither noise nor blends.

    Attributes:
        colors: these values in the levels of the file, ids as grey.
    """

    def __init__(self, message: str, colors: Sequence[Color] = ()) -> None:
        super().__init__(message)
        self.colors = tuple(colors)


AS_8_BITS = "save these masks with 8 bits a channel"


@dataclass(frozen=True)
class MaskRules:
    """How the masks of a dataset are read.

    Attributes:
        classes: the classes in the order of their ids.
        ignore_id: id of pixels that are ignored everywhere, None without such pixels.
        ignored: distinct colours, none of them of a class, that are read as the ignore id. Levels
            above 255 are those of 16-bit grey.
        encoding: what carries the classes.
        file_ids: the class id of each id in index masks; empty: the same. Other classes occur in no
            mask.
        has_ignore_id: index masks may hold the ignore id. It is no grey level of other masks.
        palette: indices, and the colours that palettes of index masks must have there. Other
            indices may have any colour.
    """

    classes: tuple[ClassColor, ...]
    ignore_id: int | None = None
    ignored: tuple[Color, ...] = ()
    encoding: Encoding = "auto"
    has_ignore_id: bool = False
    file_ids: tuple[int, ...] = ()
    palette: Palette = ()

    @property
    def read_classes(self) -> tuple[ClassColor, ...]:
        """The classes that masks may have."""
        found = self.file_ids
        return tuple(each for each in self.classes if each.id in found) if found else self.classes

    @property
    def file_classes(self) -> tuple[ClassColor, ...]:
        """These classes in the order of the ids in index masks, with these ids."""
        ids = self.file_ids or range(len(self.classes))
        found = (self.classes[class_id] for class_id in ids)
        return tuple(ClassColor(i, each.name, each.color) for i, each in enumerate(found))

    def as_dataset_ids(self, ids: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Returns the class ids (H, W) of ids as index masks have them."""
        return np.array(self.file_ids, np.uint8)[ids] if self.file_ids else ids


def index_table(rules: MaskRules) -> npt.NDArray[np.int64]:
    """Returns the id of each level of an index mask, (256,) or more; -1 for other levels."""
    levels = [level for color in rules.ignored if (level := grey_level(color)) is not None]
    table = np.full(max([MAX_CLASSES, *(level + 1 for level in levels)]), -1)
    if rules.ignore_id is not None:
        table[levels] = rules.ignore_id
        if rules.has_ignore_id:
            table[rules.ignore_id] = rules.ignore_id
    ids = rules.file_ids or range(len(rules.classes))
    table[: len(ids)] = ids
    return table


def options_to_ignore(colors: Sequence[Color], rules: MaskRules) -> str | None:
    """Returns the options that ignore pixels of `colors`, beside those that are ignored already.

    Args:
        colors: colours that no class has, in the levels of the file.

    Returns:
        None if there are none, because a class has that colour in 8 bits: the level 255 of a mask
        of 16 bits is nearly black, but --ignore 255 would be white.
    """
    if any(entry.color in colors for entry in rules.file_classes):
        return None
    levels = [level for color in colors if (level := grey_level(color)) is not None]
    # Unless the encoding is given, `prep` takes these levels for ids.
    has_ids = min(levels, default=MAX_CLASSES) < len(rules.file_classes)
    option = _ignore_option([color_text(color) for color in colors], rules)
    return f"--mask-encoding colour {option}" if has_ids else option


def options_to_ignore_ids(ids: Sequence[int], rules: MaskRules) -> str:
    """Returns the option that ignores pixels of `ids`, beside those that are ignored already."""
    option = _ignore_option([str(each) for each in ids], rules)
    is_level = any(grey_level(entry.color) in ids for entry in rules.file_classes)
    return f"--mask-encoding index {option}" if is_level else option


def option_to_add(color: Color, rules: MaskRules) -> str | None:
    """Returns how to add a class that gets the pixels of `color`.

    Args:
        color: in the levels of the file.

    Returns:
        None if a class or ignored pixels have its 8-bit colour already.
    """
    needed = color if max(color) < MAX_CLASSES else (to_8_bits(color[0]),) * 3
    if needed in {*(entry.color for entry in rules.file_classes), *rules.ignored}:
        return None
    added = ClassColor(len(rules.file_classes), "added", needed)
    option = f"the colour {color_text(needed)} to --classes"
    try:
        check_levels([*rules.file_classes, added])
    except UsageError:  # the level is also an id
        return f"{option} with --mask-encoding colour"
    return option


def _ignore_option(texts: Sequence[str], rules: MaskRules) -> str:
    every = list(dict.fromkeys([*(color_text(color) for color in rules.ignored), *texts]))
    return f"--ignore {every[0]}" if len(every) == 1 else f'--ignore "{";".join(every)}"'
