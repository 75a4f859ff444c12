"""Computes bootstrap intervals over groups (patients) of cases.

Cases of one patient are similar, so whole groups are drawn, with replacement. Every measure here is
a quotient of two sums over cases: the denominator of a mean is the number of cases, that of pooled
Dice the pixels of both masks. Source of the percentile interval: Efron and Tibshirani 1993, An
Introduction to the Bootstrap, chapter 13.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
Pair = tuple[Values, Values]  # numerators and denominators of a measure, one per case
Groups = Sequence[str] | npt.NDArray[np.int64]  # (N,) the group of each case, a name or a number

LEVEL = 0.95
NUM_DRAWS = 2000
SEED = 0
MIN_GROUPS = 5  # fewer groups may agree by chance, and a chance value would look certain

# Weights of one block of draws. Of larger products the linear algebra library shares the work among
# threads, which takes a hundred times as long if other processes use the processor cores.
_MAX_WEIGHTS = 9000


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
    groups: Groups,
    *,
    seed: int = SEED,
    num_draws: int = NUM_DRAWS,
    level: float = LEVEL,
) -> tuple[float, float] | None:
    """Returns the interval of one measure, see `intervals`."""
    pairs = [(numerators, denominators)]
    return intervals(pairs, groups, seed=seed, num_draws=num_draws, level=level)[0]


def intervals(
    pairs: Sequence[Pair],
    groups: Groups,
    *,
    seed: int = SEED,
    num_draws: int = NUM_DRAWS,
    level: float = LEVEL,
) -> list[tuple[float, float] | None]:
    """Returns the bootstrap interval of the `ratio` of each measure, over groups drawn at random.

    Groups are drawn with replacement, and all measures use the same draws. Draws whose denominator
    is 0 have no value and are left out. A measure has no interval (None) if fewer than `MIN_GROUPS`
    groups contribute: too few for an interval.

    Args:
        pairs: arguments of `ratio`, for each measure.
    """
    found: list[tuple[float, float] | None] = [None] * len(pairs)
    chosen = [
        index
        for index, (_, denominators) in enumerate(pairs)
        if num_contributing(denominators, groups) >= MIN_GROUPS
    ]
    if not chosen:
        return found
    group = np.unique(np.asarray(groups), return_inverse=True)[1]
    columns = [
        np.asarray(np.bincount(group, weights=column), float)
        for index in chosen
        for values in pairs[index]
        for column in values.reshape(len(values), -1).T
    ]
    sums = _draw_sums(columns, num_draws, seed)
    tail = (1 - level) / 2
    for index in chosen:
        shape = num_draws, *pairs[index][0].shape[1:]
        numerator, denominator = (
            np.stack([next(sums) for _ in values.reshape(len(values), -1).T], axis=1).reshape(shape)
            for values in pairs[index]
        )
        low, high = np.nanquantile(_ratios(numerator, denominator), [tail, 1 - tail])
        found[index] = float(low), float(high)
    return found


def difference_interval(
    first: Pair,
    second: Pair,
    groups: Groups,
    *,
    seed: int = SEED,
    num_draws: int = NUM_DRAWS,
    level: float = LEVEL,
) -> tuple[float, float] | None:
    """Returns the interval of one difference, see `difference_intervals`."""
    pairs = [(first, second)]
    return difference_intervals(pairs, groups, seed=seed, num_draws=num_draws, level=level)[0]


def difference_intervals(
    pairs: Sequence[tuple[Pair, Pair]],
    groups: Groups,
    *,
    seed: int = SEED,
    num_draws: int = NUM_DRAWS,
    level: float = LEVEL,
) -> list[tuple[float, float] | None]:
    """Returns the bootstrap interval of the `ratio` of the first minus that of the second.

    Both are of the same cases, and all use the same draws; None if fewer than `MIN_GROUPS` groups
    contribute to one of the two.

    Args:
        pairs: (first, second) for each measure.
    """
    found: list[tuple[float, float] | None] = [None] * len(pairs)
    chosen = [
        index
        for index, both in enumerate(pairs)
        if min(num_contributing(each[1], groups) for each in both) >= MIN_GROUPS
    ]
    if not chosen:
        return found
    group = np.unique(np.asarray(groups), return_inverse=True)[1]
    parts = [
        values.reshape(len(values), -1)
        for index in chosen
        for pair in pairs[index]
        for values in pair
    ]
    columns = [
        np.asarray(np.bincount(group, weights=column), float) for part in parts for column in part.T
    ]
    sums = _draw_sums(columns, num_draws, seed)
    tail = (1 - level) / 2
    for number, index in enumerate(chosen):
        drawn = [
            np.stack([next(sums) for _ in part.T], axis=1)
            for part in parts[4 * number : 4 * number + 4]
        ]
        values = _ratios(drawn[0], drawn[1]) - _ratios(drawn[2], drawn[3])
        low, high = np.nanquantile(values, [tail, 1 - tail])
        found[index] = float(low), float(high)
    return found


def num_contributing(denominators: Values, groups: Groups) -> int:
    """Returns how many groups have a denominator above 0 in any of the quotients."""
    return len(_contributing(denominators, groups))


def num_in_both(first: Pair, second: Pair, groups: Groups) -> int:
    """Returns how many groups contribute to both, see `num_contributing`."""
    found = (_contributing(denominators, groups) for _, denominators in (first, second))
    return len(set.intersection(*map(set, found)))


def _contributing(denominators: Values, groups: Groups) -> npt.NDArray[Any]:
    has_value = denominators.reshape(len(denominators), -1).any(axis=1)
    return np.unique(np.asarray(groups)[has_value])


def _draw_sums(columns: Sequence[Values], num_draws: int, seed: int) -> Iterator[Values]:
    """Returns the sum (draws,) of the drawn groups for each column, (groups,).

    All columns use the same draws, with replacement.
    """
    random = np.random.default_rng(seed)
    number = len(columns[0])
    sums = np.empty((len(columns), num_draws))
    # Rows of a product in blocks of four have the same bits, whatever the number of blocks.
    block = max(4, _MAX_WEIGHTS // number // 4 * 4)
    for start in range(0, num_draws, block):
        size = min(block, num_draws - start)
        weights = random.multinomial(number, np.full(number, 1 / number), size).astype(float)
        for column, row in zip(columns, sums, strict=True):
            np.matmul(weights, column, out=row[start : start + size])
    return iter(sums)


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
