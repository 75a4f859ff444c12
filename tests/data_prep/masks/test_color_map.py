"""Colour maps as text: what they mean, and what is refused."""

import pytest

from data_prep.masks.color_map import (
    DEFAULT_CLASSES,
    ClassColor,
    Color,
    check_ignore_id,
    check_ignored,
    check_ignored_levels,
    check_levels,
    free_ignore_id,
    parse_color_map,
    parse_ignored,
)
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
        (";".join(f"c{i}=9,{i % 256},{i // 256}" for i in range(257)), "257 given"),
    ],
)
def test_parse_color_map_names_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_color_map(text)


@pytest.mark.parametrize(
    ("ignore_id", "message"),
    [
        (1, "ids up to 1 are classes"),
        (256, "largest possible id is 255"),
        (255, "grey level of 'mass'"),
    ],
)
def test_check_ignore_id_refuses_an_id_that_is_a_class(ignore_id: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_ignore_id(DEFAULT_CLASSES, ignore_id)


def test_parse_ignored_reads_levels_and_colors_once_each() -> None:
    assert parse_ignored(["255", " 224,224,192", "#e0e0c0", "0"]) == (
        (255, 255, 255),
        (224, 224, 192),
        (0, 0, 0),
    )


@pytest.mark.parametrize("text", ["65536", "-1", "1,2", "red", "1,2,3,4", "#12345", "1.5"])
def test_parse_ignored_names_the_value_it_cannot_read(text: str) -> None:
    with pytest.raises(UsageError, match=f"--ignore '{text}' is not a grey level"):
        parse_ignored(["255", text])


def test_check_ignored_refuses_the_color_of_a_class() -> None:
    check_ignored(DEFAULT_CLASSES, [(255, 0, 0)])
    with pytest.raises(UsageError, match="--ignore 255,255,255 is the colour of 'mass'"):
        check_ignored(DEFAULT_CLASSES, [(255, 0, 0), (255, 255, 255)])


@pytest.mark.parametrize(
    ("colors", "expected"),
    [
        ([(0, 0, 0), (255, 255, 255)], 254),
        ([(0, 0, 0), (255, 0, 0)], 255),
        ([(i, 255 - i, 0) for i in range(255)], 255),
    ],
)
def test_free_ignore_id_is_no_id_and_no_grey_level(colors: list[Color], expected: int) -> None:
    classes = tuple(ClassColor(i, f"c{i}", color) for i, color in enumerate(colors))
    assert free_ignore_id(classes) == expected


def test_free_ignore_id_needs_an_id_that_no_class_has() -> None:
    classes = tuple(ClassColor(i, f"c{i}", (i, 255 - i, 0)) for i in range(256))
    with pytest.raises(UsageError, match="--ignore needs a free id"):
        free_ignore_id(classes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mass=255,255,255;background=0,0,0", "'background' .id 1. has the grey level 0, which is"),
        (
            "a=9,9,9;b=2,2,2;c=1,1,1",
            "'b' .id 1. has the grey level 2, which is the id of 'c'; give",
        ),
    ],
)
def test_check_levels_refuses_a_level_that_is_the_id_of_another_class(
    text: str, message: str
) -> None:
    with pytest.raises(UsageError, match=f"{message}.*--mask-encoding colour"):
        check_levels(parse_color_map(text))


@pytest.mark.parametrize("text", ["a=0,0,0;b=1,1,1", "a=9,9,9;b=2,2,2", "a=0,0,0;b=0,1,0"])
def test_check_levels_accepts_levels_with_one_meaning(text: str) -> None:
    check_levels(parse_color_map(text))


def test_check_ignored_levels_refuses_the_id_of_a_class() -> None:
    check_ignored_levels(DEFAULT_CLASSES, [(2, 2, 2), (1, 0, 0)])
    words = r"--ignore 1 is the id of 'mass'; .*--mask-encoding colour"
    with pytest.raises(UsageError, match=words):
        check_ignored_levels(DEFAULT_CLASSES, [(9, 9, 9), (1, 1, 1)])
