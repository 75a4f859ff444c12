"""Intervals of means over cases whose groups (patients) are drawn again.

Cases of one patient are alike, so whole groups are drawn, with replacement. Every measure here is
a quotient of two sums over cases: a mean has the number of cases below, pooled Dice the pixels of
both masks. Source of the percentile interval: Efron and Tibshirani 1993, An Introduction to the
Bootstrap, chapter 13.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]

LEVEL = 0.95
NUM_DRAWS = 2000
SEED = 0
MIN_GROUPS = 5  # with fewer, what they happen to agree in looks certain

_MAX_WEIGHTS = 2**22  # of one block of draws: 32 MB


def ratio(numerators: Values, denominators: Values) -> float | None:
    """Returns sum(numerators) / sum(denominators), None where nothing is below.

    Args:
        numerators, denominators: (N,) of each case, or (N, K): then the mean of the K quotients
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
    """Returns the interval of `ratio` when groups are drawn with replacement.

    Draws in which nothing is below have no value and are left out. None where fewer than
    `MIN_GROUPS` groups contribute, because little can be said then.

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
    """Returns how many groups have something below, in any of the quotients."""
    has_value = denominators.reshape(len(denominators), -1).any(axis=1)
    return len(set(np.asarray(groups)[has_value].tolist()))


def _per_group(values: Values, index: npt.NDArray[np.int64]) -> Values:
    sums = np.zeros((int(index.max()) + 1, *values.shape[1:]))
    np.add.at(sums, index, values)
    return sums


def _ratios(numerator: Values, denominator: Values) -> Values:
    """Returns the quotients of (D,) or (D, K), the latter averaged where they are defined: (D,)."""
    quotients = np.full(numerator.shape, np.nan)
    np.divide(numerator, denominator, out=quotients, where=denominator != 0)
    if quotients.ndim == 1:
        return quotients
    defined = ~np.isnan(quotients)
    means = np.full(len(quotients), np.nan)
    total = np.where(defined, quotients, 0).sum(axis=1)
    np.divide(total, defined.sum(axis=1), out=means, where=defined.any(axis=1))
    return means
