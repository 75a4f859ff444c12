"""Compares runs with the first of them: the result as an object and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from job.comparison.differences import Difference, differences_of
from job.comparison.options import different_options
from job.comparison.runs import ComparedRun, check_same_cases, read_runs, sizes_to_compare
from job.runs.status import read_outcome, run_status

FORMAT_VERSION = 1  # of the JSON


@dataclass(frozen=True)
class ComparedRuns:
    """A comparison of runs with the first of them, on the same cases.

    Attributes:
        split: the evaluated split.
        runs: the first one is the reference of all differences.
        notes: on what is not compared, and why.
        differences: by size, then by name of a run: all but the first.
        options: the values of each option that differs, one per run.
    """

    split: str
    runs: Sequence[ComparedRun]
    notes: Sequence[str]
    differences: Mapping[str, Mapping[str, Sequence[Difference]]]
    options: Mapping[str, Sequence[Any]]

    def as_json(self) -> dict[str, Any]:
        """Returns the comparison as plain values; `format_version` changes with their meaning."""
        first = self.runs[0]
        return {
            "format_version": FORMAT_VERSION,
            "split": self.split,
            "num_cases": len(first.groups),
            "num_groups": len(set(first.groups.values())),
            "runs": [{"name": run.name, "url": run.url, **_state(run)} for run in self.runs],
            "notes": list(self.notes),
            "sizes": {
                size: [_row(name, each) for name, found in of_runs.items() for each in found]
                for size, of_runs in self.differences.items()
            },
            "options": {name: list(values) for name, values in self.options.items()},
        }


def compare_runs(urls: Sequence[str], split: str = "test") -> ComparedRuns:
    """Compares runs with the first one.

    Args:
        urls: folders or gs:// URLs of runs or cross-validations, two or more.
        split: "test", "valid" or "train".

    Raises:
        UsageError: a run is not evaluated, or not on the same cases as the first one.
        ContentError: a file of a run is damaged.
        StorageError: storage is unavailable.
    """
    runs = read_runs(urls, split)
    check_same_cases(runs)
    sizes, notes = sizes_to_compare(runs)
    first, *others = runs
    groups = list(first.groups.values())
    return ComparedRuns(
        split=split,
        runs=runs,
        notes=notes,
        differences={
            size: {
                other.name: differences_of(
                    first.cases[size], other.cases[size], groups, first.classes
                )
                for other in others
            }
            for size in sizes
        },
        options=different_options(runs),
    )


def _state(run: ComparedRun) -> dict[str, Any]:
    """Returns status, epochs and best epoch of a run; of a cross-validation, None for each."""
    if run.summary is None:
        return {"status": None, "epochs": None, "best_epoch": None}
    outcome = read_outcome(run.store) or {}
    best = outcome.get("best")
    return {
        "status": run_status(run.store),
        "epochs": outcome.get("epochs"),
        "best_epoch": best["epoch"] + 1 if best else None,
    }


def _row(name: str, found: Difference) -> dict[str, Any]:
    return {
        "run": name,
        "class": found.owner,
        "measure": found.measure,
        "first": found.first,
        "value": found.value,
        "difference": found.difference,
        "low": found.low,
        "high": found.high,
        "num_groups": found.num_groups,
        "is_mean": found.is_mean,  # over the classes; a class can have its name, "foreground"
    }
