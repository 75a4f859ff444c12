"""Computes bootstrap intervals over groups (patients) of cases.

Cases of one patient are similar, so whole groups are drawn, with replacement. Every measure here is
a quotient of two sums over cases: the denominator of a mean is the number of cases, that of pooled
Dice the pixels of both masks. Source of the percentile interval: Efron and Tibshirani 1993, An
Introduction to the Bootstrap, chapter 13.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]

LEVEL = 0.95
NUM_DRAWS = 2000
SEED = 0
MIN_GROUPS = 5  # fewer groups may agree by chance, and a chance value would look certain

_MAX_WEIGHTS = 2**22  # of one block of draws: 32 MB


def ratio(numerators: Values, denominators: Values) -> float | None:
    """Returns sum(numerators) / sum(denominators), or None if the denominators are 0.

    Args:
        numerators, denominators: (N,), one per case, or (N, K) for the mean of the K quotients
            that are defined.
    """
    value = _ratios(numerators.sum(axis=0)[None], denominators.sum(axis=0)[None])[0]
    return None if np.isnan(value) else float(value)


def interval(
    numerators: Values,
    denominators: Values,
    groups: Sequence[str],
    *,
    seed: int = SEED,
    num_draws: int = NUM_DRAWS,
    level: float = LEVEL,
) -> tuple[float, float] | None:
    """Returns the bootstrap interval of `ratio` over groups drawn with replacement.

    Draws whose denominator is 0 have no value and are left out. Returns None if fewer than
    `MIN_GROUPS` groups contribute: too few for an interval.

    Args:
        groups: (N,) the group of each case.
    """
    if num_contributing(denominators, groups) < MIN_GROUPS:
        return None
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    numerator, denominator = _per_group(numerators, index), _per_group(denominators, index)
    random = np.random.default_rng(seed)
    values = []
    block = max(1, _MAX_WEIGHTS // len(names))
    for start in range(0, num_draws, block):
        size = min(block, num_draws - start)
        weights = random.multinomial(len(names), np.full(len(names), 1 / len(names)), size)
        values.append(_ratios(weights @ numerator, weights @ denominator))
    tail = (1 - level) / 2
    low, high = np.nanquantile(np.concatenate(values), [tail, 1 - tail])
    return float(low), float(high)


def num_contributing(denominators: Values, groups: Sequence[str]) -> int:
    """Returns how many groups have a denominator above 0 in any of the quotients."""
    has_value = denominators.reshape(len(denominators), -1).any(axis=1)
    return len(set(np.asarray(groups)[has_value].tolist()))


def _per_group(values: Values, index: npt.NDArray[np.int64]) -> Values:
    sums = np.zeros((int(index.max()) + 1, *values.shape[1:]))
    np.add.at(sums, index, values)
    return sums


def _ratios(numerator: Values, denominator: Values) -> Values:
    """Returns the quotients (D,) of (D,), or of (D, K) averaged over those that are defined."""
    quotients = np.full(numerator.shape, np.nan)
    np.divide(numerator, denominator, out=quotients, where=denominator != 0)
    if quotients.ndim == 1:
        return quotients
    defined = ~np.isnan(quotients)
    means = np.full(len(quotients), np.nan)
    total = np.where(defined, quotients, 0).sum(axis=1)
    np.divide(total, defined.sum(axis=1), out=means, where=defined.any(axis=1))
    return means
