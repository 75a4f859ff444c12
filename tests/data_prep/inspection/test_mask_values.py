"""Values of masks and what they look like: classes, ignored, areas, noise and blends."""

import numpy as np
import pytest

from data_prep.inspection.mask_values import are_known, describe_values, values_of
from data_prep.masks.decision.findings import MaskEncoding, Reading
from data_prep.masks.files import MaskFile
from data_prep.masks.statistics import MaskStatistics, statistics_of

COLORS = Reading("colour", "background=0,0,0;red=255,0,0;blue=0,0,255", "255,255,0")


def statistics(*masks: np.ndarray) -> MaskStatistics:
    total = MaskStatistics()
    for mask in masks:
        total += statistics_of(MaskFile(mask))
    return total


def colors(*areas: tuple[int, int, int]) -> np.ndarray:
    """Returns a mask with a column of 10 pixels width of each colour."""
    return np.repeat(np.array([[area for area in areas for _ in range(10)]], np.uint8), 10, axis=0)


def test_colours_are_classes_ignored_or_areas_of_no_class() -> None:
    mask = colors((0, 0, 0), (255, 0, 0), (255, 255, 0), (0, 255, 0))
    values, others = describe_values(statistics(mask), COLORS)
    assert [(each.value, each.looks_like, each.share) for each in values] == [
        ("0", "class background", 0.25),
        ("255,0,0", "class red", 0.25),
        ("255,255,0", "ignored", 0.25),
        ("0,255,0", "area of no class", 0.25),
    ]
    assert others == ()


def test_noise_and_blends_are_counted_together() -> None:
    mask = colors((0, 0, 0), (255, 0, 0))
    mask[0, 0], mask[2, 0], mask[5, 5], mask[0, 10] = (3, 0, 0), (0, 4, 0), (0, 0, 2), (128, 0, 0)
    values, others = describe_values(statistics(mask), COLORS)
    assert {each.value for each in values} == {"0", "255,0,0"}
    assert [(each.looks_like, each.num_values) for each in others] == [
        ("noise of background", 3),
        ("blends at edges", 1),
    ]
    assert sum(each.share for each in (*values, *others)) == pytest.approx(1)


def test_grey_and_colour_files_are_one_table() -> None:
    grey = np.zeros((10, 20), np.uint8)
    values, _ = describe_values(statistics(grey, colors((0, 0, 0), (255, 0, 0))), COLORS)
    assert [(each.value, each.num_files, each.share) for each in values] == [
        ("0", 2, 0.75),
        ("255,0,0", 1, 0.25),
    ]


def test_all_values_but_0_are_the_second_class() -> None:
    reading = Reading("nonzero", "background=0,0,0;cell=255,255,255", "255")
    mask = np.repeat(np.array([[0, 1, 7, 255]], np.uint8), 10, axis=0).repeat(10, axis=1)
    values, others = describe_values(statistics(mask), reading)
    words = ["class background", "class cell", "class cell", "ignored"]
    assert [each.looks_like for each in values] == words
    assert others == ()
    values, _ = describe_values(statistics(colors((0, 0, 0), (0, 9, 3))), reading)
    assert [each.looks_like for each in values] == words[:2]


@pytest.mark.parametrize("encoding", ["nonzero", "index"])
@pytest.mark.parametrize("ignore", ["255", "224,224,192"])
def test_indices_count_before_the_colours_of_their_palette(
    encoding: MaskEncoding, ignore: str
) -> None:
    """As `prep` reads them: black at index 1 is no background, and index 255 is ignored."""
    palette = ((9, 9, 9), (0, 0, 0), *((7, 7, 7),) * 253, (224, 224, 192))
    indices = np.repeat(np.array([[0, 1, 255]], np.uint8), 9, axis=0).repeat(9, axis=1)
    mask = MaskFile(np.array(palette, np.uint8)[indices], indices, palette=palette)
    reading = Reading(encoding, "background=0,0,0;cell=255,255,255", ignore)
    values, _ = describe_values(statistics_of(mask), reading)
    words = ["class background", "class cell", "ignored"]
    assert [each.looks_like for each in values] == words


@pytest.mark.parametrize(
    ("levels", "is_known"), [([0, 1], True), ([0, 255], True), ([0, 1, 255], False)]
)
def test_a_mask_of_mixed_ones_has_ids_or_colours(levels: list[int], is_known: bool) -> None:
    values = values_of(statistics(np.array([levels], np.uint8)))
    reading = Reading("mixed", "background=0,0,0;cell=255,255,255")
    assert are_known(values, reading) == is_known


def test_ids_are_classes_by_their_value_and_not_by_their_colour() -> None:
    mask = np.repeat(np.array([[0, 1, 7, 255]], np.uint8), 10, axis=0).repeat(10, axis=1)
    reading = Reading("index", "background=0,0,0;cell=255,255,255", "255")
    values, _ = describe_values(statistics(mask), reading)
    assert [(each.value, each.looks_like) for each in values] == [
        ("0", "class background"),
        ("1", "class cell"),
        ("255", "ignored"),
        ("7", "id of no class"),
    ]


def test_without_a_reading_all_is_unknown() -> None:
    values, _ = describe_values(statistics(colors((0, 0, 0), (9, 9, 9))), None)
    assert {each.looks_like for each in values} == {"unknown"}


def test_many_unknown_values_are_counted_and_not_listed() -> None:
    mask = np.arange(400, dtype=np.uint16).reshape(20, 20) * 7
    values, others = describe_values(statistics(mask), COLORS)
    assert len(values) < 20
    assert others
    assert sum(each.share for each in (*values, *others)) == pytest.approx(1)
