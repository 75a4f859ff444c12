"""Prints the measures of every fold of a cross-validation, and of all folds together."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from flexunet.storage import open_store
from job.config import TrainConfig
from job.reporting.phrases import lesion_words, measure_rows, size_notes, titled_sizes
from job.reporting.summary_tables import measures_table
from job.runs.layout import CROSS_VALIDATION_NAME, run_url

_FOLDS_BESIDE = 4  # of a table that fits 80 columns


def show_folds(config: TrainConfig) -> None:
    """Prints the measures of every fold and of all of them together."""
    from rich.console import Console

    url = run_url(config)
    summary = json.loads(open_store(url).get(CROSS_VALIDATION_NAME))
    console = Console()
    sizes = titled_sizes(summary["sizes"])
    for title, found in sizes:
        console.print(measures_table(f"cases of all folds, {title}", found["pooled"]))
        labels = [label for label, _ in measure_rows(found["pooled"])]
        folds = [dict(measure_rows(each)) for each in found["folds"]]
        for first in range(0, len(folds), _FOLDS_BESIDE):
            beside = dict(enumerate(folds[first : first + _FOLDS_BESIDE], start=first))
            console.print(_folds_table(title, labels, beside))
        for line in size_notes(title, found["pooled"]):
            console.print(line, style="dim")
    console.print(lesion_words(sizes[0][1]["pooled"]), style="dim")
    where = f"cross-validation: {url}/{CROSS_VALIDATION_NAME}"
    console.print(where, markup=False, highlight=False, soft_wrap=True)


def _folds_table(title: str, labels: Sequence[str], folds: Mapping[int, Mapping[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title=f"fold by fold, {title}")
    table.add_column("measure", overflow="fold")
    for fold in folds:
        table.add_column(f"{fold}", justify="right", no_wrap=True)
    for label in labels:
        table.add_row(label, *(_shown(each.get(label)) for each in folds.values()))
    return table


def _shown(measure: Mapping[str, Any] | None) -> str:
    if measure is None or measure["value"] is None:
        return "-"
    return f"{measure['value']:.4f}"
