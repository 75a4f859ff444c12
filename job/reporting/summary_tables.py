"""Prints the summary of an evaluation as tables on a terminal."""

from collections.abc import Mapping
from typing import Any

from flexunet.text import pluralize
from job.reporting.phrases import (
    checkpoint_words,
    counted_cases,
    has_foreground,
    lesion_words,
    measure_rows,
    no_foreground_words,
    size_notes,
    summarized_words,
    titled_sizes,
)


def show_summary(summary: Mapping[str, Any]) -> None:
    """Prints the foreground scores of a split beside the all-background baseline."""
    from rich.console import Console
    from rich.table import Table

    used = summary.get("checkpoint")
    weights = f", {checkpoint_words(used)}" if used else ""
    cases = pluralize(summary["num_cases"], "case")
    table = Table(title=f"{summarized_words(summary)}: {cases}{weights}")
    table.add_column("foreground")
    baseline = summary["all_background"]["foreground_mean"]
    columns = {
        f"mean over {counted_cases(summary)}": summary["foreground_mean"],
        "pooled pixels": summary["foreground_pooled"],
        "all background": baseline,
    }
    for title in columns:
        table.add_column(title, justify="right")
    for name in baseline:
        values = [column[name] for column in columns.values()]
        table.add_row(name, *("-" if value is None else f"{value:.4f}" for value in values))
    console = Console()
    console.print(table)
    if not has_foreground(summary):
        console.print(no_foreground_words(summary))
    sizes = titled_sizes(summary.get("sizes", {}))
    for title, measures in sizes:
        console.print(measures_table(title, measures))
        for line in size_notes(title, measures):
            console.print(line, style="dim")
    if sizes:
        console.print(lesion_words(sizes[0][1]), style="dim")


def measures_table(title: str, measures: Mapping[str, Any]) -> Any:
    """Returns what `summarize_cases` returned as a table for people, at most 80 columns wide."""
    from rich.table import Table

    table = Table(title=f"{title}: {pluralize(measures['num_groups'], 'group')}")
    table.add_column("measure", overflow="fold")
    for column in ("value", "95 % interval", "cases", "groups"):
        table.add_column(column, justify="right", no_wrap=True)
    for label, measure in measure_rows(measures):
        value, low, high = measure["value"], measure["low"], measure["high"]
        table.add_row(
            label,
            "-" if value is None else f"{value:.4f}",
            "-" if low is None else f"{low:.4f} to {high:.4f}",
            str(measure["num_cases"]),
            # The outcome of a run of an earlier version has none.
            str(measure.get("num_groups", "-")),
        )
    return table
