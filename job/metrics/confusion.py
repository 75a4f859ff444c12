"""Computes scores from confusion counts, and the summary of a split; all tables use these scores.

Rules for empty masks, per case and class. Class absent from truth and prediction: Dice and IoU are
undefined (NaN), left out of means, and the case counts as empty. Absent from one of the two only:
Dice and IoU are 0. Sensitivity is undefined if the truth lacks the class, specificity if the class
covers the whole truth.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

Counts: TypeAlias = npt.NDArray[Any]
Values: TypeAlias = npt.NDArray[np.float64]


N = TypeVar("N", int, Counts)


@dataclass(frozen=True)
class Overlap(Generic[N]):
    """Pixels of a class: true positives, false positives, false negatives.

    Each is a number for one case, or (N,) for N cases.
    """

    tp: N
    fp: N
    fn: N

    def dice_terms(self) -> tuple[N, N]:
        """Returns numerator and denominator of Dice, both 0 if both masks are empty."""
        return 2 * self.tp, 2 * self.tp + self.fp + self.fn

    def iou_terms(self) -> tuple[N, N]:
        """Returns numerator and denominator of IoU, both 0 if both masks are empty."""
        return self.tp, self.tp + self.fp + self.fn

    def presence_counts(self) -> dict[str, int]:
        """Counts the cases by the masks that have the class, and the cases where it is missed.

        The first four add up to all cases. "missed": in the truth, and no pixel was found. It
        includes "truth_only" and predictions elsewhere.
        """
        # Arrays for one case too: `~` of Python's True is -2.
        is_true, is_predicted = np.asarray(self.tp + self.fn) > 0, np.asarray(self.tp + self.fp) > 0
        is_missed = is_true & (np.asarray(self.tp) == 0)
        return {
            "both": int(np.sum(is_true & is_predicted)),
            "neither": int(np.sum(~is_true & ~is_predicted)),
            "truth_only": int(np.sum(is_true & ~is_predicted)),
            "prediction_only": int(np.sum(~is_true & is_predicted)),
            "missed": int(np.sum(is_missed)),
        }

    def nothing_predicted(self) -> "Overlap[N]":
        """Returns the pixels of an empty prediction: every true pixel is a false negative."""
        return Overlap(0 * self.tp, 0 * self.fp, self.tp + self.fn)


def count_pixels(
    truth: npt.NDArray[np.uint8],
    prediction: npt.NDArray[np.uint8],
    num_classes: int,
    ignore_id: int | None = None,
) -> npt.NDArray[np.int64]:
    """Counts true positives, false positives, false negatives and true negatives of one case.

    Equals `job.metrics.batch.confusion_counts`, which counts a batch with TensorFlow.

    Args:
        truth, prediction: (H, W) class ids.
        num_classes: K. A network of one channel predicts two classes, so 1 means 2.
        ignore_id: pixels with this label are not counted.

    Returns:
        (K, 4) int64.
    """
    if ignore_id is not None:
        is_counted = truth != ignore_id
        truth, prediction = truth[is_counted], prediction[is_counted]
    counts = np.zeros((max(num_classes, 2), 4), np.int64)
    for class_id, row in enumerate(counts):
        is_true, is_predicted = truth == class_id, prediction == class_id
        tp = np.count_nonzero(is_true & is_predicted)
        fp, fn = np.count_nonzero(is_predicted) - tp, np.count_nonzero(is_true) - tp
        row[:] = tp, fp, fn, truth.size - tp - fp - fn
    return counts


def count_confusion(
    truth: npt.NDArray[np.uint8],
    prediction: npt.NDArray[np.uint8],
    num_classes: int,
    ignore_id: int | None = None,
) -> npt.NDArray[np.int64]:
    """Counts the pixels of each true class that were predicted as each class, in one case.

    Args:
        truth, prediction: (H, W) class ids.
        num_classes: K. A network of one channel predicts two classes, so 1 means 2.
        ignore_id: pixels with this label are not counted.

    Returns:
        (K, K) int64: truth, prediction.
    """
    side = max(num_classes, 2)
    is_counted = truth < side
    if ignore_id is not None:
        is_counted &= truth != ignore_id
    codes = truth[is_counted].astype(np.uint16) * side + prediction[is_counted]
    return np.bincount(codes, minlength=side * side).reshape(side, side)


class Confusion:
    """Sums the confusion of cases, and formats it as a table."""

    COLUMNS = ("truth", "predicted", "pixels")

    def __init__(self, names: Sequence[str]) -> None:
        """Takes the names of all classes, background included."""
        self._names = names
        self._pixels = np.zeros((len(names), len(names)), np.int64)

    def add(self, pixels: Counts) -> None:
        """Adds a case from `count_confusion`."""
        self._pixels += pixels

    def rows(self) -> list[tuple[str, str, int]]:
        """Returns a row of `COLUMNS` for each pair of classes."""
        return [
            (truth, predicted, int(self._pixels[row, column]))
            for row, truth in enumerate(self._names)
            for column, predicted in enumerate(self._names)
        ]


def dice(tp: Counts, fp: Counts, fn: Counts) -> Values:
    """Returns 2 tp / (2 tp + fp + fn), elementwise; NaN where truth and prediction are empty."""
    return _ratio(*Overlap(tp, fp, fn).dice_terms())


def iou(tp: Counts, fp: Counts, fn: Counts) -> Values:
    """Returns tp / (tp + fp + fn), elementwise; NaN where truth and prediction are empty."""
    return _ratio(*Overlap(tp, fp, fn).iou_terms())


def sensitivity(tp: Counts, fn: Counts) -> Values:
    """Returns tp / (tp + fn), elementwise; NaN where the truth is empty."""
    return _ratio(tp, tp + fn)


def specificity(tn: Counts, fp: Counts) -> Values:
    """Returns tn / (tn + fp), elementwise; NaN where the class covers the truth."""
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
    """Returns the counts (..., C, 4) of the predict-nothing baseline: class 0 everywhere."""
    tp, fp, fn, tn = np.moveaxis(np.asarray(counts), -1, 0)
    nothing = Overlap(tp, fp, fn).nothing_predicted()
    hits, alarms, missed = nothing.tp, nothing.fp, nothing.fn
    absent = fp + tn
    baseline = np.stack([hits, alarms, missed, absent], axis=-1)
    baseline[..., 0, :] = np.stack([missed, absent, hits, alarms], axis=-1)[..., 0, :]
    return baseline


def all_foreground(counts: Counts) -> Counts:
    """Returns the counts (..., C, 4) of each class if it alone were predicted on every pixel."""
    tp, fp, fn, tn = np.moveaxis(np.asarray(counts), -1, 0)
    return np.stack([tp + fn, fp + tn, 0 * fn, 0 * tn], axis=-1)


def summarize(cases: Counts) -> dict[str, Any]:
    """Returns the scores of a split, JSON-ready; an undefined value is None.

    `classes[c]` has the mean of each score over the cases where it is defined, the scores of the
    `pooled` counts, and the numbers of cases `num_empty` (class in neither mask; left out of the
    mean Dice and IoU), `num_missed` (in the truth, no pixel found) and `num_false_alarms` (in the
    prediction only). `foreground_mean` and `foreground_pooled` average over all classes but 0.
    `all_background` has the foreground means and the pixel accuracy of the predict-nothing
    baseline, `all_foreground` the scores of predicting a foreground class on every pixel: a useful
    model is better than both. The second is high if a class fills most of the images.

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
        "all_foreground": {"foreground_mean": _foreground(all_foreground(cases))},
        "classes": classes,
    }


def _summarize_class(cases: Counts, pooled: Counts, class_id: int) -> dict[str, Any]:
    tp, fp, fn, _ = np.moveaxis(cases, -1, 0)
    presences = Overlap(tp, fp, fn).presence_counts()
    everywhere = {name: _mean(values) for name, values in scores(all_foreground(cases)).items()}
    return {
        "id": class_id,
        **{name: _mean(values) for name, values in scores(cases).items()},
        "pooled": {name: _mean(value) for name, value in scores(pooled).items()},
        "num_empty": presences["neither"],
        "num_missed": presences["missed"],
        "num_false_alarms": presences["prediction_only"],
        **({"all_foreground": everywhere} if class_id > 0 else {}),
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
    """Returns the mean of the defined values, or None."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else None
