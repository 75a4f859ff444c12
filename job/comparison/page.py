"""Renders the page of a comparison: curves, paired differences, and options that differ."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexunet.errors import UsageError
from flexunet.storage import ObjectStore, join_url, open_store
from flexunet.text import pluralize
from job.comparison.comparison import ComparedRuns
from job.comparison.curves import RunCurves, curves_of
from job.comparison.differences import Difference
from job.comparison.tables import option_words
from job.reporting.phrases import ALL_CLASSES, measure_label
from job.reporting.rendering import render_page
from job.reporting.views.line_plots import (
    Frame,
    LinePlot,
    PlotGroup,
    line_style,
    range_of,
    range_words,
)
from job.reporting.views.parts import Rgb, Table, class_colors

DEFAULT_NAME = "compare.html"
_WIDTH, _HEIGHT = 420, 240  # pixels of a plot
_TITLES = {
    "val_foreground_dice": "validation foreground Dice",
    "val_loss": "validation loss",
    "loss": "training loss",
}
_MOST_OPTION_LETTERS = 200  # of a value; a long list stays readable


@dataclass(frozen=True)
class DifferenceCell:
    """A difference of a measure in words; `verdict` is "better", "worse" or empty."""

    values: str
    difference: str
    interval: str | None
    verdict: str


@dataclass(frozen=True)
class DifferenceRow:
    """The differences of a class, one for each measure; None: the measure has none."""

    name: str
    color: Rgb | None
    cells: Sequence[DifferenceCell | None]


@dataclass(frozen=True)
class DifferenceMatrix:
    """The differences of a run from the first one: a row for each class."""

    run: str
    columns: Sequence[str]
    rows: Sequence[DifferenceRow]


def page_target(output: str) -> tuple[ObjectStore, str]:
    """Returns the folder and the name of the page at `output`, a path or gs:// URL.

    Raises:
        UsageError: it does not end with .html.
    """
    if not output.endswith(".html"):
        raise UsageError(f"--output {output!r}: the page is a file; give a name that ends in .html")
    if "://" not in output:
        output = os.path.abspath(output)
    folder, _, name = output.rpartition("/")
    return open_store(folder or "/"), name


def write_page(compared: ComparedRuns, output: str) -> str:
    """Writes the page to `output`, replacing an earlier one; returns its URL.

    Raises:
        UsageError: `output` does not end with .html.
        StorageError: storage is unavailable or full.
    """
    store, name = page_target(output)
    store.put(name, render_comparison(compared).encode())
    return join_url(store.url, name)


def render_comparison(compared: ComparedRuns) -> str:
    """Returns the page of a comparison; the same files give the same page."""
    first = compared.runs[0]
    values = compared.as_json()
    curves = [curves_of(run) for run in compared.runs]
    return render_page(
        "compare.html.j2",
        f"{compared.split} split",
        title=f"Comparison with {first.name}",
        first=first.name,
        runs=_runs_table(values["runs"]),
        notes=compared.notes,
        cases=pluralize(values["num_cases"], "image"),
        groups=pluralize(values["num_groups"], "group"),
        sizes=[
            (
                f"{size} size",
                [
                    difference_matrix(name, found, class_colors(first.manifest))
                    for name, found in of_runs.items()
                ],
            )
            for size, of_runs in compared.differences.items()
        ],
        curves=_curves([run.name for run in compared.runs], curves),
        options=_options(compared),
    )


def _runs_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    keys = ("name", "status", "epochs", "best_epoch", "url")
    columns = ("run", "status", "epochs", "best epoch", "folder")
    return Table(columns, [[run[key] for key in keys] for run in runs])


def _options(compared: ComparedRuns) -> Table | None:
    if not compared.options:
        return None
    rows = [
        [name, *(option_words(each)[:_MOST_OPTION_LETTERS] for each in values)]
        for name, values in compared.options.items()
    ]
    return Table(["option", *(run.name for run in compared.runs)], rows)


def difference_matrix(
    name: str, found: Sequence[Difference], colors: Mapping[str, Rgb]
) -> DifferenceMatrix:
    """Returns the differences of the run `name`, the colours being those of classes by name."""
    measures = list(dict.fromkeys(each.measure for each in found))
    owners: dict[tuple[bool, str], dict[str, Difference]] = {}
    for each in found:
        owners.setdefault(each.key, {})[each.measure] = each
    return DifferenceMatrix(
        run=name,
        columns=[measure_label(each) for each in measures],
        rows=[
            DifferenceRow(
                ALL_CLASSES if is_mean else owner,
                None if is_mean else colors.get(owner),
                [_cell(of_owner.get(measure)) for measure in measures],
            )
            for (is_mean, owner), of_owner in owners.items()
        ],
    )


def _cell(found: Difference | None) -> DifferenceCell | None:
    if found is None or found.difference is None:
        return None
    interval = None
    if found.low is not None and found.high is not None:
        interval = f"{found.low:+.4f} to {found.high:+.4f}"
    return DifferenceCell(
        values=f"{found.first:.4f} → {found.value:.4f}",
        difference=f"{found.difference:+.4f}",
        interval=interval,
        verdict=found.verdict,
    )


def _curves(names: Sequence[str], curves: Sequence[RunCurves | None]) -> PlotGroup | None:
    if all(each is None for each in curves):
        return None
    found = dict(zip(names, curves, strict=True))
    plots = [
        _plot(column, found, over_minutes=over_minutes)
        for column in _TITLES
        for over_minutes in (False, True)
    ]
    notes = [
        "Minutes: the time of the training steps up to the end of an epoch, without validation, "
        "from the stored images per second. Losses can be compared only between runs with the "
        "same loss function."
    ]
    legend = [(name, line_style(index)) for index, name in enumerate(names)]
    return PlotGroup("Curves", notes, legend, [each for each in plots if each.lines], None)


def _plot(column: str, curves: Mapping[str, RunCurves | None], *, over_minutes: bool) -> LinePlot:
    place = "minutes" if over_minutes else "epoch"
    points = {
        name: each.points(column, over_minutes=over_minutes)
        for name, each in curves.items()
        if each is not None
    }
    every = [point for each in points.values() for point in each]
    frame = Frame(
        (place, _TITLES[column]),
        _WIDTH,
        _HEIGHT,
        range_of([x for x, _ in every], from_zero=over_minutes),
        range_of([y for _, y in every]),
        is_whole=not over_minutes,
    )
    title = f"{_TITLES[column]} over {place}"
    words = " ".join([f"{title}.", *(range_words(name, each) for name, each in points.items())])
    order = list(curves)
    lines = [
        frame.line(each, line_style(order.index(name)), has_markers=len(each) <= 30)
        for name, each in points.items()
        if each
    ]
    return frame.plot(title, words, lines)
