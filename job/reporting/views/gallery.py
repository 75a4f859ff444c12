"""Collects the example cases of an evaluation, sorted by the number of the headline.

That number is the foreground Dice, a mean over classes. So a case counts by its mean Dice: the mean
over the foreground classes that are in its truth or prediction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.masks.color_map import NO_CLASS_COLOR
from flexunet.json_files import read_table
from flexunet.storage import ObjectStore
from job.reporting.views.parts import (
    Figure,
    Rgb,
    cell_value,
    read_bytes,
    small_figure,
)
from job.runs.layout import evaluate_again

_PANEL_SIDE = 1200  # pixels of image, truth and prediction side by side
_OVERLAY_SIDE = 560
_KINDS = (("best", "Best"), ("middle", "Median (files middle-*.png)"), ("worst", "Worst"))
_MOST_NAMED = 3  # classes in a caption


@dataclass(frozen=True)
class CaseFigures:
    """A case: image, truth and prediction side by side, and contours on the image.

    Attributes:
        caption: name of the file, mean Dice, rank.
        classes: the classes with the lowest Dice, in words; empty with one class.
        panel: None if the evaluation has no such file.
    """

    caption: str
    classes: str
    panel: Figure | None
    overlay: Figure | None


@dataclass(frozen=True)
class Gallery:
    """The example cases of an evaluation.

    Attributes:
        kinds: (title, cases) of the best, middle and worst cases.
        legend: (name, colour) of each class, with the background.
        is_chosen_otherwise: an earlier version chose the cases, by another Dice.
    """

    kinds: Sequence[tuple[str, Sequence[CaseFigures]]]
    legend: Sequence[tuple[str, Rgb]]
    is_chosen_otherwise: bool


@dataclass(frozen=True)
class _Score:
    """The mean Dice of a case, its rank among `num_ranked` cases from 1, and Dice by class."""

    dice: float | None
    rank: int
    num_ranked: int
    classes: Mapping[str, float]


def gallery_of(
    store: ObjectStore, colors: Mapping[str, Rgb], *, has_ignored: bool = False
) -> Gallery | None:
    """Returns the example cases of the newest evaluation, or None without examples.

    Args:
        colors: of classes by name.
        has_ignored: masks may have ignored pixels.
    """
    rows = read_table(store, "evaluation/examples.csv", evaluate_again(store))
    if not rows:
        return None
    scores = _scores(store)
    kinds = []
    for kind, title in _KINDS:
        chosen = [row for row in rows if row["picture"].startswith(f"{kind}-")]
        is_worst = kind == "worst"  # the worst first
        chosen.sort(key=lambda row: _order(scores, row) * (1 if is_worst else -1))
        kinds.append((title, [_case(store, row, scores.get(row["id"])) for row in chosen]))
    has_classes = len(colors) > 2
    return Gallery(
        kinds=[(title, cases) for title, cases in kinds if cases],
        legend=[*colors.items(), *([("ignored", NO_CLASS_COLOR)] if has_ignored else [])],
        is_chosen_otherwise=has_classes and "mean_dice" not in rows[0],
    )


def _order(scores: Mapping[str, _Score], row: Mapping[str, str]) -> float:
    score = scores.get(row["id"])
    return -1.0 if score is None or score.dice is None else score.dice


def _scores(store: ObjectStore) -> dict[str, _Score]:
    """Returns the mean Dice of each case by its id, from the table of all cases."""
    rows = read_table(store, "evaluation/per_case.csv", evaluate_again(store)) or []
    columns = [name for name in (rows[0] if rows else ()) if name.startswith("dice_")]
    names = [name.removeprefix("dice_") for name in columns[1:]]  # the first is the background
    classes = {
        row["id"]: {name: float(row[f"dice_{name}"]) for name in names if row[f"dice_{name}"]}
        for row in rows
    }
    means = {case: sum(each.values()) / len(each) for case, each in classes.items() if each}
    ranks = {case: n for n, case in enumerate(sorted(means, key=lambda each: -means[each]), 1)}
    return {
        case: _Score(means.get(case), ranks.get(case, 0), len(means), each)
        for case, each in classes.items()
    }


def _case(store: ObjectStore, row: Mapping[str, str], score: _Score | None) -> CaseFigures:
    caption = f"{row['filename']}: {_score_words(row, score)}"
    name = row["picture"]
    return CaseFigures(
        caption=caption,
        classes=_lowest_words(score.classes if score else {}),
        panel=_figure(
            read_bytes(store, f"evaluation/examples/{name}.png"),
            f"Image, truth and prediction of {caption}",
            _PANEL_SIDE,
        ),
        overlay=_figure(
            read_bytes(store, f"evaluation/overlays/{name}.png"),
            f"Contours of truth and prediction on the image of {row['filename']}",
            _OVERLAY_SIDE,
        ),
    )


def _figure(png: bytes | None, words: str, side: int) -> Figure | None:
    return None if png is None else small_figure(png, words, side)


def _score_words(row: Mapping[str, Any], score: _Score | None) -> str:
    if score is None:
        dice = cell_value(row["foreground_dice"])
        return "no foreground" if dice is None else f"image Dice {dice:.3f}"
    if score.dice is None:
        return "no foreground"
    name = "mean Dice" if len(score.classes) > 1 else "Dice"
    return f"{name} {score.dice:.3f}, {score.rank} of {score.num_ranked}"


def _lowest_words(classes: Mapping[str, float]) -> str:
    if len(classes) < 2:
        return ""
    lowest = sorted(classes.items(), key=lambda each: each[1])[:_MOST_NAMED]
    return "Lowest: " + ", ".join(f"{name} {dice:.3f}" for name, dice in lowest) + "."
