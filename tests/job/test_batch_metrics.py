"""Confusion counts, scores with empty masks, summaries, and the reference's metrics as sums."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from flexunet.errors import UsageError
from job.metrics.batch import (
    REFERENCE_METRICS,
    RunningSums,
    all_background,
    confusion_counts,
    dice,
    iou,
    reference_metrics,
    sensitivity,
    specificity,
    summarize,
)

PARITY = Path(__file__).resolve().parents[3] / "shared" / "data" / "reference-parity"


def test_confusion_counts_are_per_case_and_class() -> None:
    labels = np.array([[[0, 0, 1, 2]], [[1, 1, 1, 1]]], np.uint8)
    predictions = np.array([[[0, 1, 1, 1]], [[1, 0, 1, 2]]], np.uint8)
    counts = confusion_counts(labels, predictions, 3)
    assert counts.dtype == tf.int64
    # Case 0, class 1: hit at 2, false alarms at 1 and 3, no miss, true negative at 0.
    assert counts.numpy().tolist() == [
        [[1, 0, 1, 2], [1, 2, 0, 1], [0, 0, 1, 3]],
        [[0, 1, 0, 3], [2, 0, 2, 0], [0, 1, 0, 3]],
    ]


def test_confusion_counts_leave_ignored_pixels_out() -> None:
    labels = np.array([[[0, 1, 255, 255]]], np.uint8)
    predictions = np.array([[[0, 1, 0, 1]]], np.uint8)
    counts = confusion_counts(labels, predictions, 2, 255).numpy()
    assert counts.tolist() == [[[1, 0, 0, 1], [1, 0, 0, 1]]]


def test_confusion_counts_of_one_channel_have_two_classes() -> None:
    assert confusion_counts(np.zeros((2, 3, 3)), np.zeros((2, 3, 3)), 1).shape == (2, 2, 4)


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


def test_summarize_gives_none_for_a_class_in_no_case() -> None:
    summary = summarize(np.array([[[9, 0, 0, 0], [0, 0, 0, 9]]]))
    assert summary["classes"][1]["dice"] is None
    assert summary["foreground_mean"]["dice"] is None
    assert summary["classes"][0]["specificity"] is None


@pytest.mark.parametrize("name", list(REFERENCE_METRICS))
def test_reference_metrics_agree_with_the_reference(name: str) -> None:
    if not PARITY.exists():
        pytest.skip(f"no reference numbers at {PARITY}")
    with np.load(PARITY / "losses_metrics.npz", allow_pickle=False) as numbers:
        expected = json.loads(str(numbers["expected"]))
        labels, logits = numbers["labels"], numbers["logits"]
    metric = REFERENCE_METRICS[name]
    total, count = metric(labels, tf.constant(logits), np.ones(len(labels)))
    assert metric.value(float(total), float(count)) == pytest.approx(expected[name], abs=1e-5)


@pytest.mark.parametrize("num_classes", [1, 2, 3])
@pytest.mark.parametrize("name", list(REFERENCE_METRICS))
def test_reference_metrics_add_over_batches(name: str, num_classes: int) -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, max(num_classes, 2), (5, 6, 7))
    labels[2, :3] = 255
    logits = rng.normal(0, 2, (5, 6, 7, num_classes))
    metric = reference_metrics([name], ignore_id=255)[name]
    whole = [float(number) for number in metric(labels, tf.constant(logits), np.ones(5))]
    sums = RunningSums()
    # The last batch is padded with a sample that counts nowhere.
    for indices, weights in (([0, 1], [1, 1]), ([2, 3], [1, 1]), ([4, 0], [1, 0])):
        part = metric(labels[indices], tf.constant(logits[indices]), np.array(weights))
        sums.add({name: part})
    assert sums.pair(name) == pytest.approx(whole, rel=1e-12)
    assert 0 < metric.value(*sums.pair(name)) < 1


def test_reference_metrics_of_one_channel_are_as_by_hand() -> None:
    logits = tf.constant(np.log([[[[3.0], [1 / 3], [3.0]]]]))  # p = 3/4, 1/4, 3/4
    labels = np.array([[[1, 0, 0]]])
    expected = {
        "dice_coef_multiclass": (1.5 + 1) / (1 + 1.75 + 1),
        "dice_coef": (1.5 + 1) / (1 + 1.75 + 1),
        "iou_coef": 0.75 / (1 + 1.75 - 0.75),
        "sensitivity": 1.0,
        "specificity": 0.5,
    }
    for name, metric in REFERENCE_METRICS.items():
        total, count = metric(labels, logits, np.ones(1))
        assert metric.value(float(total), float(count)) == pytest.approx(expected[name]), name


def test_reference_metric_of_nothing_is_finite() -> None:
    for metric in REFERENCE_METRICS.values():
        assert metric.value(0.0, 0.0) in (0.0, 1.0)


def test_reference_metrics_names_the_nearest_known_metric() -> None:
    with pytest.raises(UsageError, match="did you mean 'dice_coef_multiclass'"):
        reference_metrics(["dice_coef_multiclas"])


def test_running_sums_continue_from_their_json_state() -> None:
    first, second, whole = RunningSums(), RunningSums(), RunningSums()
    first.add({"loss": (0.1, 3)})
    whole.add({"loss": (0.1, 3)})
    second.load_state(json.loads(json.dumps(first.state())))
    for sums in (second, whole):
        sums.add({"loss": (tf.constant(0.2, tf.float64), np.int64(2))})
    assert second.pair("loss") == whole.pair("loss")
    assert whole.mean("loss") == (0.1 + 0.2) / 5
    assert np.isnan(whole.mean("unknown"))
