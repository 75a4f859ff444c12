"""Owns the metrics: confusion counts per case, their summary, and the reference's as sums.

Two families. The counts (TensorFlow) and what is made of them (numpy) give per-class values that
are exact over a split. The reference implementation's metrics keep its formulas, which mix all
classes; here they are pairs (sum, count) that add over batches and replicas, so that the value is
that of the whole split, where the reference averages the values of batches.

Rules for empty masks, per case and class. Class absent from truth and prediction: Dice and IoU are
undefined (NaN), left out of means, and the case is counted as empty. Absent from one of the two
only: Dice and IoU are 0. Sensitivity is undefined where the truth lacks the class, specificity
where the truth is nothing but the class. Knows nothing of files, models or the step.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from flexunet.errors import UsageError
from flexunet.settings import suggestion

Counts: TypeAlias = npt.NDArray[Any]
Values: TypeAlias = npt.NDArray[np.float64]


def confusion_counts(
    labels: tf.Tensor, predictions: tf.Tensor, num_classes: int, ignore_id: int | None = None
) -> tf.Tensor:
    """Returns true positives, false positives, false negatives, true negatives of each case.

    Args:
        labels: (B, H, W) integer class ids.
        predictions: (B, H, W) integer class ids.
        num_classes: K. A head of one channel predicts two classes, so 1 counts as 2.
        ignore_id: pixels with this label are in none of the four.

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


def dice(tp: Counts, fp: Counts, fn: Counts) -> Values:
    """Returns 2 tp / (2 tp + fp + fn), elementwise; NaN where truth and prediction are empty."""
    return _ratio(2 * tp, 2 * tp + fp + fn)


def iou(tp: Counts, fp: Counts, fn: Counts) -> Values:
    """Returns tp / (tp + fp + fn), elementwise; NaN where truth and prediction are empty."""
    return _ratio(tp, tp + fp + fn)


def sensitivity(tp: Counts, fn: Counts) -> Values:
    """Returns tp / (tp + fn), elementwise; NaN where the truth is empty."""
    return _ratio(tp, tp + fn)


def specificity(tn: Counts, fp: Counts) -> Values:
    """Returns tn / (tn + fp), elementwise; NaN where the truth is everything."""
    return _ratio(tn, tn + fp)


def scores(counts: Counts) -> dict[str, Values]:
    """Returns the four scores of `counts` (..., 4), each (...) float64 with NaN for undefined."""
    tp, fp, fn, tn = np.moveaxis(np.asarray(counts), -1, 0)
    return {
        "dice": dice(tp, fp, fn),
        "iou": iou(tp, fp, fn),
        "sensitivity": sensitivity(tp, fn),
        "specificity": specificity(tn, fp),
    }


def all_background(counts: Counts) -> Counts:
    """Returns the counts (..., C, 4) that predicting class 0 everywhere would have given."""
    tp, fp, fn, tn = np.moveaxis(np.asarray(counts), -1, 0)
    present, absent = tp + fn, fp + tn
    zero = np.zeros_like(present)
    baseline = np.stack([zero, zero, present, absent], axis=-1)
    baseline[..., 0, :] = np.stack([present, absent, zero, zero], axis=-1)[..., 0, :]
    return baseline


def summarize(cases: Counts) -> dict[str, Any]:
    """Returns the scores of a split, JSON-ready; an undefined value is None.

    `classes[c]` holds the mean of each score over the cases where it is defined, the same from
    `pooled` counts, and how many cases are `num_empty` (class in neither mask; left out of the mean
    Dice and IoU), `num_missed` (in the truth, not one pixel found) and `num_false_alarms` (in the
    prediction only). `foreground_mean` and `foreground_pooled` average over the classes but 0.
    `all_background` holds the foreground means and the pixel accuracy of predicting class 0
    everywhere: what a model must beat.

    Args:
        cases: (N, C, 4) integer, from `confusion_counts`.
    """
    cases = np.asarray(cases)
    pooled = cases.sum(axis=0)
    classes = [_summarize_class(cases[:, c], pooled[c], c) for c in range(cases.shape[1])]
    baseline = all_background(cases)
    return {
        "num_cases": len(cases),
        "foreground_mean": _foreground(cases),
        "foreground_pooled": _foreground(pooled[np.newaxis]),
        "pixel_accuracy": _pixel_accuracy(pooled),
        "all_background": {
            "foreground_mean": _foreground(baseline),
            "pixel_accuracy": _pixel_accuracy(baseline.sum(axis=0)),
        },
        "classes": classes,
    }


