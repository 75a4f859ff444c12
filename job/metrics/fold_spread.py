"""Summarizes the measures of the folds of a cross-validation: their mean and standard deviation.

The deviation is that of a sample (n - 1). It shows how much folds differ. The interval over groups
of the pooled cases shows how certain the pooled value is.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Returns mean and standard deviation of the folds that have a value.

    The mean is None without any, the deviation with fewer than two.
    """
    found = [value for value in values if value is not None]
    return {
        "mean": statistics.fmean(found) if found else None,
        "sd": statistics.stdev(found) if len(found) > 1 else None,
        "num_folds": len(found),
    }


def spread_of_folds(folds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the `spread` of each measure of `summarize_cases`, one result per fold.

    A measure in mm or pixels may be missing in some folds.
    """
    num_classes = len(folds[0]["classes"])
    return {
        "foreground": _of_measures([fold["foreground"] for fold in folds]),
        "classes": [
            {
                "id": folds[0]["classes"][index]["id"],
                "name": folds[0]["classes"][index]["name"],
                **_of_measures([fold["classes"][index] for fold in folds]),
            }
            for index in range(num_classes)
        ],
    }


def _of_measures(folds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = dict.fromkeys(
        name for fold in folds for name, value in fold.items() if isinstance(value, Mapping)
    )
    return {
        name: spread([fold[name]["value"] if name in fold else None for fold in folds])
        for name in names
    }
