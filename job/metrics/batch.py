"""Computes metrics of a batch on its devices: confusion counts, and sums for the reference metrics.

The counts give per-class values that are exact over a split, see `job/metrics/confusion.py`. The
metrics of the reference implementation (TensorFlow-FlexUNet, "the reference") keep its formulas,
which mix all classes. Here they are pairs (sum, count) that add up over batches and replicas, so
the value is that of the whole split; the reference averages the values of batches. Knows nothing of
files, models or the step.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from flexunet.errors import UsageError
from flexunet.settings import suggestion
from job.config import HYBRID_WEIGHTS

_SMALL = 1e-6  # keeps Dice of one class of one image defined


def confusion_counts(
    labels: tf.Tensor, predictions: tf.Tensor, num_classes: int, ignore_id: int | None = None
) -> tf.Tensor:
    """Counts true positives, false positives, false negatives and true negatives of each case.

    Args:
        labels: (B, H, W) integer class ids.
        predictions: (B, H, W) integer class ids.
        num_classes: K. A head of one channel predicts two classes, so 1 means 2.
        ignore_id: pixels with this label are not counted.

    Returns:
        (B, K, 4) int64.
    """
    labels, predictions = tf.cast(labels, tf.int32), tf.cast(predictions, tf.int32)
    counted = tf.ones_like(labels, tf.bool) if ignore_id is None else labels != ignore_id

    def number(where: tf.Tensor) -> tf.Tensor:
        return tf.math.count_nonzero(where & counted, axis=(1, 2))  # (B,) int64

    pixels = number(counted)
    classes = []
    for class_id in range(max(num_classes, 2)):
        true, predicted = labels == class_id, predictions == class_id
        hits, num_true, num_predicted = number(true & predicted), number(true), number(predicted)
        misses, false_alarms = num_true - hits, num_predicted - hits
        classes.append(
            tf.stack([hits, false_alarms, misses, pixels - hits - misses - false_alarms], axis=-1)
        )
    return tf.stack(classes, axis=1)


@dataclass(frozen=True)
class ReferenceMetric:
    """A metric of the reference implementation, as a quotient of sums.

    Calling it gives (sum, count) of a batch, () float64 each; add them over batches and replicas.

    Attributes:
        sums: (y, p, weights) -> numerator and denominator of each image, (B,). y and p are
            (B, H, W, C), one-hot label and probability; weights (B, H, W, 1).
        smooth: added to numerator and denominator of the quotient of the whole split.
        ignore_id: label of pixels that are not counted.
    """

    sums: Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]
    smooth: float = 0.0
    ignore_id: int | None = None

    def __call__(
        self, labels: tf.Tensor, logits: tf.Tensor, sample_weights: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns (sum, count) of labels (B, H, W), logits (B, H, W, C) and weights (B,)."""
        dtype = tf.float64 if logits.dtype == tf.float64 else tf.float32
        truth, probabilities = _truth_and_probabilities(labels, tf.cast(logits, dtype))
        counted = (
            tf.ones_like(labels, tf.bool) if self.ignore_id is None else (labels != self.ignore_id)
        )
        pixel_weights = tf.cast(counted, dtype)[..., tf.newaxis]
        numerators, denominators = self.sums(truth, probabilities, pixel_weights)
        sample_weights = tf.cast(sample_weights, tf.float64)
        return (
            tf.reduce_sum(sample_weights * tf.cast(numerators, tf.float64)),
            tf.reduce_sum(sample_weights * tf.cast(denominators, tf.float64)),
        )

    def value(self, total: float, count: float) -> float:
        """Returns the metric of the added sums; 0 if nothing was added."""
        denominator = count + self.smooth
        return (total + self.smooth) / denominator if denominator else 0.0


