import io
import math
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from data_prep.masks.color_map import ClassColor
from job.reporting.plots import curve_png, mask_png, overlay_png, panel_png, panel_title

pytestmark = pytest.mark.draws

CLASSES = (ClassColor(0, "background", (0, 0, 0)), ClassColor(1, "mass", (255, 255, 255)))
THREE_CLASSES = (*CLASSES, ClassColor(2, "cyst", (255, 0, 0)))
TRUTH_COLOR = (0, 220, 255)
PREDICTION_COLOR = (255, 140, 0)


def pixels_of(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def num_of(png: bytes, color: tuple[int, int, int], rows: slice = slice(None)) -> int:
    return int((pixels_of(png)[rows] == color).all(axis=-1).sum())


def square(left: int, class_id: int = 1, side: int = 64) -> np.ndarray:
    ids = np.zeros((side, side), np.uint8)
    ids[16:48, left : left + 32] = class_id
    return ids


@pytest.mark.parametrize("num_epochs", [1, 2, 60])
def test_curve_png_shows_both_series_and_repeats_bitwise(num_epochs: int) -> None:
    values = {
        "loss": list(np.linspace(1.0, 0.1, num_epochs)),
        "val_loss": list(np.linspace(1.2, 0.3, num_epochs)),
    }
    png = curve_png("train_losses", range(num_epochs), values, "loss")
    # matplotlib's named colours: green is (0, 128, 0), red (255, 0, 0).
    assert num_of(png, (0, 128, 0)) > 30
    assert num_of(png, (255, 0, 0)) > 30
    assert png == curve_png("train_losses", range(num_epochs), values, "loss")
    assert not Image.open(io.BytesIO(png)).info.get("Software")


def test_curve_png_distinguishes_lines_of_validation_alone() -> None:
    values = {"val_foreground_dice": [0.1, 0.5, 0.7], "val_foreground_iou": [0.1, 0.3, 0.5]}
    png = curve_png("foreground", range(3), values, "score")
    # The first two of matplotlib's usual colours.
    assert num_of(png, (0x1F, 0x77, 0xB4)) > 30
    assert num_of(png, (0xFF, 0x7F, 0x0E)) > 30


def test_curve_png_leaves_a_gap_for_nan_and_takes_any_title() -> None:
    png = curve_png("a$b_c^{", [0, 1, 2], {"loss": [1.0, float("nan"), 0.5]}, "loss")
    assert num_of(png, (255, 0, 0)) == 0
    assert num_of(png, (0, 128, 0)) > 30


@pytest.mark.parametrize("values", [[math.nan] * 2, [math.inf, 1.0], [1e300, -1e300], [0.0, 0.0]])
def test_curve_png_draws_any_values(values: list[float]) -> None:
    """Most tests of runs leave curves undrawn; a warning of Matplotlib fails here."""
    png = curve_png("loss", [1, 2], {"loss": values, "val_loss": values[::-1]}, "loss")
    assert pixels_of(png).shape == (600, 960, 3)


def test_mask_png_keeps_ids_and_shows_colours() -> None:
    ids = np.array([[0, 1, 2, 255]], np.uint8)
    picture = Image.open(io.BytesIO(mask_png(ids, THREE_CLASSES)))
    assert picture.mode == "P"
    assert np.array_equal(np.asarray(picture), ids)
    # The ignore id has no class and is shown grey.
    assert np.asarray(picture.convert("RGB")).tolist() == [
        [[0, 0, 0], [255, 255, 255], [255, 0, 0], [128, 128, 128]]
    ]


def test_overlay_png_draws_only_what_is_given() -> None:
    image = np.full((64, 64), 200, np.uint8)
    picture = slice(0, 1024)  # the legend is below
    without = overlay_png(image, square(8), CLASSES)
    assert num_of(without, PREDICTION_COLOR, picture) > 500
    assert num_of(without, TRUTH_COLOR) == 0
    both = overlay_png(image, square(8), CLASSES, square(24))
    assert num_of(both, TRUTH_COLOR, picture) > 500


def test_overlay_png_shows_the_truth_where_both_agree() -> None:
    png = overlay_png(np.zeros((64, 64), np.uint8), square(8), CLASSES, square(8))
    # Contour of a square of 32 * 16 = 512 pixels: a rim of the wider line stays visible all round.
    assert num_of(png, TRUTH_COLOR, slice(0, 1024)) > 4 * 512
    assert num_of(png, PREDICTION_COLOR, slice(0, 1024)) > 4 * 512


def test_overlay_png_places_the_contour_on_the_region() -> None:
    png = overlay_png(np.zeros((64, 64), np.uint8), square(8), CLASSES)
    drawn = (pixels_of(png)[:1024] == PREDICTION_COLOR).all(axis=-1)
    rows, columns = np.nonzero(drawn)
    # Scale 1024 / 64 = 16: rows 16..48 become 256..768, columns 8..40 become 128..640; the line is
    # two or three pixels wide.
    assert (rows.min(), rows.max()) == pytest.approx((256, 767), abs=2)
    assert (columns.min(), columns.max()) == pytest.approx((128, 639), abs=2)


def test_overlay_png_dims_the_image() -> None:
    png = overlay_png(np.full((64, 64, 3), 200, np.uint8), np.zeros((64, 64), np.uint8), CLASSES)
    # 0.65 * 200 = 130
    assert pixels_of(png)[100, 100].tolist() == [130, 130, 130]


def test_overlay_png_tints_when_there_are_more_classes() -> None:
    image = np.full((64, 64, 1), 200, np.uint8)
    png = overlay_png(image, square(8, class_id=2), THREE_CLASSES)
    # 130 + 0.35 * (255 - 130) = 173.75 and 130 + 0.35 * (0 - 130) = 84.5 (rounds to even)
    assert pixels_of(png)[512, 400].tolist() == [174, 84, 84]


def test_overlay_png_does_not_outline_the_ignore_id() -> None:
    image = np.zeros((64, 64), np.uint8)
    png = overlay_png(image, np.zeros_like(image), CLASSES, square(8, class_id=255))
    assert num_of(png, TRUTH_COLOR, slice(0, 1024)) == 0


def test_overlay_png_bounds_the_size_of_large_images() -> None:
    ids = np.zeros((3000, 2000), np.uint8)
    picture = Image.open(io.BytesIO(overlay_png(np.zeros((3000, 2000), np.uint16), ids, CLASSES)))
    assert picture.width == 1067  # 2000 * 1600 / 3000
    assert picture.height == 1600 + 26


def test_panel_png_shows_sixteen_bit_images_over_their_range() -> None:
    image = np.zeros((64, 64), np.uint16)
    image[:, 32:] = 4095
    pixels = pixels_of(panel_png(image, square(8), square(24), CLASSES, "case"))
    # Three tiles of 512 with margins of 10; the first starts at x = 10, below two lines of 28.
    row = 56 + 256
    assert pixels[row, 10 + 100].tolist() == [0, 0, 0]
    assert pixels[row, 10 + 400].tolist() == [255, 255, 255]
    # Truth covers columns 8..40 of 64, so x = 64..320; prediction 24..56, so x = 192..448.
    truth_left, prediction_left = 10 + 522, 10 + 2 * 522
    assert pixels[row, truth_left + 100].tolist() == [255, 255, 255]
    assert pixels[row, prediction_left + 100].tolist() == [0, 0, 0]
    assert pixels[row, prediction_left + 400].tolist() == [255, 255, 255]


def test_panel_png_fits_a_title_of_any_length() -> None:
    ids = np.zeros((16, 64), np.uint8)
    short = panel_png(ids, ids, ids, CLASSES, "case")
    long = panel_png(ids, ids, ids, CLASSES, "very long name " * 50)
    assert pixels_of(short).shape == pixels_of(long).shape


def test_panel_title_says_when_there_is_nothing_to_score() -> None:
    assert panel_title("14.png", 0.92549) == "14.png: image Dice 0.925"
    assert panel_title("14.png", None) == "14.png: no foreground"


def test_an_overlay_does_not_load_matplotlib() -> None:
    code = (
        "import sys; from job.reporting import plots; found = plots._font().path; "
        "assert 'matplotlib' not in sys.modules; "
        "import matplotlib; assert found.startswith(matplotlib.get_data_path()), found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
