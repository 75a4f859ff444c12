"""Collects plots of the probabilities of an evaluation: thresholds and lesion detection (FROC)."""

from collections.abc import Callable, Mapping, Sequence

from flexunet.json_files import read_table
from flexunet.storage import ObjectStore
from job.reporting.phrases import MEASURE_LABELS, measure_label
from job.reporting.views.line_plots import (
    PAIR,
    Frame,
    LinePlot,
    PlotGroup,
    Point,
    range_of,
    range_words,
)
from job.reporting.views.parts import Rgb, Table, cell_value, name_once
from job.runs.layout import evaluate_again

_SIDE = 128  # pixels of a plot
_TEST_NOTE = (
    "Do not choose a threshold from these plots and report its score: these are the test images. "
    "Choose it on the validation split."
)
_OTHER_NOTE = "Thresholds chosen on these images give optimistic scores."
_FROC_NOTE = (
    "FROC: the lesion sensitivity over the false positives per image, a point for each threshold. "
    "Each class has its own horizontal axis."
)

Rows = Sequence[Mapping[str, str]]


def threshold_groups(store: ObjectStore, split: str, colors: Mapping[str, Rgb]) -> list[PlotGroup]:
    """Returns the plots over thresholds, and the FROC curves; empty if they were not measured.

    Args:
        split: the evaluated split.
        colors: of classes by name.
    """
    sweep = read_table(store, "evaluation/thresholds.csv", evaluate_again(store))
    if not sweep:
        return []
    classes: dict[str, list[Mapping[str, str]]] = {}
    for row in sweep:
        classes.setdefault(row["class"], []).append(row)
    return [
        PlotGroup(
            title="Probability thresholds, network size",
            notes=[_TEST_NOTE if split == "test" else _OTHER_NOTE],
            legend=[
                (MEASURE_LABELS[name], style)
                for name, style in zip(("dice_mean", "dice_pooled"), PAIR, strict=True)
            ],
            plots=_each(classes, _threshold_plot, colors),
            table=_table(sweep),
        ),
        PlotGroup("Lesions found, network size", [_FROC_NOTE], [],
                  _each(classes, _froc_plot, colors), None),
    ]  # fmt: skip


def _each(
    classes: Mapping[str, Rows],
    draw: Callable[[str, Rows, Rgb | None], LinePlot],
    colors: Mapping[str, Rgb],
) -> list[LinePlot]:
    return [draw(name, rows, colors.get(name)) for name, rows in classes.items()]


def _threshold_plot(name: str, rows: Rows, color: Rgb | None) -> LinePlot:
    frame = Frame(("threshold", "Dice"), _SIDE, _SIDE, (0.0, 1.0))
    lines, words = [], []
    for measure, style in zip(("dice_mean", "dice_pooled"), PAIR, strict=True):
        points = _points(rows, "threshold", measure)
        lines.append(frame.line(points, style))
        words.append(range_words(measure_label(measure), points))
    return frame.plot(name, f"Dice over the threshold, {name}. {' '.join(words)}", lines, color)


def _froc_plot(name: str, rows: Rows, color: Rgb | None) -> LinePlot:
    points = _points(rows, "false_positives_per_image", "lesion_sensitivity")
    x_range = range_of([x for x, _ in points], from_zero=True)
    labels = "false positives per image", "lesion sensitivity"
    frame = Frame(labels, _SIDE, _SIDE, x_range)
    words = f"Lesion sensitivity over false positives per image, {name}. "
    words += range_words("Sensitivity", points)
    return frame.plot(name, words, [frame.line(points, PAIR[0], has_markers=True)], color)


def _points(rows: Rows, x: str, y: str) -> list[Point]:
    return [(float(row[x]), float(row[y])) for row in rows if row[x] and row[y]]


def _table(sweep: Rows) -> Table:
    rows = [
        [row["class"], row["threshold"], *map(cell_value, list(row.values())[2:])] for row in sweep
    ]
    return Table([measure_label(name) for name in sweep[0]], name_once(rows))
