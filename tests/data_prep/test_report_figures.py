"""Tests the statistics, and the contact sheet: each image, and its mask as an overlay."""

import io

import numpy as np
import PIL.Image
import pytest

from data_prep.masks.color_map import ClassColor
from data_prep.report_figures import (
    _GAP,
    PairPreview,
    SplitStatistics,
    _fitted,
    _font,
    _text_width,
    contact_sheet_png,
    overlay_colors,
    statistics_png,
)

CLASSES = [ClassColor(0, "background", (0, 0, 0)), ClassColor(1, "mass", (255, 255, 255))]


def contact_sheet(
    pairs: list[PairPreview], value_max: int = 255, ignore_id: int | None = None
) -> np.ndarray:
    """Returns the pixels of the sheet, (h, w, 3) int."""
    png = contact_sheet_png(pairs, CLASSES, value_max, "a title", ignore_id=ignore_id)
    return np.asarray(PIL.Image.open(io.BytesIO(png)), int)


def is_green(pixels: np.ndarray) -> np.ndarray:
    """Returns where `pixels` are those of `green`, (h, w) bool; text and overlays are others."""
    return np.all(np.abs(pixels - (51, 127, 51)) <= 1, axis=2)


def green(height: int, width: int) -> np.ndarray:
    """Returns an image with values up to 60000."""
    return np.full((height, width, 3), (12000, 30000, 12000), np.uint16)


def test_a_mask_is_drawn_on_the_second_image_alone() -> None:
    mask = np.zeros((40, 60), np.uint8)
    mask[10:30, 20:50] = 1
    counts = is_green(
        contact_sheet([PairPreview("one", green(40, 60), mask)], value_max=60000)
    ).sum(axis=1)
    plain, masked = 60, 60 - 30
    assert counts[counts > 0].tolist() == [
        *40 * [plain],
        *10 * [plain],
        *20 * [masked],
        *10 * [plain],
    ]


def test_names_of_narrow_images_have_room() -> None:
    pairs = [
        PairPreview(f"a-long-name-of-a-case-{i}", green(80, 4), np.zeros((80, 4), np.uint8))
        for i in range(3)
    ]
    columns = np.any(is_green(contact_sheet(pairs, value_max=60000)), axis=0)
    starts = np.flatnonzero(np.diff(columns.astype(int)) == 1)
    assert len(starts) == 3
    assert np.diff(starts).min() > 100  # pixels of the name


def test_long_names_keep_the_columns_even() -> None:
    names = ("a", "barrdistorted_1003_0.3_0.3_" * 4 + "23", "b\nc")
    pairs = [PairPreview(name, green(80, 120), np.zeros((80, 120), np.uint8)) for name in names]
    pixels = contact_sheet(pairs, value_max=60000)
    columns = np.any(is_green(pixels), axis=0)
    starts = np.flatnonzero(np.diff(columns.astype(int)) == 1)
    ends = np.flatnonzero(np.diff(columns.astype(int)) == -1)
    assert np.diff(starts).tolist() == [120 + _GAP] * 2
    first = np.flatnonzero(np.any(is_green(pixels), axis=1))[0]
    for end, start in zip(ends[:-1], starts[1:], strict=True):
        assert np.all(pixels[first - 16 : first - 4, end + 1 : start] == 255)  # no name goes over


def colors_of(pixels: np.ndarray) -> set[tuple[int, ...]]:
    return set(map(tuple, np.unique(pixels.reshape(-1, 3), axis=0).tolist()))


def test_ignored_pixels_are_hatched_in_grey_and_not_a_class() -> None:
    mask = np.zeros((40, 60), np.uint8)
    mask[10:30, 20:50] = 255
    preview = PairPreview("one", green(40, 60), mask)
    hatched = contact_sheet([preview], value_max=60000, ignore_id=255)
    rows, columns = np.nonzero(is_green(hatched))
    top, left = rows.max() - 39, columns.min()
    area = hatched[top + 10 : top + 30, left + 20 : left + 50]
    assert colors_of(area) == {(220, 220, 220), (90, 90, 90)}
    lines = area[..., 0] == 220
    assert lines.mean() == 1 / 3
    assert np.array_equal(lines[1:, :-1], lines[:-1, 1:])  # diagonal
    # The legend shows both the class and the hatching; without an ignore id only the class.
    legend = hatched[rows.max() + 5 :]
    mass = (214, 39, 40)
    assert {(220, 220, 220), (90, 90, 90), mass} <= colors_of(legend)
    plain = contact_sheet([preview], value_max=60000)
    assert (90, 90, 90) not in colors_of(plain[top : top + 40, left : left + 60])


def test_short_names_are_whole() -> None:
    font = _font(11)
    for name in ("7", "ab", "\n7 "):
        assert _fitted(name, font, 100) == name.strip()
    assert _fitted("", font, 100) == ""
    assert _fitted("7", font, 1) == "…"
    assert _fitted("0123456789", font, _text_width(font, "01…89")) == "01…89"


def test_classes_have_their_own_colors_if_these_are_visible() -> None:
    colors = [(0, 0, 0), (255, 0, 0), (255, 255, 255), (240, 20, 9), (0, 0, 40), (0, 200, 80)]
    found = overlay_colors([ClassColor(i, f"c{i}", color) for i, color in enumerate(colors)])
    assert sorted(found) == [1, 2, 3, 4, 5]
    assert (found[1], found[5]) == (colors[1], colors[5])
    for class_id in (2, 3, 4):  # white, like class 1, dark
        others = [color for other, color in found.items() if other != class_id]
        distances = [
            max(abs(a - b) for a, b in zip(found[class_id], c, strict=True)) for c in others
        ]
        assert min(distances) >= 60
    many = overlay_colors([ClassColor(i, f"c{i}", (i, i, i)) for i in range(256)])
    assert len(many) == 255
    assert len({many[i] for i in range(1, 31)}) == 30


@pytest.mark.draws
@pytest.mark.parametrize(
    ("splits", "names"),
    [
        ({"train": (16, (4000, 96))}, ["background", "mass"]),
        (
            {"train": (2, (0, 0)), "valid": (0, (0, 0)), "test": (1, (0, 256))},
            ["a$b_c^{", "ü" * 50],
        ),
        (
            {"train": (10**6, (1,) * 12), "test": (1, (10**12,) * 12)},
            [f"class {index}" for index in range(12)],
        ),
    ],
)
def test_statistics_of_any_dataset_are_drawn(
    splits: dict[str, tuple[int, tuple[int, ...]]], names: list[str]
) -> None:
    """Most tests of datasets leave statistics undrawn; a warning of Matplotlib fails here."""
    classes = [ClassColor(index, name, (index,) * 3) for index, name in enumerate(names)]
    found = {name: SplitStatistics(*values) for name, values in splits.items()}
    pixels = np.asarray(PIL.Image.open(io.BytesIO(statistics_png(found, classes, "a $title"))))
    assert pixels.shape[:2] == (400 + 15 * len(classes), 1100)
    blue = np.all(pixels[..., :3] == (0x1F, 0x77, 0xB4), axis=2)  # the bars, and points of train
    assert np.any(blue[:, :440])
    assert np.any(blue[:, 440:])
