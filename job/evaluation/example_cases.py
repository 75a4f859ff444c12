"""Chooses the best, middle and worst cases of a split."""

import numpy as np

from job.metrics.confusion import dice

_NUM_EXAMPLES = 3  # of the best, the middle and the worst cases each


def example_cases(counts: np.ndarray) -> list[tuple[str, int, float | None]]:
    """Returns (name, case, image Dice) of the best, middle and worst cases, each case once.

    Image Dice is over the pixels of all foreground classes of one image. A case without foreground
    in truth and prediction has none, and is used only if no case has one.
    """
    tp, fp, fn = (counts[:, 1:, i].sum(axis=1) for i in range(3))
    values = dice(tp, fp, fn)
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
