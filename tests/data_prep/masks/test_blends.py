"""Pixels between the classes: noise and blends get a class that is there, never a third one."""

import cv2
import numpy as np
import pytest

from data_prep.masks.blends import assign_classes
from data_prep.masks.coding import Shades, nearest_of, tolerances_of
from data_prep.masks.color_map import parse_color_map
from data_prep.masks.reading import read_classes
from data_prep.masks.rules import MaskRules
from tests.data_prep.masks.drawn_masks import (
    colors_of,
    compressed,
    present_within,
    random_classes,
    random_ids,
    resized,
)

CHANGES = {
    "half, bicubic": resized(0.5, cv2.INTER_CUBIC),
    "0.7, bilinear": resized(0.7, cv2.INTER_LINEAR),
    "1.6, bicubic": resized(1.6, cv2.INTER_CUBIC),
    "3, bilinear": resized(3, cv2.INTER_LINEAR),
    "half, area": resized(0.5, cv2.INTER_AREA),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("seed", range(12))
def test_a_resampled_mask_has_its_classes_and_no_others_along_edges(change: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    number = int(rng.integers(2, 7))
    classes = random_classes(rng, number)
    ids = random_ids(rng, number)
    mask = CHANGES[change](colors_of(classes).astype(np.uint8)[ids])
    height, width = mask.shape[:2]
    truth = cv2.resize(ids, (width, height), interpolation=cv2.INTER_NEAREST)
    found = read_classes(mask, MaskRules(classes), name="m.png").ids
    near = present_within(np.asarray(truth, np.uint8), number, 3)
    is_there = np.take_along_axis(near, found[np.newaxis].astype(int), 0)
    # At the tips of thin areas no pixel has the colour of the class.
    assert np.count_nonzero(~is_there) <= 1e-3 * found.size
    inside = near.sum(axis=0) == 1
    np.testing.assert_array_equal(found[inside], truth[inside])


@pytest.mark.parametrize("quality", [75, 90])
@pytest.mark.parametrize("seed", range(6))
def test_a_mask_compressed_as_jpeg_keeps_the_inside_of_its_areas(quality: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    number = int(rng.integers(2, 5))
    classes = random_classes(rng, number)
    ids = random_ids(rng, number)
    mask = compressed(quality)(colors_of(classes).astype(np.uint8)[ids])
    found = read_classes(mask, MaskRules(classes), name="m.jpg").ids
    # Chroma is stored in blocks of 16 x 16 pixels.
    inside = present_within(ids, number, 16).sum(axis=0) == 1
    assert inside.any()
    np.testing.assert_array_equal(found[inside], ids[inside])


@pytest.mark.parametrize("distance", [2, 4])
def test_a_blend_is_explained_by_classes_up_to_four_pixels_away(distance: int) -> None:
    classes = parse_color_map("background=0,0,0;stomach=255,255,0;bowel=110,130,0")
    mask = np.zeros((40, 40, 3), np.uint8)
    mask[15:25, 20 + distance : 30] = (255, 255, 0)
    mask[20, 20] = (120, 120, 0)
    reading = read_classes(mask, MaskRules(classes), name="m.png")
    assert (reading.ids[20, 20], reading.unexplained_pixels) == (0, 0)
    mask[15:25, 20:25] = 0
    mask[20, 20] = (120, 120, 0)
    reading = read_classes(mask, MaskRules(classes), name="m.png")
    assert (reading.ids[20, 20], reading.unexplained_pixels) == (2, 1)


def test_a_soft_edge_between_yellow_and_black_is_never_a_green_organ() -> None:
    classes = parse_color_map("background=0,0,0;stomach=255,255,0;bowel=110,130,0")
    mask = np.zeros((9, 12, 3), np.uint8)
    mask[:, 4:] = (255, 255, 0)
    mask[:, 4] = (100, 100, 0)
    mask[:, 5] = (150, 150, 0)
    reading = read_classes(mask, MaskRules(classes), name="m.png")
    assert reading.ids[0].tolist() == [0] * 5 + [1] * 7
    assert (reading.unmapped_pixels, reading.unexplained_pixels) == (18, 0)
    # An area of the organ itself beside that edge is read as such.
    mask[2:7, 7:12] = (110, 130, 0)
    reading = read_classes(mask, MaskRules(classes), name="m.png")
    assert (reading.ids[2:7, 7:] == 2).all()


@pytest.mark.parametrize("offset", [1, 8, 20])
def test_noise_around_a_color_is_that_class_although_no_pixel_is_exact(offset: int) -> None:
    classes = parse_color_map("background=0,0,0;organ=200,60,60;other=60,200,60")
    mask = np.zeros((20, 20, 3), np.uint8)
    noise = np.random.default_rng(0).integers(-offset, offset + 1, (12, 12, 3))
    mask[4:16, 4:16] = np.clip(np.array([200, 60, 60]) + noise, 0, 255)
    reading = read_classes(mask, MaskRules(classes), name="m.png")
    expected = np.zeros((20, 20))
    expected[4:16, 4:16] = 1
    np.testing.assert_array_equal(reading.ids, expected)
    assert reading.unexplained_pixels == 0


def test_a_pixel_that_nothing_explains_gets_the_nearest_class_and_is_counted() -> None:
    classes = parse_color_map("background=0,0,0;organ=200,60,60;other=60,200,60")
    mask = np.zeros((9, 9, 3), np.uint8)
    mask[4, 4] = (70, 180, 90)
    reading = read_classes(mask, MaskRules(classes), name="m.png")
    assert reading.ids[4, 4] == 2
    assert reading.unexplained_pixels == 1
    assert reading.unmapped_colors == (((70, 180, 90), 1, 2),)


def test_tolerances_are_a_quarter_of_the_distance_to_the_next_class() -> None:
    colors = np.array([[0, 0, 0], [40, 10, 0], [255, 255, 255], [250, 255, 255]])
    assert tolerances_of(colors).tolist() == [10, 10, 1, 1]
    assert tolerances_of(np.array([[0], [255]])).tolist() == [32, 32]


def test_nearest_of_takes_the_first_of_equally_near_colors() -> None:
    nearest, distances = nearest_of(np.array([[5, 0, 0]]), np.array([[10, 0, 0], [0, 0, 0]]))
    assert (nearest.tolist(), distances.tolist()) == ([0], [5])


def test_many_classes_nearby_give_the_nearest_of_them() -> None:
    # 20 classes in one row, so that all are within 9 pixels; more than are compared in pairs.
    colors = np.array([[12 * i, 250 - 12 * i, 0] for i in range(20)] + [[0, 0, 255]])
    codes = np.arange(20)[np.newaxis].repeat(9, axis=0)
    codes[4, 9] = 21
    values = np.concatenate([colors, [[108, 142, 160]]])
    assigned = assign_classes(codes, Shades.of(values.astype(np.uint8), colors))
    assert assigned.index[4, 9] in range(5, 14)
