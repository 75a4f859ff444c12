"""The group of a file by its name, a table or an expression."""

from collections.abc import Callable

import pytest

from data_prep.splits.groups import augmented_group, group_of
from flexunet.errors import ContentError, UsageError


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("barrdistorted_1001_0.3_0.3_23.png", "23"),
        ("deformed_alpha_1300_sigmoid_8_29", "29"),
        ("deformed_alpha_1300_sigmoid_8_29.png", "29"),
        ("distorted_0.02_rsigma0.5_sigma40_18.png", "18"),
        ("pincdistorted_1001_0.3_-0.3_7.png", "7"),
        ("rotated_90_12.jpg", "12"),
        ("hflipped_12.png", "12"),
        ("vflipped_12.png", "12"),
        ("shrinked_0.8_12.png", "12"),
        ("sheared_20_0.1_horizontal_12.png", "12"),
        ("56.png", "56"),
        ("rotated_90_056.png", "56"),
    ],
)
def test_augmented_group_is_the_number_of_the_source(name: str, group: str) -> None:
    assert augmented_group(name) == group
    assert group_of(preset="augmented")(name) == group


@pytest.mark.parametrize("name", ["scan.png", "12_a.png", "12a.png", "a12.png", "_.png", ".png"])
def test_augmented_group_names_a_file_of_another_kind(name: str) -> None:
    with pytest.raises(ContentError, match=r"^the name does not end in _NUMBER"):
        augmented_group(name)


def test_group_of_without_options_is_the_file() -> None:
    assert group_of()("a.b.png") == "a.b"


def test_group_of_regex_takes_the_first_bracket_or_the_whole_match() -> None:
    assert group_of(regex=r"-(p\d+)-")("phantom-p007-1.png") == "p007"
    assert group_of(regex=r"p\d+")("phantom-p007-1.png") == "p007"
    assert group_of(regex=r"(?:left|right)-(\w)(\d)")("left-a1.png") == "a"


def test_group_of_regex_says_what_helps_a_name_without_a_match() -> None:
    for regex in (r"(p\d+)", r"x*", r"(p\d+)?"):
        with pytest.raises(ContentError, match=r"^no group: .*correct --group-regex$"):
            group_of(regex=regex)("scan.png")
    with pytest.raises(ContentError, match="or use --group-preset augmented"):
        group_of(regex=r"(p\d+)")("barrdistorted_1001_0.3_0.3_23.png")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("file,group\na.png,P1\nb.png,P1\n", "a.png"),
        ("id,group\r\na,P1\r\nb,P1\r\n", "a.png"),
        ("\ufeffGroup, ID ,age\n P1 , a ,60\n", "a.tiff"),
        ("file,group\na.png,P1\na.png,P1\n", "a.png"),
    ],
)
def test_group_of_table_finds_files_and_stems(text: str, name: str) -> None:
    assert group_of(table=(text, "groups.csv"))(name) == "P1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"groups\.csv: the columns are \[\]; expected"),
        (
            "name,patient\na,b\n",
            r"groups\.csv: the columns are \['name', 'patient'\]; expected file,group",
        ),
        ("file,group\na.png,\n", r"groups\.csv: line 2: file or group is empty"),
        ("file,group\na.png\n", r"groups\.csv: line 2: file or group is empty"),
        ("file,group\na.png,P1\na.png,P2\n", r"a\.png is in the groups P1 and P2"),
    ],
)
def test_group_of_table_names_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        group_of(table=(text, "groups.csv"))


def test_group_of_table_names_a_file_without_a_row() -> None:
    find = group_of(table=("file,group\na.png,P1\n", "groups.csv"))
    with pytest.raises(ContentError, match=r"^has no row in groups\.csv"):
        find("c.png")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: group_of(preset="inbreast"), "'inbreast' is unknown; known: augmented"),
        (lambda: group_of(regex="("), r"--group-regex '\('"),
        (lambda: group_of(preset="augmented", regex="a"), "more than one group option"),
    ],
)
def test_group_of_refuses_wrong_options(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
