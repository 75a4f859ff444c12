"""Says in words what a summary of an evaluation holds: for the report and the terminal alike."""

from collections.abc import Mapping
from typing import Any

from flexunet.text import counted
from job.data.folds import split_words


def summarized_words(summary: Mapping[str, Any]) -> str:
    """Returns which cases a summary is of."""
    # An earlier version did not write the fold.
    return split_words(summary["split"], summary.get("fold"))


def counted_cases(summary: Mapping[str, Any]) -> str:
    """Returns how many cases the mean foreground Dice is over: those with a class in a mask."""
    total = summary["num_cases"]
    counts = {total - each["num_empty"] for each in summary["classes"][1:]}
    if counts == {total}:
        return counted(total, "case")
    number = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
    return f"{number} of {counted(total, 'case')}"


def has_foreground(summary: Mapping[str, Any]) -> bool:
    """Returns whether a case of a summary has a foreground class in its truth."""
    return summary["all_background"]["foreground_mean"]["dice"] is not None


def no_foreground_words(summary: Mapping[str, Any]) -> str:
    """Returns what can be said of cases without any foreground."""
    alarms = ", ".join(
        f"{each['name']} in {each['num_false_alarms']}" for each in summary["classes"][1:]
    )
    return (
        f"No case of {summarized_words(summary)} has foreground, so none can be found: false "
        f"alarms of {alarms} of {counted(summary['num_cases'], 'case')}."
    )