def _summarize_class(cases: Counts, pooled: Counts, class_id: int) -> dict[str, Any]:
    tp, fp, fn, _ = np.moveaxis(cases, -1, 0)
    return {
        "id": class_id,
        **{name: _mean(values) for name, values in scores(cases).items()},
        "pooled": {name: _mean(value) for name, value in scores(pooled).items()},
        "num_empty": int(np.sum(tp + fp + fn == 0)),
        "num_missed": int(np.sum((tp == 0) & (fn > 0))),
        "num_false_alarms": int(np.sum((tp + fn == 0) & (fp > 0))),
    }


def _foreground(cases: Counts) -> dict[str, float | None]:
    """Returns the mean over classes 1.. of each class's mean over `cases` (N, C, 4)."""
    result = {}
    for name, values in scores(cases).items():
        means = [_mean(values[:, c]) for c in range(1, cases.shape[1])]
        result[name] = _mean(np.array([mean for mean in means if mean is not None], np.float64))
    return result


def _pixel_accuracy(pooled: Counts) -> float | None:
    return _mean(_ratio(pooled[:, 0].sum(), pooled[0].sum()))


def _ratio(numerator: Counts, denominator: Counts) -> Values:
    numerator, denominator = np.asarray(numerator, float), np.asarray(denominator, float)
    values: Values = np.full(np.broadcast(numerator, denominator).shape, np.nan)
    np.divide(numerator, denominator, out=values, where=denominator != 0)
    return values


def _mean(values: Values) -> float | None:
    """Returns the mean of the defined values, None when there is none."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else None


@dataclass(frozen=True)
class ReferenceMetric:
    """A metric of the reference implementation as a quotient of sums.

    Calling it gives (sum, count) of a batch, () float64 each; add them over batches and replicas.

    Attributes:
        sums: (y, p, weights) -> numerator and denominator of each image, (B,). y and p are
            (B, H, W, C), one-hot label and probability; weights (B, H, W, 1).
        smooth: added to numerator and denominator of the quotient of the whole split.
        ignore_id: label of pixels that count nowhere.
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
        """Returns the metric of everything that was added up; 0 when nothing was."""
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
}
"""The reference implementation's metrics, by name; sums run over pixels and channels, y is the
one-hot label, p the probability:

dice_coef_multiclass  mean over images of (2 sum(y p) + 1) / (sum(y) + sum(p) + 1) of that image.
                      With softmax this is nearly the mean probability of the true class: a soft
                      pixel accuracy, high for an all-background prediction
dice_coef             (2 sum(y p) + 1) / (sum(y) + sum(p) + 1)
iou_coef              sum(y p) / (sum(y) + sum(p) - sum(y p))
sensitivity           sum(round(y p)) / sum(y)
specificity           sum(round((1 - y) (1 - p))) / sum(1 - y)

Exact over the whole split: the reference computes all but the first per batch and averages the
batches. With two classes its sensitivity and specificity are one number, since each class is the
complement of the other.
"""


def reference_metrics(
    names: Iterable[str], *, ignore_id: int | None = None
) -> dict[str, ReferenceMetric]:
    """Returns the metrics of these names, with pixels of label `ignore_id` left out.

    Raises:
        UsageError: a name is unknown.
    """
    metrics = {}
    for name in names:
        if name not in REFERENCE_METRICS:
            known = suggestion(name, list(REFERENCE_METRICS))
            raise UsageError(f"metrics={name!r}: unknown metric; {known}")
        metric = REFERENCE_METRICS[name]
        metrics[name] = ReferenceMetric(metric.sums, metric.smooth, ignore_id)
    return metrics


class RunningSums:
    """Adds (sum, count) pairs by name in float64, over the batches of an epoch.

    Its state is a JSON dict, so that an epoch can be continued with the same bits.
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
        """Continues from what `state` returned."""
        loaded = {}
        for name, pair in state.items():
            total, count = pair
            loaded[name] = (float(total), float(count))
        self._pairs = loaded
