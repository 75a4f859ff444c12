"""Computes the scores of a class at several thresholds of its probability."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from job.metrics.confusion import Counts, Overlap
from job.metrics.lesions import TrueRegions, box_of, match_regions
from job.metrics.per_case import quotient

THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))

_LIMITS = np.array(THRESHOLDS, np.float32)
_MAX_PIXELS = 2**18  # of the masks of several thresholds that are labelled together


@dataclass(frozen=True)
class CaseSweep:
    """The counts of one case, (classes, thresholds) int64 each: of each foreground class.

    Attributes:
        tp, fp, fn: pixels.
        num_true, num_found, num_false_positives: lesions, as in `LesionCounts`.
    """

    tp: Counts
    fp: Counts
    fn: Counts
    num_true: Counts
    num_found: Counts
    num_false_positives: Counts


def sweep_case(regions: Sequence[TrueRegions], probabilities: npt.NDArray[np.float32]) -> CaseSweep:
    """Counts the pixels and lesions of one case at each of `THRESHOLDS`.

    Args:
        regions: of the truth, from `regions_of_classes`.
        probabilities: (H, W, K) of classes 0..K-1, or K = 1: of class 1.
    """
    first = 0 if probabilities.shape[-1] == 1 else 1
    counts = np.zeros((6, len(regions), len(THRESHOLDS)), np.int64)
    for index, each in enumerate(regions):
        of_class = np.ascontiguousarray(probabilities[..., first + index])
        counts[:, index] = _sweep_class(each, of_class)
    return CaseSweep(*counts)


def _sweep_class(regions: TrueRegions, probabilities: npt.NDArray[np.float32]) -> Counts:
    """Returns the values of `CaseSweep` of one class, in its order, (6, thresholds) int64."""
    tp, predicted, num_found, num_predicted = np.zeros((4, len(THRESHOLDS)), np.int64)
    start, box = 0, box_of(probabilities >= _LIMITS[0])
    while box is not None:
        height, width = probabilities[box].shape
        part = slice(start, start + max(1, _MAX_PIXELS // (height * width)))
        masks = probabilities[box] >= _LIMITS[part, np.newaxis, np.newaxis]
        predicted[part] = [np.count_nonzero(mask) for mask in masks]
        # The mask of a higher threshold is part of the mask of a lower one: masks with equally many
        # pixels are equal, and are labelled once.
        is_new = np.diff(predicted[part], prepend=-1) != 0
        index = np.cumsum(is_new) - 1
        origin = box[0].start, box[1].start
        distinct = masks if is_new.all() else masks[is_new]
        matches = match_regions(regions, distinct, origin=origin)
        tp[part] = matches.tp[index]
        num_found[part] = matches.num_found[index]
        num_predicted[part] = matches.num_predicted[index]
        start = part.stop
        box = box_of(probabilities >= _LIMITS[start]) if start < len(THRESHOLDS) else None
    num_pixels = len(regions.labels)
    num_true = np.full(len(THRESHOLDS), regions.num_lesions)
    false_positives = num_predicted - num_found
    return np.array([tp, predicted - tp, num_pixels - tp, num_true, num_found, false_positives])


class ThresholdSweep:
    """Sums the scores of classes over cases, at several thresholds of their probability.

    Add the cases in one order, always: the sums then have the same bits.
    """

    COLUMNS = (
        "class",
        "threshold",
        "dice_mean",
        "dice_pooled",
        "lesion_sensitivity",
        "false_positives_per_image",
    )

    def __init__(self, names: Sequence[str]) -> None:
        """Sums over the foreground classes of these names."""
        self._names = names
        shape = len(names), len(THRESHOLDS)
        self._sums = {
            key: np.zeros(shape)
            for key in ("tp", "fp", "fn", "dice", "defined", "true", "found", "false", "images")
        }

    def add(self, case: CaseSweep) -> None:
        """Adds a case from `sweep_case`."""
        above, below = Overlap(case.tp, case.fp, case.fn).dice_terms()
        values: dict[str, Counts | int] = {
            "tp": case.tp,
            "fp": case.fp,
            "fn": case.fn,
            "dice": above / np.maximum(below, 1),
            "defined": below > 0,
            "true": case.num_true,
            "found": case.num_found,
            "false": case.num_false_positives,
            "images": 1,
        }
        for key, value in values.items():
            self._sums[key] += value

    def rows(self) -> list[tuple[Any, ...]]:
        """Returns a row of `COLUMNS` for each class and threshold; undefined values are None."""
        s = self._sums
        columns = [
            (s["dice"], s["defined"]),
            Overlap(s["tp"], s["fp"], s["fn"]).dice_terms(),
            (s["found"], s["true"]),
            (s["false"], s["images"]),
        ]
        return [
            (
                name,
                threshold,
                *(quotient(above[c, t], below[c, t]) for above, below in columns),
            )
            for c, name in enumerate(self._names)
            for t, threshold in enumerate(THRESHOLDS)
        ]
