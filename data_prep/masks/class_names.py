"""Names classes and gives them colours, if masks have ids or colours without names.

The names and the palette of Pascal VOC are those of its development kit.
"""

from collections.abc import Iterable, Sequence

from data_prep.masks.color_map import MAX_CLASSES, Color, grey_level

VOID_COLOR: Color = (224, 224, 192)
"""Colour of the borders between objects in masks of Pascal VOC, which are ignored."""

VOC_NAMES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair"),
    *("cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)

_BASIC_COLORS: dict[str, Color] = {
    "black": (0, 0, 0),
    "grey": (128, 128, 128),
    "white": (255, 255, 255),
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
    "orange": (255, 128, 0),
    "maroon": (128, 0, 0),
    "darkgreen": (0, 128, 0),
    "navy": (0, 0, 128),
    "olive": (128, 128, 0),
    "teal": (0, 128, 128),
    "purple": (128, 0, 128),
    "pink": (255, 160, 192),
    "brown": (140, 80, 32),
    "lightblue": (128, 192, 255),
    "lightgreen": (144, 238, 144),
    "violet": (160, 96, 255),
}


def id_color(class_id: int) -> Color:
    """Returns a colour for a class id 0..255, all different: those of Pascal VOC's palette."""
    channels = [0, 0, 0]
    for bit in range(8):
        for channel in range(3):
            channels[channel] |= (class_id >> (3 * bit + channel) & 1) << (7 - bit)
    red, green, blue = channels
    return red, green, blue


VOC_COLORS: tuple[Color, ...] = tuple(map(id_color, range(len(VOC_NAMES))))


def id_names(number: int) -> list[str]:
    """Returns names for ids: background and foreground, or background, class1, class2, ..."""
    if number == 2:
        return ["background", "foreground"]
    return ["background", *(f"class{i}" for i in range(1, number))]


def color_names(colors: Iterable[Color]) -> list[str]:
    """Returns a different name for each colour, by the nearest basic colour: red, red2, ..."""
    names: list[str] = []
    for color in colors:
        name = min(_BASIC_COLORS, key=lambda basic: _distance(_BASIC_COLORS[basic], color))
        number, first = 2, name
        while name in names:
            name = f"{first}{number}"
            number += 1
        names.append(name)
    return names


def _distance(first: Color, second: Color) -> int:
    return sum((a - b) ** 2 for a, b in zip(first, second, strict=True))


def with_id_colors(colors: Sequence[Color | None]) -> list[Color]:
    """Returns the colours, with another one for each that is missing or given twice."""
    result: list[Color] = []
    taken = {color for color in colors if color is not None}
    free = (id_color(i) for i in range(MAX_CLASSES))
    spare = [color for color in free if color not in taken and grey_level(color) is None]
    for color in colors:
        is_free = color is not None and color not in result
        result.append(color if color is not None and is_free else spare.pop(0))
    return result


def color_map_text(names: Sequence[str], colors: Sequence[Color]) -> str:
    """Returns the text of `--classes`: name=r,g,b;name=r,g,b."""
    return ";".join(
        f"{name}={','.join(map(str, color))}" for name, color in zip(names, colors, strict=True)
    )
