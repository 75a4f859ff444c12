import numpy as np
import pytest

from job.metrics.lesions import (
    LesionCounts,
    _label_predictions,
    box_of,
    count_lesions,
    label_regions,
    regions_of_classes,
    tiny_pixels,
    true_regions,
    without_small_regions,
)


def mask_of(*rows: str) -> np.ndarray:
    return np.array([[character == "#" for character in row] for row in rows])


def counts_of(
    truth: np.ndarray, prediction: np.ndarray, tiny_regions: np.ndarray | None = None
) -> LesionCounts:
    return count_lesions(true_regions(truth, tiny_regions=tiny_regions), prediction)


def test_pixels_that_touch_at_a_corner_are_one_lesion() -> None:
    counts = counts_of(mask_of("#..", ".#.", "..."), mask_of("...", "...", "..."))
    assert (counts.num_true, counts.num_predicted, counts.num_found) == (1, 0, 0)


def test_a_lesion_is_found_when_the_overlap_is_large_enough() -> None:
    truth = mask_of("##########")
    # One pixel of ten: IoU 0.1; beside a longer prediction 1 / 11.
    assert counts_of(truth, mask_of("#.........")).num_found == 1
    truth = mask_of("..##########")
    assert counts_of(truth, mask_of("###.........")).num_found == 0


def test_one_region_over_two_lesions_finds_one_at_most() -> None:
    truth = mask_of("###..###")
    counts = counts_of(truth, mask_of("########"))
    assert (counts.num_true, counts.num_found, counts.num_false_positives) == (2, 1, 0)
    # Over everything, both are too small a part of it.
    everything = np.ones((10, 8), bool)
    small = np.zeros((10, 8), bool)
    small[:1] = truth
    counts = counts_of(small, everything)
    assert (counts.num_found, counts.num_false_positives) == (0, 1)


def test_pieces_beside_the_best_one_are_false_positives() -> None:
    counts = counts_of(mask_of("########"), mask_of("##.#####"))
    assert (counts.num_true, counts.num_found, counts.num_false_positives) == (1, 1, 1)


def test_the_best_pairs_are_taken_first() -> None:
    # The middle region overlaps both lesions; the right one fits the right lesion better.
    truth = mask_of("####.####")
    prediction = mask_of("..####.##")
    # IoU of (left, middle) 2/6, (right, middle) 1/7, (right, right) 2/4.
    counts = counts_of(truth, prediction)
    assert (counts.num_found, counts.num_false_positives) == (2, 0)


def test_tiny_regions_are_counted_apart_and_finding_one_is_no_false_positive() -> None:
    truth = mask_of("######..#", ".........", "##.......")
    tiny_regions = truth & ~without_small_regions(truth, 3)
    nothing = counts_of(truth, np.zeros_like(truth), tiny_regions=tiny_regions)
    assert (nothing.num_true, nothing.num_tiny_regions, nothing.num_false_positives) == (1, 2, 0)
    prediction = mask_of("#####...#", ".........", "....###..")
    found = counts_of(truth, prediction, tiny_regions=tiny_regions)
    assert (found.num_true, found.num_found, found.num_tiny_regions) == (1, 1, 2)
    assert found.num_false_positives == 1
    everything = counts_of(truth, prediction)
    assert (everything.num_true, everything.num_found, everything.num_tiny_regions) == (3, 2, 0)


def test_pixels_of_tiny_regions_are_those_of_all_classes() -> None:
    truth = np.array([[1, 1, 0, 2], [1, 0, 0, 0], [0, 0, 2, 2], [1, 0, 2, 0]], np.uint8)
    regions = regions_of_classes(truth, 3, min_pixels=3)
    assert (tiny_pixels(regions, (4, 4)) == mask_of("...#", "....", "....", "#...")).all()
    assert [each.num_lesions for each in regions] == [1, 1]
    # The same decision in an enlarged truth, where tiny regions have more pixels.
    tiny_regions = tiny_pixels(regions, (4, 4)).repeat(2, axis=0).repeat(2, axis=1)
    enlarged = truth.repeat(2, axis=0).repeat(2, axis=1)
    again = regions_of_classes(enlarged, 3, tiny_regions=tiny_regions)
    assert [(each.num_tiny, each.num_lesions) for each in again] == [(1, 1), (1, 1)]


def test_empty_masks_have_no_lesions() -> None:
    nothing = np.zeros((3, 3), bool)
    counts = counts_of(nothing, nothing)
    assert (counts.num_true, counts.num_predicted, counts.num_false_positives) == (0, 0, 0)
    assert counts_of(nothing, ~nothing).num_false_positives == 1


def test_small_regions_are_removed_by_their_pixels() -> None:
    mask = mask_of("##..#", "#....", "....#")
    assert (without_small_regions(mask, 2) == mask_of("##...", "#....", ".....")).all()
    assert not without_small_regions(mask, 4).any()
    assert without_small_regions(mask, 0) is mask


@pytest.mark.parametrize("seed", range(20))
def test_regions_keep_their_order_in_a_part_and_in_a_stack(seed: int) -> None:
    random = np.random.default_rng(seed)
    height, width = random.integers(8, 30, 2)
    masks = random.random((3, height, width)) < 0.15
    masks[:, : random.integers(0, 4)] = False  # parts start at odd and even rows and columns
    masks[:, :, : random.integers(0, 4)] = False
    labels, sizes, ends = _label_predictions(masks)
    first = 0
    for mask, stacked, last in zip(masks, labels, ends, strict=True):
        whole, whole_sizes = label_regions(mask)
        box = box_of(mask)
        assert box is not None
        assert np.array_equal(label_regions(mask[box])[0], whole[box])
        assert np.array_equal(stacked[:height], np.where(mask, whole + first, 0))
        assert np.array_equal(sizes[first + 1 : last + 1], whole_sizes[1:])
        first = last
    assert first == len(sizes) - 1
