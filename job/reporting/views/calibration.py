"""Collects for the report what postprocessing an evaluation used, and how calibrated it is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flexunet.json_files import read_table
from flexunet.storage import ObjectStore
from job.postprocessing.masks import given_words
from job.reporting.phrases import measure_label
from job.reporting.views.line_plots import PAIR, Frame, LinePlot, PlotGroup, range_words
from job.reporting.views.parts import Rgb, Table
from job.runs.layout import evaluate_again

_PLOT_SIDE = 128  # pixels of a plot
_BAR_HEIGHT = 26  # of the histogram below it
_PLAIN = "without temperature"
_NOTE = (
    "ECE: expected calibration error, the mean over pixels of the difference between the predicted "
    "probability and the share of pixels that are right, in {num_bins} bins. On the dashed "
    "diagonal, probabilities are right; below it, they are too high. Bars: number of pixels in "
    "each bin, on a log scale. Top class: the most probable class of each pixel."
)


@dataclass(frozen=True)
class UsedPostprocessing:
    """The postprocessing of an evaluation.

    Attributes:
        cases: on which it was fitted, in words; None: it was given by options.
        given: the values of it that options replaced, in words; "": none.
        not_used: why a stored fit was not used; None: it was, or there is none.
        table: the values and, if they change masks, the Dice without them.
        dice, plain_dice: foreground Dice with and without it.
    """

    cases: tuple[int, str] | None
    given: str
    not_used: str | None
    temperature: float
    table: Table
    dice: float | None
    plain_dice: float | None


def postprocessing_of(summary: Mapping[str, Any] | None) -> UsedPostprocessing | None:
    """Returns the postprocessing of an evaluation, None if there was none."""
    used = ((summary or {}).get("prediction") or {}).get("postprocessing")
    if summary is None or not used:
        return None
    plain = summary.get("without_postprocessing")
    plain_classes = plain["classes"] if plain else [{}] * len(summary["classes"])
    dice = measure_label("dice_mean")
    rows = [
        (name, threshold, pixels, without.get("dice"), found["dice"])
        for name, threshold, pixels, without, found in zip(
            used["classes"],
            used["thresholds"],
            used["min_region"],
            plain_classes[1:],
            summary["classes"][1:],
            strict=True,
        )
    ]
    columns = ("class", "threshold", "smallest region, pixels", f"{dice}: without", f"{dice}: with")
    fitted_on = used["fitted_on"]
    return UsedPostprocessing(
        cases=(fitted_on["num_cases"], fitted_on["split"]) if fitted_on else None,
        given=given_words(used.get("given", ())),
        not_used=used["not_used"],
        temperature=used["temperature"],
        table=Table(columns, rows),
        dice=summary["foreground_mean"]["dice"],
        plain_dice=plain["foreground_mean"]["dice"] if plain else None,
    )


def calibration_of(
    store: ObjectStore, summary: Mapping[str, Any] | None, colors: Mapping[str, Rgb]
) -> PlotGroup | None:
    """Returns the calibration of the newest evaluation, None if it was not measured.

    Args:
        colors: of classes by name.
    """
    # Earlier versions did not measure it.
    found = (summary or {}).get("calibration")
    if not found:
        return None
    has_temperature = found["temperature"] != 1
    owners = [(each["name"], each) for each in found["classes"]]
    owners.append(("top class", found["top_class"]))
    columns = ["class", "ECE"]
    if has_temperature:
        columns = ["class", f"ECE {_PLAIN}", f"ECE with temperature {found['temperature']:.3g}"]
    rows = [
        (name, each["ece"], *([each["ece_with_temperature"]] if has_temperature else []))
        for name, each in owners
    ]
    bins = read_table(store, "evaluation/calibration.csv", evaluate_again(store)) or []
    plots = [
        _plot(name, [row for row in bins if row["class"] == name], colors.get(name))
        for name, _ in owners
    ]
    temperatures = list(dict.fromkeys(row["temperature"] for row in bins))
    return PlotGroup(
        title="Calibration, network size",
        notes=[_NOTE.format(num_bins=found["num_bins"])],
        legend=[
            (_PLAIN if index == 0 else f"temperature {float(each):.3g}", PAIR[index % 2])
            for index, each in enumerate(temperatures)
        ],
        plots=[each for each in plots if each.lines],
        table=Table(columns, rows, colors),
    )


def _plot(title: str, rows: Sequence[Mapping[str, str]], color: Rgb | None) -> LinePlot:
    labels = "predicted probability", "share that is right"
    frame = Frame(labels, _PLOT_SIDE, _PLOT_SIDE, (0.0, 1.0))
    temperatures = list(dict.fromkeys(row["temperature"] for row in rows))
    lines, words = [], [f"Reliability of {title}."]
    for index, temperature in enumerate(temperatures):
        points = [
            (float(row["mean_probability"]), float(row["share_right"]))
            for row in rows
            if row["temperature"] == temperature and row["mean_probability"]
        ]
        lines.append(frame.line(points, PAIR[index % 2], has_markers=True))
        name = _PLAIN if index == 0 else f"temperature {float(temperature):.3g}"
        words.append(range_words(f"Share that is right, {name}", points))
    last = [row for row in rows if temperatures and row["temperature"] == temperatures[-1]]
    plot = frame.plot(title, " ".join(words), lines, color)
    return replace(plot, has_diagonal=True, bars=_bars(last), bars_height=_BAR_HEIGHT)


def _bars(rows: Sequence[Mapping[str, str]]) -> list[tuple[float, float, float, float]]:
    most = math.log1p(max((int(row["pixels"]) for row in rows), default=0)) or 1.0
    bars = []
    for row in rows:
        height = math.log1p(int(row["pixels"])) / most * (_BAR_HEIGHT - 4)
        left, right = float(row["low"]) * _PLOT_SIDE, float(row["high"]) * _PLOT_SIDE
        bars.append((left + 1, _PLOT_SIDE + _BAR_HEIGHT - height, right - left - 2, height))
    return bars
