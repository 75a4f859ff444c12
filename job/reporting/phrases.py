"""Puts the summary of an evaluation into words, for the report and the terminal alike.

Owns the names of the measures that people see: one quantity has one name everywhere.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from flexunet.text import pluralize
from job.data.folds import split_words
from job.metrics.per_case import TOLERANCES, TRUTHS

T = TypeVar("T")

# What people see, by the name of the measure in summary.json and in the CSV files.
MEASURE_LABELS = {
    "dice": "Dice",
    "iou": "IoU",
    "dice_mean": "Dice, mean over images",
    "iou_mean": "IoU, mean over images",
    "dice_pooled": "Dice, pooled over pixels",
    "iou_pooled": "IoU, pooled over pixels",
    "lesion_sensitivity": "lesion sensitivity",
    "false_positives_per_image": "false positives per image",
    "hd95_mm": "HD95 in mm",
    "hd95_px": "HD95 in pixels",
    "nsd_mm": f"NSD within {TOLERANCES['mm']:g} mm",
    "nsd_px": f"NSD within {TOLERANCES['px']:g} pixels",
}
_LOWER_IS_BETTER = {MEASURE_LABELS[name]
                    for name in ("false_positives_per_image", "hd95_mm", "hd95_px")}  # fmt: skip
BASELINE = "predict-nothing baseline"
ALL_CLASSES = "all foreground classes"  # the mean over them, where it is beside classes
EVERYTHING = "predict-everything baseline"  # a class on every pixel, each class alone
ONE_SIZE = "original size (same as network size)"


def measure_label(name: str) -> str:
    """Returns what people see for the name of a measure, or the name if it has no other."""
    return MEASURE_LABELS.get(name, name)


def is_share(label: str) -> bool:
    """Returns whether a measure with this label is between 0 and 1, and better if it is higher.

    All others are better if they are lower.
    """
    return label not in _LOWER_IS_BETTER


def summarized_words(summary: Mapping[str, Any]) -> str:
    """Returns which cases are summarized."""
    # An earlier version did not write the fold.
    return split_words(summary["split"], summary.get("fold"))


def num_cases_words(summary: Mapping[str, Any]) -> str:
    """Returns how many images, or tiles, are summarized."""
    return pluralize(summary["num_cases"], _case_noun(summary))


def counted_cases(summary: Mapping[str, Any]) -> str:
    """Returns how many cases have a foreground Dice: those with a class in a mask."""
    total = summary["num_cases"]
    counts = {total - each["num_empty"] for each in summary["classes"][1:]}
    if counts == {total}:
        return num_cases_words(summary)
    number = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
    return f"{number} of {num_cases_words(summary)}"


def left_out_words(summary: Mapping[str, Any]) -> str | None:
    """Returns why `counted_cases` are fewer than all cases, or None if they are all."""
    counts = {each["num_empty"] for each in summary["classes"][1:]}
    if not any(counts):
        return None
    number = " to ".join(str(count) for count in sorted({min(counts), max(counts)}))
    return (
        f"{_case_noun(summary).capitalize()}s where neither the truth nor the prediction has the "
        f"class are not counted ({number} of {summary['num_cases']})."
    )


def _case_noun(summary: Mapping[str, Any]) -> str:
    return "tile" if summary.get("case") == "tile" else "image"


def has_foreground(summary: Mapping[str, Any]) -> bool:
    """Returns whether the truth of any summarized case has a foreground class."""
    return summary["all_background"]["foreground_mean"]["dice"] is not None


def everything_dice(summary: Mapping[str, Any]) -> float | None:
    """Returns the foreground Dice of predicting each class on every pixel."""
    baseline = summary.get("all_foreground")  # earlier versions did not write it
    dice: float | None = baseline["foreground_mean"]["dice"] if baseline else None
    return dice


def headline_words(summary: Mapping[str, Any]) -> str:
    """Returns split, cases, and the foreground Dice next to those of the two baselines."""
    words = f"{summary['split']}, {pluralize(summary['num_cases'], _case_noun(summary))}"
    if not has_foreground(summary):
        return f"{words}, no foreground"
    baselines = [f"predict-nothing {_dice_of(summary['all_background']):.3f}"]
    everything = everything_dice(summary)
    if everything is not None:
        baselines.append(f"predict-everything {everything:.3f}")
    return f"{words}, foreground Dice {_dice_of(summary):.3f} ({', '.join(baselines)})"


def _dice_of(values: Mapping[str, Any]) -> float:
    return float(values["foreground_mean"]["dice"])


def everything_rows(summary: Mapping[str, Any]) -> list[tuple[str, float | None, float | None]]:
    """Returns (class, its Dice, the Dice of predicting it on every pixel), means over images."""
    return [
        (each["name"], each["dice"], each["all_foreground"]["dice"])
        for each in summary["classes"][1:]
        if "all_foreground" in each  # earlier versions did not write it
    ]


def baseline_warnings(summary: Mapping[str, Any]) -> list[str]:
    """Returns a sentence for each class that is predicted no better than on every pixel."""
    return [
        f"{name}: Dice {dice:.4f} is not above the {EVERYTHING} ({everywhere:.4f})."
        for name, dice, everywhere in everything_rows(summary)
        if dice is not None and everywhere and dice <= everywhere
    ]


def no_foreground_words(summary: Mapping[str, Any]) -> str:
    """Returns the false alarms in cases that all have no foreground."""
    alarms = ", ".join(
        f"{each['name']} in {each['num_false_alarms']}" for each in summary["classes"][1:]
    )
    return (
        f"No {_case_noun(summary)} of {summarized_words(summary)} has foreground, so there is no "
        f"Dice to report. False alarms: {alarms} of {num_cases_words(summary)}."
    )


class MeasureRow(NamedTuple):
    """A row of a table of measures.

    Attributes:
        owner: the name of a class, or `ALL_CLASSES` for the mean over them.
    """

    owner: str
    label: str
    measure: dict[str, Any]


def measure_rows(size: Mapping[str, Any]) -> list[MeasureRow]:
    """Returns a row for each measure of `summarize_cases`; the rows of an owner are together.

    With one foreground class the mean over classes is that class, and is left out.
    """
    return [
        MeasureRow(owner, label, value)
        for owner, values in measure_owners(size)
        for label, value in values.items()
    ]


def measure_owners(size: Mapping[str, Any]) -> list[tuple[str, dict[str, dict[str, Any]]]]:
    """Returns (owner, its measures by label) as `measure_rows` does.

    The position tells the mean from the classes: a class can have any name.
    """
    owners = [(ALL_CLASSES, size["foreground"])] if len(size["classes"]) > 1 else []
    owners += [(each["name"], each) for each in size["classes"]]
    return [
        (owner, {measure_label(name): value for name, value in values.items()
                 if isinstance(value, dict)})
        for owner, values in owners
    ]  # fmt: skip


def titled_sizes(sizes: Mapping[str, T]) -> list[tuple[str, T]]:
    """Returns (title, measures) for each size; two sizes with equal measures become one.

    The measures are equal if images were not resized, or were put together from tiles.
    """
    if len(sizes) == 2 and sizes["network"] == sizes["original"]:
        return [(ONE_SIZE, sizes["original"])]
    return [(f"{size} size", each) for size, each in sizes.items()]


def size_notes(title: str, size: Mapping[str, Any]) -> list[str]:
    """Returns the limits of the measures at one of `titled_sizes`."""
    notes = []
    if title == "original size":
        notes.append(
            f"Truth at this size: {TRUTHS['original']}, not the source mask. Regions that were "
            "lost when the mask was stored do not count as missed."
        )
    if title == "network size" and any("hd95_px" in each for each in size["classes"]):
        notes.append(
            "Distances in pixels of this size assume square pixels. Stored pixels are not square "
            "if images of another aspect ratio were stretched (--geometry stretch)."
        )
    return notes


def lesion_words(size: Mapping[str, Any]) -> str:
    """Returns the rule by which `summarize_cases` counted lesions."""
    rule = size["lesion_rule"]
    return (
        "A lesion is a connected region of the truth mask. It is found if a predicted region "
        f"overlaps it with an IoU of at least {rule['min_iou']:g}; one region finds at most one "
        "lesion. "
        "All other predicted regions are false positives. True regions of fewer than "
        f"{rule['min_pixels']} pixels at network size are tiny regions: they are not lesions, and "
        "a predicted region that finds one is not a false positive."
    )


def checkpoint_words(used: Mapping[str, Any]) -> str:
    """Returns which weights were evaluated: those of one run, or of several together."""
    noun = "checkpoint" if len(used["epochs"]) == 1 else "checkpoints"
    if used["which"] == "best":  # stored at the end of an epoch, which is counted from 1
        word = "epoch" if len(used["epochs"]) == 1 else "epochs"
        return f"the best {noun} ({word} {' and '.join(map(str, used['epochs']))})"
    epochs = " and ".join(pluralize(each, "epoch") for each in used["epochs"])
    return f"the {used['which']} {noun}, after {epochs}"
