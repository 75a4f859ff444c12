"""Computes the scores of a class at several thresholds of its probability."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from job.metrics.confusion import Overlap
from job.metrics.lesions import count_lesions, without_small_regions
from job.metrics.per_case import Ids, quotient

THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))


class ThresholdSweep:
    """Sums the scores of classes over cases, at several thresholds of their probability."""

    COLUMNS = (
        "class",
        "threshold",
        "dice_mean",
        "dice_pooled",
        "lesion_sensitivity",
        "false_positives_per_image",
    )

    def __init__(self, names: Sequence[str], *, min_lesion: int = 1) -> None:
        """Sweeps the foreground classes of these names; `min_lesion` as in `tiny_regions_of`."""
        self._names = names
        self._min_lesion = min_lesion
        shape = len(names), len(THRESHOLDS)
        self._sums = {
            key: np.zeros(shape)
            for key in ("tp", "fp", "fn", "dice", "defined", "true", "found", "false", "images")
        }

    def add(self, truth: Ids, probabilities: npt.NDArray[np.float32]) -> None:
        """Adds a case.

        Args:
            truth: (H, W) class ids.
            probabilities: (H, W, K) of classes 0..K-1, or K = 1: of class 1.
        """
        first = 0 if probabilities.shape[-1] == 1 else 1
        for index in range(len(self._names)):
            self._add_class(index, truth == index + 1, probabilities[..., first + index])

    def _add_class(
        self, index: int, truth: npt.NDArray[np.bool_], probabilities: npt.NDArray[np.float32]
    ) -> None:
        tiny_regions = truth & ~without_small_regions(truth, self._min_lesion)
        for step, threshold in enumerate(THRESHOLDS):
            predicted = probabilities >= np.float32(threshold)
            tp = int(np.count_nonzero(truth & predicted))
            fp = int(np.count_nonzero(predicted)) - tp
            fn = int(np.count_nonzero(truth)) - tp
            lesions = count_lesions(truth, predicted, tiny_regions=tiny_regions)
            above, below = Overlap(tp, fp, fn).dice_terms()
            values = {
                "tp": tp,
                "fp": fp,
                "fn": fn,
                "dice": above / max(below, 1),
                "defined": below > 0,
                "true": lesions.num_true,
                "found": lesions.num_found,
                "false": lesions.num_false_positives,
                "images": 1,
            }
            for key, value in values.items():
                self._sums[key][index, step] += value

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
