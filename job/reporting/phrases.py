"""Says in words what a summary of an evaluation holds: for the report and the terminal alike."""

from collections.abc import Mapping
from typing import Any, TypeVar

from flexunet.text import pluralize
from job.data.folds import split_words
from job.metrics.per_case import TRUTHS

T = TypeVar("T")


def summarized_words(summary: Mapping[str, Any]) -> str:
    """Returns which cases a summary is of."""
    # An earlier version did not write the fold.
    return split_words(summary["split"], summary.get("fold"))


def counted_cases(summary: Mapping[str, Any]) -> str:
    """Returns how many cases the mean foreground Dice is over: those with a class in a mask."""
    total = summary["num_cases"]
    counts = {total - each["num_empty"] for each in summary["classes"][1:]}
    if counts == {total}:
        return pluralize(total, "case")
    number = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
    return f"{number} of {pluralize(total, 'case')}"


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
        f"alarms of {alarms} of {pluralize(summary['num_cases'], 'case')}."
    )


def measure_rows(size: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Returns (label, measure) of what `summarize_cases` returned, for tables that people read.

    With one foreground class the mean over classes is that class, and is left out.
    """
    shared = size["foreground"] if len(size["classes"]) > 1 else {}
    rows = [(f"foreground {name}", each) for name, each in shared.items()]
    for each in size["classes"]:
        rows += [
            (f"{each['name']} {name}", value)
            for name, value in each.items()
            if isinstance(value, dict)
        ]
    return rows


def titled_sizes(sizes: Mapping[str, T]) -> list[tuple[str, T]]:
    """Returns (title, measures) of every size that is measured; equal ones are one.

    Pictures that were not resized, or are tiles put together, have the same measures at both.
    """
    if len(sizes) == 2 and sizes["network"] == sizes["original"]:
        return [("original size, which is the network's", sizes["original"])]
    return [(f"{size} size", each) for size, each in sizes.items()]


def size_notes(title: str, size: Mapping[str, Any]) -> list[str]:
    """Returns what a reader must know of the measures at one of `titled_sizes`."""
    notes = []
    if title == "original size":
        notes.append(
            f"Truth at this size: {TRUTHS['original']}, and not the source's; what was lost when "
            "it was stored does not count as missed."
        )
    if title == "network size" and any("hd95_px" in each for each in size["classes"]):
        notes.append(
            "Distances in pixels of this size take the stored pixels as square, which they are not "
            "where pictures of another aspect were stretched (--geometry stretch)."
        )
    return notes


def lesion_words(size: Mapping[str, Any]) -> str:
    """Returns what counts as a lesion found in what `summarize_cases` returned, for readers."""
    rule = size["lesion_rule"]
    return (
        "A lesion is a connected region of the truth. It is found when a predicted region overlaps "
        f"it with an IoU of at least {rule['min_iou']:g}, one region for one lesion; all other "
        f"predicted regions are false positives. True regions of fewer than {rule['min_pixels']} "
        "pixels of the network's size are specks: they are no lesions, and what finds one is no "
        "false positive."
    )


def checkpoint_words(used: Mapping[str, Any]) -> str:
    """Returns which weights were evaluated: those of one run, or of several together."""
    epochs = " and ".join(pluralize(each, "epoch") for each in used["epochs"])
    noun = "checkpoint" if len(used["epochs"]) == 1 else "checkpoints"
    return f"the {used['which']} {noun}, after {epochs}"
