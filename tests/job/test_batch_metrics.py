"""Confusion counts of a batch, and the reference's metrics as sums."""

import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from flexunet.errors import UsageError
from job.config import HYBRID_WEIGHTS
from job.metrics.batch import (
    REFERENCE_METRICS,
    RunningSums,
    confusion_counts,
    reference_metrics,
)
from tests.job.by_hand import foreground_dice, multiclass_dice

PARITY = Path(__file__).parent / "parity"
NEWER = ("dice_coef_foreground", "dice_coef_hybrid")  # not in the file of numbers


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


@pytest.mark.parametrize("name", [name for name in REFERENCE_METRICS if name not in NEWER])
def test_reference_metrics_agree_with_the_reference(name: str) -> None:
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


def test_metrics_of_newer_projects_are_as_by_hand() -> None:
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 4, (5, 6, 7))
    labels[0][labels[0] == 3] = 0  # a class that an image lacks
    labels[1, :3] = 255
    logits = rng.normal(0, 3, (5, 6, 7, 4)).astype(np.float32)
    counted = (labels != 255).astype(float)
    foreground = foreground_dice(labels, logits, counted).mean(axis=1)
    multiclass = multiclass_dice(labels, logits, counted)
    samples = np.array([1, 1, 1, 1, 0])
    expected = {
        HYBRID_WEIGHTS: (1.5 * multiclass + 0.5 * foreground) / 2,
        (1.6, 0.4): (1.6 * multiclass + 0.4 * foreground) / 2,
        (1.0, 1.0): (multiclass + foreground) / 2,
    }
    for weights, by_hand in expected.items():
        metrics = reference_metrics(NEWER, ignore_id=255, hybrid_weights=weights)
        for name, values in (("dice_coef_foreground", foreground), ("dice_coef_hybrid", by_hand)):
            total, count = metrics[name](labels, tf.constant(logits), samples)
            found = metrics[name].value(float(total), float(count))
            assert found == pytest.approx(np.average(values, weights=samples), abs=1e-6), name


def test_a_class_that_an_image_lacks_scores_nearly_nothing() -> None:
    logits = tf.constant(np.log([[[[98.0, 1.0, 1.0]] * 4]]))
    total, _ = REFERENCE_METRICS["dice_coef_foreground"](
        np.zeros((1, 1, 4), int), logits, np.ones(1)
    )
    assert 0 < float(total) < 1e-4


def test_reference_metrics_of_one_channel_are_as_by_hand() -> None:
    logits = tf.constant(np.log([[[[3.0], [1 / 3], [3.0]]]]))  # p = 3/4, 1/4, 3/4
    labels = np.array([[[1, 0, 0]]])
    expected = {
        "dice_coef_multiclass": (1.5 + 1) / (1 + 1.75 + 1),
        "dice_coef": (1.5 + 1) / (1 + 1.75 + 1),
        "iou_coef": 0.75 / (1 + 1.75 - 0.75),
        "sensitivity": 1.0,
        "specificity": 0.5,
        "dice_coef_foreground": (1.5 + 1e-6) / (2.75 + 1e-6),
        "dice_coef_hybrid": (1.5 * 2.5 / 3.75 + 0.5 * (1.5 + 1e-6) / (2.75 + 1e-6)) / 2,
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
