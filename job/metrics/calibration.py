"""Measures calibration: whether what is predicted with probability p is right in a share p.

The expected calibration error (ECE) sorts pixels by their probability into bins of equal width and
takes the mean, weighted by pixels, of the difference between the mean probability of a bin and the
share of its pixels that are right. Pixels of all cases count together.

    of a class       the probability of the class; right: the pixel has the class
    of the top class the probability of the most probable class; right: the pixel has that class

Sources: Naeini et al. 2015, Obtaining Well Calibrated Probabilities Using Bayesian Binning; 15 bins
of the top class as Guo et al. 2017, arXiv:1706.04599; by class, Kull et al. 2019, arXiv:1910.12656.
Pure functions on numpy arrays.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from job.metrics.confusion import Counts
from job.metrics.per_case import Ids, Values, quotient

NUM_BINS = 15
TOP = "top class"


@dataclass(frozen=True)
class Bins:
    """The pixels of one case, or of several, by probability: (owners, bins) each.

    The owners are the classes but 0, then the top class. Bin i has probabilities from i / 15 up to,
    but without, (i + 1) / 15; the last bin includes 1.

    Attributes:
        pixels: int64.
        right: int64, those of them that are right.
        probability: float64, the sum of the probabilities.
    """

    pixels: Counts
    right: Counts
    probability: Values

    def plus(self, other: "Bins") -> "Bins":
        """Returns the sum of both; add cases in one order, always, for the same bits."""
        return Bins(
            self.pixels + other.pixels,
            self.right + other.right,
            self.probability + other.probability,
        )

    def errors(self) -> list[float | None]:
        """Returns the expected calibration error of each owner; None without pixels."""
        gaps = np.abs(self.right - self.probability).sum(axis=1)
        return [
            quotient(gap, total) for gap, total in zip(gaps, self.pixels.sum(axis=1), strict=True)
        ]


def bin_case(
    truth: Ids, probabilities: npt.NDArray[np.float32], ignore_id: int | None = None
) -> Bins:
    """Returns the bins of one case.

    Args:
        truth: (H, W) class ids.
        probabilities: (H, W, K); K = 1 is a sigmoid output.
        ignore_id: pixels with this label are not counted.
    """
    labels, found = truth.reshape(-1), probabilities.reshape(-1, probabilities.shape[-1])
    if ignore_id is not None:
        is_counted = labels != ignore_id
        labels, found = labels[is_counted], found[is_counted]
    if found.shape[-1] == 1:
        top_ids = (found[:, 0] > 0.5).astype(np.uint8)
        columns = [found[:, 0], np.maximum(found[:, 0], 1 - found[:, 0])]
    else:
        top_ids, highest = _top_class(found)
        columns = [*found.T[1:], highest]
    rights = [*(labels == index + 1 for index in range(len(columns) - 1)), labels == top_ids]
    parts = [_bin(column, right) for column, right in zip(columns, rights, strict=True)]
    pixels, right, probability = (np.stack(each) for each in zip(*parts, strict=True))
    return Bins(pixels, right, probability)


def _top_class(found: npt.NDArray[np.float32]) -> tuple[Ids, npt.NDArray[np.float32]]:
    """Returns the most probable class (N,) of (N, K), and its probability.

    Class by class, because `argmax` over a short axis takes several times as long.
    """
    highest, ids = found[:, 0].copy(), np.zeros(len(found), np.uint8)
    for class_id in range(1, found.shape[1]):
        ids[found[:, class_id] > highest] = class_id
        np.maximum(highest, found[:, class_id], out=highest)
    return ids, highest


def _bin(
    column: npt.NDArray[np.float32], right: npt.NDArray[np.bool_]
) -> tuple[Counts, Counts, Values]:
    values = column.astype(np.float64)
    if np.isnan(values.sum()):  # the network has diverged
        values = np.nan_to_num(values, nan=0.0)
    index = np.minimum((values * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    both = np.bincount(2 * index + right, minlength=2 * NUM_BINS).reshape(NUM_BINS, 2)
    sums = np.bincount(index, weights=values, minlength=NUM_BINS)
    return both.sum(axis=1), both[:, 1], np.asarray(sums, np.float64)


class Calibration:
    """Sums the bins of cases, without and with a temperature."""

    COLUMNS = ("class", "temperature", "low", "high", "pixels", "mean_probability", "share_right")

    def __init__(self, names: Sequence[str], temperatures: Sequence[float]) -> None:
        """Starts without cases.

        Args:
            names: of the foreground classes.
            temperatures: of the bins of a case, in their order; the first is 1.
        """
        self._owners = [*names, TOP]
        self._temperatures = list(temperatures)
        zeros = np.zeros((len(self._owners), NUM_BINS), np.int64)
        self._totals = [Bins(zeros, zeros, zeros.astype(float)) for _ in temperatures]

    def add(self, case: Sequence[Bins]) -> None:
        """Adds the bins of a case at each temperature."""
        self._totals = [total.plus(each) for total, each in zip(self._totals, case, strict=True)]

    def summary(self) -> dict[str, Any]:
        """Returns the errors, JSON-ready; the values with a temperature are None without one."""
        errors = [total.errors() for total in self._totals]
        later = errors[1] if len(errors) > 1 else [None] * len(self._owners)
        found = [
            {"ece": before, "ece_with_temperature": after}
            for before, after in zip(errors[0], later, strict=True)
        ]
        classes = [
            {"id": index + 1, "name": name, **each}
            for index, (name, each) in enumerate(zip(self._owners[:-1], found, strict=False))
        ]
        return {
            "num_bins": NUM_BINS,
            "num_pixels": int(self._totals[0].pixels[-1].sum()),
            "temperature": self._temperatures[-1],
            "top_class": found[-1],
            "classes": classes,
        }

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """Yields a row of `COLUMNS` for each class, temperature and bin."""
        for owner, name in enumerate(self._owners):
            for temperature, total in zip(self._temperatures, self._totals, strict=True):
                for index in range(NUM_BINS):
                    pixels = int(total.pixels[owner, index])
                    yield (
                        name,
                        temperature,
                        index / NUM_BINS,
                        (index + 1) / NUM_BINS,
                        pixels,
                        quotient(total.probability[owner, index], pixels),
                        quotient(total.right[owner, index], pixels),
                    )
