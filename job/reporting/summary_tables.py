"""Prints the summary of an evaluation as tables on a terminal."""

import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flexunet.text import pluralize
from job.reporting.phrases import (
    ALL_CLASSES,
    BASELINE,
    EVERYTHING,
    baseline_warnings,
    checkpoint_words,
    counted_cases,
    everything_dice,
    has_foreground,
    left_out_words,
    lesion_words,
    measure_label,
    measure_rows,
    no_foreground_words,
    num_cases_words,
    size_notes,
    summarized_words,
    titled_sizes,
)

if TYPE_CHECKING:
    from rich.table import Table


_FEW_CLASSES = 4  # up to which every measure of a class has a row of its own
_SHORT_COLUMNS = {
    "dice_mean": "Dice,\nmean",
    "lesion_sensitivity": "lesion\nsens.",
    "false_positives_per_image": "FP per\nimage",
}


def show_summary(summary: Mapping[str, Any]) -> None:
    """Prints the foreground scores of a split next to those of two baselines.

    They predict nothing, and each class on every pixel.
    """
    from rich.console import Console

    console = Console()
    console.print(_foreground_table(summary))
    if len(summary["classes"]) > 2:
        console.print(_classes_table(summary))
    if (left_out := left_out_words(summary)) is not None:
        console.print(left_out, style="dim")
    if not has_foreground(summary):
        console.print(no_foreground_words(summary), markup=False)
    for warning in baseline_warnings(summary):
        console.print(warning, markup=False)
    sizes = titled_sizes(summary.get("sizes", {}))
    for title, measures in sizes:
        console.print(_short_table(title, measures) or measures_table(title, measures))
        for line in size_notes(title, measures):
            console.print(line, style="dim", markup=False)
    if sizes:
        console.print(lesion_words(sizes[0][1]), style="dim")


def _foreground_table(summary: Mapping[str, Any]) -> "Table":
    """Returns the scores of the foreground and of the baselines."""
    from rich.table import Table

    used = summary.get("checkpoint")
    weights = f", {checkpoint_words(used)}" if used else ""
    cases = num_cases_words(summary)
    table = Table(title=f"{summarized_words(summary)}: {cases}{weights}")
    table.add_column("foreground, network size")
    baseline = summary["all_background"]["foreground_mean"]
    for name in baseline:
        table.add_column(measure_label(name), justify="right", no_wrap=True)
    rows = {
        f"mean over {counted_cases(summary)}": summary["foreground_mean"],
        "pooled over pixels": summary["foreground_pooled"],
    }
    if plain := summary.get("without_postprocessing"):
        rows["mean, without postprocessing"] = plain["foreground_mean"]
    rows[f"{BASELINE}, mean over images"] = baseline
    if everything_dice(summary) is not None:
        rows[f"{EVERYTHING}, mean over images"] = summary["all_foreground"]["foreground_mean"]
    for label, scores in rows.items():
        values = [scores[name] for name in baseline]
        table.add_row(label, *map(shown, values))
    return table


def _classes_table(summary: Mapping[str, Any]) -> "Table":
    """Returns Dice and IoU of each class but the background, mean and pooled, in 80 columns."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="each class, network size")
    table.add_column("class", overflow="fold")
    for name in ("Dice", "IoU"):
        for kind in ("mean", "pooled"):
            table.add_column(f"{name}, {kind}", justify="right", no_wrap=True)
    for each in summary["classes"][1:]:
        pooled = each["pooled"]
        values = (each["dice"], pooled["dice"], each["iou"], pooled["iou"])
        table.add_row(Text(each["name"]), *map(shown, values))
    return table


def _short_table(title: str, measures: Mapping[str, Any]) -> "Table | None":
    """Returns a row for each of many classes, in 80 columns; None with few classes or two units."""
    from rich.table import Table
    from rich.text import Text

    units = [unit for unit in ("mm", "px") if f"hd95_{unit}" in measures["classes"][0]]
    if len(measures["classes"]) <= _FEW_CLASSES or len(units) != 1:
        return None
    table = Table(title=f"{title}: {pluralize(measures['num_groups'], 'group')}")
    table.add_column("class", overflow="fold")
    columns = _SHORT_COLUMNS | {f"hd95_{units[0]}": f"HD95,\n{units[0]}", f"nsd_{units[0]}": "NSD"}
    for name, header in columns.items():
        table.add_column(header, justify="right", no_wrap=True)
        if name == "dice_mean":
            table.add_column("95 % interval\nof this Dice", justify="right", no_wrap=True)
    owners = [{"name": ALL_CLASSES} | dict(measures["foreground"]), *measures["classes"]]
    for owner in owners:
        dice = owner["dice_mean"]
        cells = [shown((owner.get(name) or {}).get("value")) for name in columns]
        cells.insert(1, interval_cell(dice))
        table.add_row(Text(owner["name"]), *cells)
    return table


def interval_cell(measure: Mapping[str, Any]) -> str:
    """Formats the interval of a measure; a dash without one."""
    low, high = measure["low"], measure["high"]
    return "-" if low is None else f"{shown(low)} to {shown(high)}"


def measures_table(title: str, measures: Mapping[str, Any]) -> "Table":
    """Returns the measures of `summarize_cases` as a table of at most 80 columns."""
    from rich.table import Table

    table = Table(title=f"{title}: {pluralize(measures['num_groups'], 'group')}")
    table.add_column("measure", overflow="fold")
    for column in ("value", "95 % interval", "images", "groups"):
        table.add_column(column, justify="right", no_wrap=True)
    rows = []
    for owner, label, measure in measure_rows(measures):
        cells = [
            label,
            shown(measure["value"]),
            interval_cell(measure),
            str(measure["num_cases"]),
            # Earlier versions did not write it.
            str(measure.get("num_groups", "-")),
        ]
        rows.append((owner, cells))
    add_rows(table, rows)
    return table


def shown(value: float | None) -> str:
    """Formats a value with 4 decimals, a distance of 100 and more with 2; None is a dash."""
    if value is None:
        return "-"
    return f"{value:.4f}" if value < 100 else f"{value:.2f}"  # two of them fit 80 columns


def add_rows(table: "Table", rows: Iterable[tuple[str, Sequence[str]]]) -> None:
    """Adds (owner, cells) to a table, with a row for each owner above its rows."""
    from rich.text import Text

    for owner, own_rows in itertools.groupby(rows, key=operator.itemgetter(0)):
        table.add_section()
        table.add_row(Text(owner, style="bold"))
        for _, cells in own_rows:
            table.add_row(*cells)