def _truth_and_probabilities(labels: tf.Tensor, logits: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    if logits.shape[-1] == 1:
        return tf.cast(labels == 1, logits.dtype)[..., tf.newaxis], tf.sigmoid(logits)
    truth = tf.one_hot(tf.cast(labels, tf.int32), logits.shape[-1], dtype=logits.dtype)
    return truth, tf.nn.softmax(logits)


def _per_image(values: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(values, axis=(1, 2, 3))


def _overlap(
    truth: tf.Tensor, probabilities: tf.Tensor, weights: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    return (
        _per_image(weights * truth * probabilities),
        _per_image(weights * (truth + probabilities)),
    )


def _dice_sums(*batch: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    intersection, both = _overlap(*batch)
    return 2 * intersection, both


def _iou_sums(*batch: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    intersection, both = _overlap(*batch)
    return intersection, both - intersection


def _image_dice_sums(*batch: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    intersection, both = _overlap(*batch)
    return (2 * intersection + 1) / (both + 1), tf.ones_like(both)


def _class_dice_sums(
    truth: tf.Tensor, probabilities: tf.Tensor, weights: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    # A single output channel is the foreground.
    first = 0 if truth.shape[-1] == 1 else 1
    truth, probabilities = truth[..., first:], probabilities[..., first:]
    intersection = tf.reduce_sum(weights * truth * probabilities, axis=(1, 2))
    both = tf.reduce_sum(weights * (truth + probabilities), axis=(1, 2))
    dice = tf.reduce_mean((2 * intersection + _SMALL) / (both + _SMALL), axis=-1)
    return dice, tf.ones_like(dice)


def _hybrid(weights: Sequence[float]) -> "ReferenceMetric":
    """Returns half of the weighted sum of multiclass Dice and foreground Dice."""

    def sums(*batch: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        multiclass, count = _image_dice_sums(*batch)
        foreground, _ = _class_dice_sums(*batch)
        return (weights[0] * multiclass + weights[1] * foreground) / 2, count

    return ReferenceMetric(sums)


def _sensitivity_sums(
    truth: tf.Tensor, probabilities: tf.Tensor, weights: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    return _per_image(weights * tf.round(truth * probabilities)), _per_image(weights * truth)


def _specificity_sums(
    truth: tf.Tensor, probabilities: tf.Tensor, weights: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    return _sensitivity_sums(1 - truth, 1 - probabilities, weights)


REFERENCE_METRICS: dict[str, ReferenceMetric] = {
    "dice_coef_multiclass": ReferenceMetric(_image_dice_sums),
    "dice_coef": ReferenceMetric(_dice_sums, smooth=1.0),
    "iou_coef": ReferenceMetric(_iou_sums),
    "sensitivity": ReferenceMetric(_sensitivity_sums),
    "specificity": ReferenceMetric(_specificity_sums),
    "dice_coef_foreground": ReferenceMetric(_class_dice_sums),
    "dice_coef_hybrid": _hybrid(HYBRID_WEIGHTS),
}
"""The reference implementation's metrics, by name; sums run over pixels and channels, y is the
one-hot label, p the probability:

dice_coef_multiclass  mean over images of (2 sum(y p) + 1) / (sum(y) + sum(p) + 1) of that image.
                      With softmax this is nearly the mean probability of the true class: a soft
                      pixel accuracy, high even if nothing is predicted
dice_coef             (2 sum(y p) + 1) / (sum(y) + sum(p) + 1)
iou_coef              sum(y p) / (sum(y) + sum(p) - sum(y p))
sensitivity           sum(round(y p)) / sum(y)
specificity           sum(round((1 - y) (1 - p))) / sum(1 - y)
dice_coef_foreground  mean over images and classes but 0 of (2 sum(y p) + e) / (sum(y + p) + e) of
                      that image and class, e = 1e-6; a class that an image lacks scores nearly 0
dice_coef_hybrid      (a dice_coef_multiclass + b dice_coef_foreground) / 2, a = 1.5 and b = 0.5

They are exact over the whole split; the reference computes all but the first per batch and averages
the batches. With two classes its sensitivity and specificity are the same number, because each
class is the complement of the other.
"""


def reference_metrics(
    names: Iterable[str],
    *,
    ignore_id: int | None = None,
    hybrid_weights: Sequence[float] = HYBRID_WEIGHTS,
) -> dict[str, ReferenceMetric]:
    """Returns the metrics with these names; pixels with label `ignore_id` are left out.

    Args:
        hybrid_weights: a and b of dice_coef_hybrid.

    Raises:
        UsageError: a name is unknown.
    """
    metrics = {}
    for name in names:
        if name not in REFERENCE_METRICS:
            known = suggestion(name, list(REFERENCE_METRICS))
            raise UsageError(f"metrics={name!r}: unknown metric; {known}")
        is_hybrid = name == "dice_coef_hybrid"
        metric = _hybrid(hybrid_weights) if is_hybrid else REFERENCE_METRICS[name]
        metrics[name] = ReferenceMetric(metric.sums, metric.smooth, ignore_id)
    return metrics


class RunningSums:
    """Adds (sum, count) pairs by name in float64, over the batches of an epoch.

    The state is a JSON dict, so that an epoch can continue with the same bits.
    """

    def __init__(self) -> None:
        self._pairs: dict[str, tuple[float, float]] = {}

    def add(self, pairs: Mapping[str, tuple[Any, Any]]) -> None:
        """Adds scalars: Python numbers, numpy or eager tensors."""
        for name, (total, count) in pairs.items():
            old_total, old_count = self._pairs.get(name, (0.0, 0.0))
            self._pairs[name] = (old_total + float(total), old_count + float(count))

    def pair(self, name: str) -> tuple[float, float]:
        """Returns (sum, count) of `name`, zeros before its first pair."""
        return self._pairs.get(name, (0.0, 0.0))

    def mean(self, name: str) -> float:
        """Returns sum / count of `name`; NaN when the count is 0."""
        total, count = self.pair(name)
        return total / count if count else float("nan")

    def state(self) -> dict[str, list[float]]:
        """Returns the sums as JSON types."""
        return {name: list(pair) for name, pair in self._pairs.items()}

    def load_state(self, state: Mapping[str, Iterable[float]]) -> None:
        """Continues from the sums that `state` returned."""
        loaded = {}
        for name, pair in state.items():
            total, count = pair
            loaded[name] = (float(total), float(count))
        self._pairs = loaded
