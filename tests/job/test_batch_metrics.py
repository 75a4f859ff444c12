"""Confusion counts of a batch, and the reference's metrics as sums."""

import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from flexunet.errors import UsageError
from job.metrics.batch import (
    REFERENCE_METRICS,
    RunningSums,
    confusion_counts,
    reference_metrics,
)

PARITY = Path(__file__).parent / "parity"


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


@pytest.mark.parametrize("name", list(REFERENCE_METRICS))
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
