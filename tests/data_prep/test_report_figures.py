"""The sheet of sample pairs shows each picture, and its mask on it."""

import io

import numpy as np
import PIL.Image

from data_prep.imaging.color_map import ClassColor
from data_prep.report_figures import _GAP, PairPreview, contact_sheet_png

CLASSES = [ClassColor(0, "background", (0, 0, 0)), ClassColor(1, "mass", (255, 255, 255))]


def contact_sheet(pairs: list[PairPreview], value_max: int = 255) -> np.ndarray:
    """Returns the pixels of the sheet, (h, w, 3) int."""
    png = contact_sheet_png(pairs, CLASSES, value_max, "a title")
    return np.asarray(PIL.Image.open(io.BytesIO(png)), int)


def is_green(pixels: np.ndarray) -> np.ndarray:
    """Returns where `pixels` are those of `green`, (h, w) bool; text and overlays are others."""
    return np.all(np.abs(pixels - (51, 127, 51)) <= 1, axis=2)


def green(height: int, width: int) -> np.ndarray:
    """Returns a picture with values up to 60000."""
    return np.full((height, width, 3), (12000, 30000, 12000), np.uint16)


def test_a_mask_is_drawn_on_the_second_picture_alone() -> None:
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


def test_names_of_narrow_pictures_have_room() -> None:
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
