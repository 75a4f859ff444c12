"""Chooses the best, middle and worst cases of a split, by their mean Dice over classes."""

import numpy as np

from job.metrics.confusion import dice

_NUM_EXAMPLES = 3  # of the best, the middle and the worst cases each


def example_cases(counts: np.ndarray) -> list[tuple[str, int, float | None]]:
    """Returns (name, case, mean Dice) of the best, middle and worst cases, each case once.

    Mean Dice is the mean over the foreground classes that the truth or the prediction of one image
    has. A case without foreground in both has none, and is used only if no case has one.

    Args:
        counts: (cases, classes, 4) integer, from `confusion_counts`.
    """
    values = _mean_dice_of(counts)
    order = [int(i) for i in np.argsort(-values, kind="stable")]
    ranked = [i for i in order if not np.isnan(values[i])] or order
    middle = max(0, len(ranked) // 2 - _NUM_EXAMPLES // 2)
    groups = {
        "best": ranked[:_NUM_EXAMPLES],
        "worst": ranked[::-1][:_NUM_EXAMPLES],
        "middle": ranked[middle : middle + _NUM_EXAMPLES],
    }
    chosen: list[tuple[str, int, float | None]] = []
    for name, cases in groups.items():
        for rank, case in enumerate(cases, start=1):
            if case not in [index for _, index, _ in chosen]:
                score = None if np.isnan(values[case]) else float(values[case])
                chosen.append((f"{name}-{rank}", case, score))
    return chosen


def image_dice_of(counts: np.ndarray) -> list[float | None]:
    """Returns the Dice of each case over the pixels of all its foreground classes.

    Args:
        counts: as of `example_cases`.
    """
    tp, fp, fn = (counts[:, 1:, i].sum(axis=1) for i in range(3))
    return [None if np.isnan(value) else float(value) for value in dice(tp, fp, fn)]


def _mean_dice_of(counts: np.ndarray) -> np.ndarray:
    """Returns the mean Dice (cases,) over foreground classes; NaN without any."""
    values = dice(*(counts[:, 1:, i] for i in range(3)))
    defined = ~np.isnan(values)
    means = np.full(len(values), np.nan)
    total = np.where(defined, values, 0).sum(axis=1)
    return np.divide(total, defined.sum(axis=1), out=means, where=defined.any(axis=1))
