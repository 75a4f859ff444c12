"""Selects a value on validation cases, and keeps the default unless the gain is beyond noise.

Choosing the best of many values on a few cases finds a gain by chance. So the gain is measured on
groups that had no part in the choice: for each group, the value is chosen on all other groups and
measured on this one. The value that is best on all cases is used only if the 95 % bootstrap
interval of this gain, over groups, is above 0. With fewer than 5 groups there is no interval, and
the default stays. Of equally good values the default is chosen, else the nearest to it.

Pure functions on numpy arrays.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from job.metrics.bootstrap import MIN_GROUPS, Groups, difference_interval

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """The scores of candidate values on each case, (cases, classes, candidates) float64 each.

    The score of a candidate is the mean over classes of sum(numerators) / sum(denominators), over
    the classes that have one; higher is better.
    """

    numerators: Values
    denominators: Values

    def of_candidate(self, index: int) -> float | None:
        """Returns the score of one candidate over all cases; None if no case has one."""
        value = _scores(self.numerators.sum(axis=0), self.denominators.sum(axis=0))[index]
        return None if np.isnan(value) else float(value)


@dataclass(frozen=True)
class Selection:
    """The selected candidate, and the gain of choosing one.

    Attributes:
        index: of the candidate that is used: the best, or the default.
        best: of the candidate that is best on all cases.
        score_before, score: of the default and of the candidate that is used, on all cases.
        gain: of choosing, on groups that had no part in the choice; None without scores.
        low, high: 95 % interval of the gain over groups; None with fewer than 5 groups.
    """

    index: int
    best: int
    score_before: float | None
    score: float | None
    gain: float | None
    low: float | None
    high: float | None


def select(scores: Scores, groups: Groups, default: int) -> Selection:
    """Selects the best candidate, or the default unless the gain is beyond noise.

    Args:
        groups: (cases,) the group of each case.
        default: index of the default candidate.
    """
    top, below = scores.numerators, scores.denominators
    best = _best(_scores(top.sum(axis=0), below.sum(axis=0)), default)
    before = scores.of_candidate(default)
    group = np.unique(np.asarray(groups), return_inverse=True)[1]
    num_groups = int(group.max(initial=-1)) + 1
    if before is None or num_groups < MIN_GROUPS:
        return Selection(default, best, before, before, None, None, None)
    chosen = _best_without(top, below, group, default)[group]
    cases = np.arange(len(group))
    chosen_pair = top[cases, :, chosen], below[cases, :, chosen]
    default_pair = top[:, :, default], below[:, :, default]
    after, plain = (
        float(_scores(*(values.sum(axis=0)[:, np.newaxis] for values in pair))[0])
        for pair in (chosen_pair, default_pair)
    )
    found = difference_interval(chosen_pair, default_pair, group)
    low, high = found or (None, None)
    index = best if low is not None and low > 0 else default
    gain = None if np.isnan(after) else after - plain
    return Selection(index, best, before, scores.of_candidate(index), gain, low, high)


def _best_without(
    top: Values, below: Values, group: npt.NDArray[np.int64], default: int
) -> npt.NDArray[np.int64]:
    """Returns for each group the best candidate on all other groups."""
    sums = []
    for values in (top, below):
        of_group = np.zeros((int(group.max()) + 1, *values.shape[1:]))
        np.add.at(of_group, group, values)
        sums.append(values.sum(axis=0) - of_group)
    return np.array([_best(each, default) for each in _scores(sums[0], sums[1])], np.int64)


def _scores(numerators: Values, denominators: Values) -> Values:
    """Returns the scores (..., candidates) of sums (..., classes, candidates); NaN without any."""
    quotients = np.full(numerators.shape, np.nan)
    # A difference of sums that is 0 may have a rest in the last bits.
    np.divide(numerators, denominators, out=quotients, where=denominators > 1e-9)
    is_defined = ~np.isnan(quotients)
    total, count = np.where(is_defined, quotients, 0).sum(axis=-2), is_defined.sum(axis=-2)
    scores: Values = np.full(count.shape, np.nan)
    np.divide(total, count, out=scores, where=count != 0)
    return scores


def _best(scores: Values, default: int) -> int:
    """Returns the index of the highest score; of equal ones the nearest to `default`."""
    if np.isnan(scores).all():
        return default
    is_best = scores >= np.nanmax(scores) - 1e-12  # sums of other orders differ in the last bits
    candidates = np.flatnonzero(is_best)
    return int(candidates[np.argmin(np.abs(candidates - default))])


def concatenated(parts: Sequence[tuple[Values, Values]]) -> Scores:
    """Returns the scores of cases, from numerators and denominators (classes, candidates) each."""
    numerators, denominators = (np.stack(each) for each in zip(*parts, strict=True))
    return Scores(numerators, denominators)
