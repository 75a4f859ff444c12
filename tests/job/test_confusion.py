"""Scores of confusion counts, with empty masks, and the summary of a split."""

import json
from typing import Any

import numpy as np
import pytest

from job.metrics.batch import confusion_counts
from job.metrics.confusion import (
    Overlap,
    all_background,
    all_foreground,
    dice,
    iou,
    sensitivity,
    specificity,
    summarize,
)


def test_scores_are_as_by_hand() -> None:
    tp, fp, fn, tn = (np.array([value]) for value in (6, 2, 4, 8))
    assert dice(tp, fp, fn) == pytest.approx([12 / 18])
    assert iou(tp, fp, fn) == pytest.approx([6 / 12])
    assert sensitivity(tp, fn) == pytest.approx([6 / 10])
    assert specificity(tn, fp) == pytest.approx([8 / 10])


def test_scores_of_empty_masks_are_undefined_only_when_both_are_empty() -> None:
    # Both empty; only the prediction empty; only the truth empty.
    tp, fp, fn = np.array([0, 0, 0]), np.array([0, 0, 5]), np.array([0, 5, 0])
    for score in (dice, iou):
        values = score(tp, fp, fn)
        assert np.isnan(values[0])
        assert values[1:].tolist() == [0, 0]
    found = sensitivity(tp, fn)
    assert np.isnan(found[[0, 2]]).all()
    assert found[1] == 0


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        ((3, 1, 2), "both"),
        ((0, 0, 0), "neither"),
        ((0, 0, 4), "truth_only"),
        ((0, 5, 0), "prediction_only"),
    ],
)
def test_the_presence_of_one_case_is_that_of_an_array_of_one(
    pixels: tuple[int, int, int], expected: str
) -> None:
    tp, fp, fn = pixels
    counts = Overlap(tp, fp, fn).presence_counts()
    arrays = Overlap(np.array([tp]), np.array([fp]), np.array([fn]))
    assert counts == arrays.presence_counts()
    assert [name for name in list(counts)[:4] if counts[name]] == [expected]
    assert sum(counts.values()) - counts["missed"] == 1
    assert counts["missed"] == (expected == "truth_only")


def four_cases() -> np.ndarray[Any, Any]:
    # 10 pixels each; class 1: half right, empty, missed, false alarm. tp fp fn tn.
    first = np.array([[2, 1, 1, 6], [0, 0, 0, 10], [0, 0, 4, 6], [0, 3, 0, 7]])
    background = first[:, [3, 2, 1, 0]]
    return np.stack([background, first], axis=1)


def test_summarize_counts_empty_missed_and_false_alarms() -> None:
    summary = summarize(four_cases())
    mass = summary["classes"][1]
    assert (mass["num_empty"], mass["num_missed"], mass["num_false_alarms"]) == (1, 1, 1)
    # Dice 4/6, undefined, 0, 0; sensitivity 2/3, undefined, 0, undefined.
    assert mass["dice"] == pytest.approx(4 / 6 / 3)
    assert mass["sensitivity"] == pytest.approx(2 / 3 / 2)
    # Pooled: tp 2, fp 4, fn 5, tn 29.
    assert mass["pooled"]["dice"] == pytest.approx(4 / 13)
    assert mass["pooled"]["specificity"] == pytest.approx(29 / 33)
    assert summary["foreground_mean"]["dice"] == mass["dice"]
    assert summary["foreground_pooled"]["iou"] == pytest.approx(2 / 11)
    assert summary["pixel_accuracy"] == pytest.approx(31 / 40)
    json.dumps(summary, allow_nan=False)


def test_summarize_gives_the_all_background_baseline() -> None:
    baseline = summarize(four_cases())["all_background"]
    # 7 of 40 pixels are class 1; all of them are missed.
    assert baseline["pixel_accuracy"] == pytest.approx(33 / 40)
    assert baseline["foreground_mean"]["dice"] == 0
    assert baseline["foreground_mean"]["specificity"] == 1


def test_all_background_is_what_counting_zeros_gives() -> None:
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 3, (2, 4, 5, 6))
    found = all_background(confusion_counts(labels, predictions, 3).numpy())
    assert (found == confusion_counts(labels, np.zeros_like(labels), 3).numpy()).all()


def test_summarize_gives_the_all_foreground_baseline() -> None:
    summary = summarize(four_cases())
    mass = summary["classes"][1]["all_foreground"]
    # 3, 0, 4 and 0 of 10 pixels are class 1; where it is absent, Dice is 0.
    assert mass["dice"] == pytest.approx((6 / 13 + 0 + 8 / 14 + 0) / 4)
    assert (mass["sensitivity"], mass["specificity"]) == (1, 0)
    assert summary["all_foreground"]["foreground_mean"] == mass
    assert "all_foreground" not in summary["classes"][0]


def test_all_foreground_is_what_counting_one_class_everywhere_gives() -> None:
    labels = np.random.default_rng(0).integers(0, 3, (4, 5, 6))
    labels[0, 0] = 9  # ignored
    found = all_foreground(confusion_counts(labels, 0 * labels, 3, ignore_id=9).numpy())
    for class_id in range(3):
        everywhere = np.full_like(labels, class_id)
        counts = confusion_counts(labels, everywhere, 3, ignore_id=9).numpy()
        assert (found[:, class_id] == counts[:, class_id]).all()


def test_a_large_class_gives_the_all_foreground_baseline_a_high_dice() -> None:
    # 79 of 100 pixels: 2 * 79 / (100 + 79) = 0.8827.
    summary = summarize(np.array([[[0, 21, 0, 79], [79, 0, 0, 21]]]))
    assert summary["all_foreground"]["foreground_mean"]["dice"] == pytest.approx(0.8827, abs=1e-4)
    assert summary["all_background"]["foreground_mean"]["dice"] == 0


def test_summarize_gives_none_for_a_class_in_no_case() -> None:
    summary = summarize(np.array([[[9, 0, 0, 0], [0, 0, 0, 9]]]))
    assert summary["classes"][1]["dice"] is None
    assert summary["foreground_mean"]["dice"] is None
    assert summary["classes"][0]["specificity"] is None
