"""Counts the pixels of all classes while the threshold of one class varies."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from job.metrics.confusion import Counts, Overlap
from job.metrics.thresholds import THRESHOLDS
from job.postprocessing.masks import (
    DEFAULT_THRESHOLD,
    Ids,
    class_weights,
    has_default_thresholds,
)

DEFAULT_INDEX = THRESHOLDS.index(DEFAULT_THRESHOLD)


@dataclass(frozen=True)
class ClassCounts:
    """The pixels of one case, (classes, thresholds) int64 each: of each class but 0."""

    tp: Counts
    fp: Counts
    fn: Counts

    def dice_terms(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Returns Dice and whether it is defined, (classes, thresholds) float64 each."""
        top, below = Overlap(self.tp, self.fp, self.fn).dice_terms()
        return top / np.maximum(below, 1), (below > 0).astype(float)


def count_at_thresholds(
    truth: Ids, probabilities: npt.NDArray[np.float32], thresholds: Sequence[float], class_id: int
) -> ClassCounts:
    """Counts the pixels of one case at each of `THRESHOLDS` of one class.

    The masks are those of `class_ids`.

    Args:
        truth: (H, W) class ids, without ignored pixels.
        probabilities: (H, W, K); K = 1 is a sigmoid output. 0 at ignored pixels.
        thresholds: of each class but 0; that of `class_id` is not used.
    """
    labels, found = truth.reshape(-1), probabilities.reshape(-1, probabilities.shape[-1])
    num_outputs = found.shape[-1]
    if num_outputs <= 2:
        wins, rival = _wins_of_two(found), np.zeros(labels.shape, np.uint8)
    else:
        wins, rival = _wins_of_many(found, thresholds, class_id)
    steps, num_classes = len(THRESHOLDS), max(num_outputs, 2)
    # A class that wins at a threshold wins at all lower ones: `wins` counts them.
    is_true = labels == class_id
    own = np.bincount(wins + (steps + 1) * is_true, minlength=2 * (steps + 1))
    own = _above(own.reshape(2, steps + 1))
    is_rival = labels == rival
    key = wins + (steps + 1) * (2 * rival.astype(np.int64) + is_rival)
    others = np.bincount(key, minlength=num_classes * 2 * (steps + 1))
    others = others.reshape(num_classes, 2, steps + 1)
    lost = others.sum(axis=2, keepdims=True) - _above(others)  # where the rival is predicted
    tp, predicted = lost[:, 1], lost.sum(axis=1)
    tp[class_id], predicted[class_id] = own[1], own.sum(axis=0)
    num_true = np.bincount(labels, minlength=num_classes)[:num_classes, np.newaxis]
    return ClassCounts(tp[1:], (predicted - tp)[1:], (num_true - tp)[1:])


def _above(histogram: Counts) -> Counts:
    """Returns how many pixels (..., steps) win at each threshold, from (..., steps + 1) wins."""
    return np.cumsum(histogram[..., ::-1], axis=-1)[..., ::-1][..., 1:]


def _wins_of_two(found: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Returns at how many thresholds each pixel (N,) is of class 1."""
    wins = np.zeros(len(found), np.int64)
    for threshold in THRESHOLDS:
        if threshold != DEFAULT_THRESHOLD:
            wins += found[:, -1] >= np.float32(threshold)
        elif found.shape[-1] == 1:
            wins += found[:, 0] > DEFAULT_THRESHOLD
        else:
            wins += found[:, 1] > found[:, 0]
    return wins


def _wins_of_many(
    found: npt.NDArray[np.float32], thresholds: Sequence[float], class_id: int
) -> tuple[npt.NDArray[np.int64], Ids]:
    """Returns at how many thresholds a pixel is of the class, and the best other class (N,)."""
    others = [*thresholds]
    others[class_id - 1] = DEFAULT_THRESHOLD
    weighted = found if has_default_thresholds(others) else found * class_weights(others)
    weighted = weighted.copy()
    weighted[:, class_id] = -1
    rival = np.argmax(weighted, axis=-1)
    highest = weighted[np.arange(len(found)), rival]
    wins = np.zeros(len(found), np.int64)
    is_before = class_id < rival  # the lower class wins a tie
    for weight in class_weights(THRESHOLDS)[1:]:
        product = found[:, class_id] * weight
        wins += (product > highest) | ((product == highest) & is_before)
    return wins, rival.astype(np.uint8)
