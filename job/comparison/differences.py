"""Computes paired differences of measures between two runs on the same cases, with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

from job.metrics.bootstrap import MIN_GROUPS, difference_intervals, num_in_both, ratio
from job.metrics.per_case import CaseMetrics, measure_pairs
from job.reporting.phrases import ALL_CLASSES, is_share, measure_label

FOREGROUND = "foreground"  # the mean over all foreground classes


@dataclass(frozen=True)
class Difference:
    """A measure of a run, minus that of the first run.

    Attributes:
        owner: a class, or "foreground" for the mean over them.
        measure: its name in summary.json.
        first, value: of the first run and of this run.
        difference: `value` - `first`; None if one of them is not defined.
        low, high: 95 % bootstrap interval of the difference; None with fewer than 5 groups.
        num_groups: groups that have the measure in both runs.
        is_mean: whether the owner is the mean: a class can have the name "foreground".
    """

    owner: str
    measure: str
    first: float | None
    value: float | None
    difference: float | None
    low: float | None
    high: float | None
    num_groups: int
    is_mean: bool = False

    @property
    def label(self) -> str:
        """The owner, as people see it."""
        return ALL_CLASSES if self.is_mean else self.owner

    @property
    def key(self) -> tuple[bool, str]:
        """Different for each owner."""
        return self.is_mean, self.owner

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
        num_groups = num_in_both(ours, theirs, groups)
        low, high = (num_groups >= MIN_GROUPS and interval) or (None, None)
        differences.append(
            Difference(
                owner=owners[index],
                measure=measure,
                first=before,
                value=value,
                difference=None if value is None or before is None else value - before,
                low=low,
                high=high,
                num_groups=num_groups,
                is_mean=index == 0,
            )
        )
    return differences
