"""Computes paired differences of measures between two runs on the same cases, with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

from job.metrics.bootstrap import difference_intervals, num_contributing, ratio
from job.metrics.per_case import CaseMetrics, measure_pairs
from job.reporting.phrases import is_share, measure_label

FOREGROUND = "foreground"  # the mean over all foreground classes


@dataclass(frozen=True)
class Difference:
    """A measure of a run, minus that of the first run.

    Attributes:
        owner: a class, or "foreground".
        measure: its name in summary.json.
        first, value: of the first run and of this run.
        difference: `value` - `first`; None if one of them is not defined.
        low, high: 95 % bootstrap interval of the difference; None with fewer than 5 groups.
        num_groups: groups that have the measure in both runs.
    """

    owner: str
    measure: str
    first: float | None
    value: float | None
    difference: float | None
    low: float | None
    high: float | None
    num_groups: int

    @property
    def verdict(self) -> str:
        """The word "better" or "worse"; empty if the interval has 0, or if there is none."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return ""
        is_higher = self.low > 0
        return "better" if is_higher == is_share(measure_label(self.measure)) else "worse"


def differences_of(
    first: Sequence[CaseMetrics],
    other: Sequence[CaseMetrics],
    groups: Sequence[str],
    names: Sequence[str],
) -> list[Difference]:
    """Returns the difference of each measure that both runs have; those of an owner are together.

    With one class the mean over classes is that class, and is left out.

    Args:
        first, other: the same cases in the same order.
        groups: of each case.
        names: of the foreground classes.
    """
    owners = [FOREGROUND, *names]
    found = [measure_pairs(cases, len(names)) for cases in (first, other)]
    keys = [
        (index, measure)
        for index in range(1 if len(names) == 1 else 0, len(owners))
        for measure in found[0][index]
        if measure in found[1][index]
    ]
    pairs = [(found[1][index][name], found[0][index][name]) for index, name in keys]
    intervals = difference_intervals(pairs, groups)
    differences = []
    for (index, measure), (ours, theirs), interval in zip(keys, pairs, intervals, strict=True):
        value, before = ratio(*ours), ratio(*theirs)
        low, high = interval or (None, None)
        differences.append(
            Difference(
                owner=owners[index],
                measure=measure,
                first=before,
                value=value,
                difference=None if value is None or before is None else value - before,
                low=low,
                high=high,
                num_groups=min(num_contributing(each[1], groups) for each in (ours, theirs)),
            )
        )
    return differences
