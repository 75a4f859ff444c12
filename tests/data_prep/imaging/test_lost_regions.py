"""Regions that leave no stored pixel, by hand and against resizing itself."""

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.imaging.geometry import Box, Geometry, apply_geometry, fit
from data_prep.imaging.lost_regions import RegionCounts, count_regions, regions_at


def test_regions_between_the_kept_pixels_are_lost() -> None:
    mask = np.zeros((16, 16), np.uint8)
    mask[1:9, 1:9] = 1
    mask[12, 12] = mask[13, 13] = 1  # touch at a corner: one region
    mask[14, 2] = 2
    geometry = Geometry("stretch", 16, 16, 0, 0, 4, 4)  # rows and columns 2, 6, 10, 14
    found = count_regions(mask, geometry, 4)
    assert found == RegionCounts((0, 2, 1, 0), (0, 1, 0, 0))
    assert not found.is_emptied
    mask[mask == 1] = 0
    mask[14, 2], mask[13, 2] = 0, 2
    found = count_regions(mask, geometry, 3)
    assert found == RegionCounts((0, 0, 1), (0, 0, 1))
    assert found.is_emptied


def test_a_mirrored_mask_keeps_other_columns() -> None:
    mask = np.zeros((16, 16), np.uint8)
    mask[2, [2, 13]] = 1
    mask[6, 9] = 1
    plain = Geometry("stretch", 16, 16, 0, 0, 4, 4)  # columns 2, 6, 10, 14; mirrored 13, 9, 5, 1
    mirrored = Geometry("stretch", 16, 16, 0, 0, 4, 4, is_flipped=True)
    assert count_regions(mask, plain, 2) == RegionCounts((0, 3), (0, 2))
    assert count_regions(mask, mirrored, 2) == RegionCounts((0, 3), (0, 1))


def test_an_empty_mask_has_no_regions_and_is_not_emptied() -> None:
    found = count_regions(np.zeros((9, 9), np.uint8), Geometry("stretch", 9, 9, 0, 0, 4, 4), 2)
    assert found == RegionCounts((0, 0), (0, 0))
    assert not found.is_emptied


@pytest.mark.parametrize("size", [(8, 8), (8, 20), (30, 30)])
def test_a_mask_that_is_not_made_smaller_is_not_counted(size: tuple[int, int]) -> None:
    assert count_regions(np.ones((8, 8), np.uint8), Geometry("pad", 8, 8, 0, 0, *size), 2) is None


@given(
    seed=st.integers(0, 2**32 - 1),
    source=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    target=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    kind=st.sampled_from(["stretch", "pad"]),
    is_cropped=st.booleans(),
    is_flipped=st.booleans(),
)
def test_counts_are_those_of_labels_that_are_resized(
    seed: int,
    source: tuple[int, int],
    target: tuple[int, int],
    kind: str,
    is_cropped: bool,
    is_flipped: bool,
) -> None:
    random = np.random.default_rng(seed)
    mask = (random.random(source) < random.choice([0.01, 0.05, 0.3])).astype(np.uint8)
    crop = None
    if is_cropped:
        crop = Box(source[0] // 4, source[1] // 3, -(-source[0] // 2), -(-source[1] // 2))
        inside = np.zeros_like(mask)  # foreground that a crop cuts off is refused before
        rows, columns = slice(crop.top, crop.top + crop.height), slice(crop.left, None)
        inside[rows, columns][:, : crop.width] = mask[rows, columns][:, : crop.width]
        mask = inside
    part = (crop.height, crop.width) if crop else source
    fitted = fit(part, target, kind=kind)
    place = fitted.top, fitted.left, fitted.height, fitted.width
    geometry = Geometry(kind, *source, *place, crop, is_flipped)
    found = count_regions(mask, geometry, 2)
    if found is None:
        return
    count, labels = cv2.connectedComponents(mask, connectivity=8)
    stored = apply_geometry(labels.astype(np.uint16), geometry, *target, nearest=True)
    assert found.regions == (0, count - 1)
    assert found.lost == (0, count - 1 - len(set(stored[stored > 0].tolist())))


def test_areas_are_counted_once_for_several_sizes() -> None:
    rng = np.random.default_rng(0)
    mask = rng.choice(np.array([0, 0, 0, 1, 2, 9], np.uint8), (40, 30))
    places = [fit((40, 30), (height, height), kind="stretch") for height in (8, 16, 24)]
    found = regions_at(mask, places, 4)
    for class_id in (1, 2):
        areas, is_lost = found[class_id]
        assert areas.sum() == np.count_nonzero(mask == class_id)
        for place, lost in zip(places, is_lost, strict=True):
            counts = count_regions(mask, place, 4)
            assert counts is not None
            assert (counts.regions[class_id], counts.lost[class_id]) == (len(areas), lost.sum())
    assert not len(found[3][0])
