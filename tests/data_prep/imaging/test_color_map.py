"""Colour maps as text: what they mean, and what is refused."""

import pytest

from data_prep.imaging.color_map import DEFAULT_CLASSES, ClassColor, parse_color_map
from flexunet.errors import UsageError


def test_parse_color_map_numbers_classes_in_order() -> None:
    classes = parse_color_map("background=0,0,0;mass=255, 255,255 ;cyst=#ff8000")
    assert classes == (
        ClassColor(0, "background", (0, 0, 0)),
        ClassColor(1, "mass", (255, 255, 255)),
        ClassColor(2, "cyst", (255, 128, 0)),
    )
    assert parse_color_map("background=0,0,0;mass=255,255,255") == DEFAULT_CLASSES


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "0 given"),
        ("a=0,0,0", "1 given"),
        ("a=0,0,0;b", "'b' is not name=r,g,b"),
        ("a=0,0,0;=1,2,3", "'=1,2,3' is not"),
        ("a=0,0,0;b=1,2", "'b=1,2' is not"),
        ("a=0,0,0;b=1,2,256", "'b=1,2,256' is not"),
        ("a=0,0,0;b=#12345", "'b=#12345' is not"),
        ("a=0,0,0;b=٣,2,1", "is not name=r,g,b"),
        ("a=0,0,0;a=9,9,9", "name 'a' is given twice"),
        ("a=0,0,0;b=0,0,0", r"colour \(0, 0, 0\) is given twice"),
        ("mass=255,255,255;background=0,0,0", "is the id of 'mass'; move it to position 0"),
        (
            "background=255,255,255;membrane=0,0,0",
            r"'membrane' \(id 1\) has the grey level 0, which is the id of 'background'.* class 0 "
            "is the background; if black is your object, invert the masks: 0 becomes 255",
        ),
        (";".join(f"c{i}=9,{i % 256},{i // 256}" for i in range(257)), "257 given"),
    ],
)
def test_parse_color_map_names_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_color_map(text)
