"""Contours and their distances, by hand and against DeepMind's own implementation."""

import math

import numpy as np
import pytest

from benchmarks.metrics import differences
from job.metrics.surface_distance import contour_distances, contour_of, hausdorff, surface_dice


def square(top: int, left: int, side: int = 2) -> np.ndarray:
    mask = np.zeros((20, 20), bool)
    mask[top : top + side, left : left + side] = True
    return mask


def test_two_hundred_random_masks_agree_with_an_independent_implementation() -> None:
    found = differences(200)
    assert found["num_both_empty"] > 5
    assert found["num_one_empty"] > 5
    for name in ("dice", "iou", "hd95", "surface_dice"):
        assert found[name] < 1e-12, name


def test_contour_of_a_square_has_its_corners_cut() -> None:
    contour = contour_of(square(4, 6), (1.0, 1.0))
    # Corners of pixels: 3 x 3 of which the middle is inside; with the border of padding, shared
    # corner (4, 6) of pixel (4, 6) is point (4, 6).
    assert len(contour.points) == 8
    assert contour.points.min(axis=0).tolist() == [4, 6]
    assert contour.points.max(axis=0).tolist() == [6, 8]
    # Four straight elements of length 1, four cut corners of half a diagonal.
    assert contour.lengths.sum() == pytest.approx(4 + 4 * math.sqrt(2) / 2)


def test_contour_reaches_the_border_of_the_image() -> None:
    assert len(contour_of(np.ones((3, 5), bool), (1.0, 1.0)).points) == 2 * (4 + 4 + 2) - 4


def test_distances_take_the_spacing_of_rows_and_columns() -> None:
    moved_down = contour_distances(square(4, 6), square(9, 6), (0.5, 3.0))
    moved_right = contour_distances(square(4, 6), square(4, 11), (0.5, 3.0))
    # The near sides are 3 pixels apart, the far ones 5.
    assert hausdorff(moved_down, 100) == pytest.approx(5 * 0.5)
    assert hausdorff(moved_right, 100) == pytest.approx(5 * 3.0)


def test_hausdorff_at_95_leaves_a_spike_out() -> None:
    truth, prediction = np.zeros((60, 60), bool), np.zeros((60, 60), bool)
    truth[10:40, 10:40] = prediction[10:40, 10:40] = True
    prediction[50, 50] = True  # one pixel: 2.8 of 120 and some units of length
    distances = contour_distances(truth, prediction, (1.0, 1.0))
    assert hausdorff(distances, 95) == 0
    assert hausdorff(distances, 100) == pytest.approx(math.hypot(11, 11))


def test_surface_dice_counts_length_within_the_tolerance() -> None:
    distances = contour_distances(square(4, 6), square(4, 7), (1.0, 1.0))
    assert surface_dice(distances, 1.0) == 1
    # Columns 6 to 8 and 7 to 9 of corners: of the truth, above and below a straight element (column
    # 7) and a cut corner (column 8) lie on the other contour, but the right side (row 5, column 8)
    # does not: the other square is inside there. Whole: 4 straight ones and 4 cut corners.
    corner = math.sqrt(2) / 2
    assert surface_dice(distances, 0.0) == pytest.approx((2 + 2 * corner) / (4 + 4 * corner))


@pytest.mark.parametrize(("spacing", "num_pixels"), [(0.2, 5), (0.1, 10), (0.05, 20)])
def test_surface_dice_does_not_depend_on_the_place_in_the_image(
    spacing: float, num_pixels: int
) -> None:
    for left in range(0, 200, 7):
        truth, prediction = np.zeros((30, 260), bool), np.zeros((30, 260), bool)
        truth[5:25, left : left + 30] = True
        prediction[5:25, left + num_pixels : left + num_pixels + 30] = True
        # One millimetre apart: every element lies within, many on the tolerance.
        distances = contour_distances(truth, prediction, (spacing, spacing))
        assert surface_dice(distances, 1.0) == 1, left


def test_distances_refuse_an_empty_mask_and_other_shapes() -> None:
    with pytest.raises(ValueError, match="empty mask has no contour"):
        contour_distances(square(4, 6), np.zeros((20, 20), bool), (1.0, 1.0))
    with pytest.raises(ValueError, match="differ in shape"):
        contour_distances(square(4, 6), np.ones((3, 3), bool), (1.0, 1.0))
