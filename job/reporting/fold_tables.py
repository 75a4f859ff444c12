"""Prints the measures of each fold of a cross-validation, and of all folds together."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from flexunet.storage import open_store
from job.config import TrainConfig
from job.metrics.fold_spread import spread
from job.reporting.phrases import lesion_words, measure_rows, size_notes, titled_sizes
from job.reporting.summary_tables import add_rows, measures_table, shown
from job.runs.layout import CROSS_VALIDATION_NAME, run_url

if TYPE_CHECKING:
    from rich.table import Table

Row: TypeAlias = tuple[str, str]  # (owner, label), see `MeasureRow`

_FOLDS_BESIDE = 4  # columns of folds in a table of at most 80 columns


def show_folds(config: TrainConfig) -> None:
    """Prints the measures of each fold and of all folds together."""
    from rich.console import Console

    url = run_url(config)
    summary = json.loads(open_store(url).get(CROSS_VALIDATION_NAME))
    console = Console()
    sizes = titled_sizes(summary["sizes"])
    for title, found in sizes:
        console.print(measures_table(f"all folds, {title}", found["pooled"]))
        rows = [row[:2] for row in measure_rows(found["pooled"])]
        folds = [{row[:2]: row.measure for row in measure_rows(each)} for each in found["folds"]]
        console.print(_spread_table(title, rows, folds))
        for first in range(0, len(folds), _FOLDS_BESIDE):
            beside = dict(enumerate(folds[first : first + _FOLDS_BESIDE], start=first))
            console.print(_folds_table(title, rows, beside))
        for line in size_notes(title, found["pooled"]):
            console.print(line, style="dim")
    console.print(lesion_words(sizes[0][1]["pooled"]), style="dim")
    where = f"cross-validation: {url}/{CROSS_VALIDATION_NAME}"
    console.print(where, markup=False, highlight=False, soft_wrap=True)


def _spread_table(
    title: str, rows: Sequence[Row], folds: Sequence[Mapping[Row, Mapping[str, Any]]]
) -> "Table":
    from rich.table import Table

    table = Table(title=f"over folds, {title}")
    table.add_column("measure", overflow="fold")
    for column in ("mean", "SD", "folds"):
        table.add_column(column, justify="right", no_wrap=True)
    cells = []
    for row in rows:
        measures = [each[row] for each in folds if row in each]
        found = spread([measure["value"] for measure in measures])
        cells.append(
            (row[0], [row[1], shown(found["mean"]), shown(found["sd"]), str(found["num_folds"])])
        )
    add_rows(table, cells)
    return table


def _folds_table(
    title: str, rows: Sequence[Row], folds: Mapping[int, Mapping[Row, Mapping[str, Any]]]
) -> "Table":
    from rich.table import Table

    table = Table(title=f"each fold, {title}; folds counted from 1")
    table.add_column("measure", overflow="fold")
    for fold in folds:
        table.add_column(f"fold {fold + 1}", justify="right", no_wrap=True)
    add_rows(table, [(row[0], [row[1], *(_value(each.get(row)) for each in folds.values())])
                     for row in rows])  # fmt: skip
    return table


def _value(measure: Mapping[str, Any] | None) -> str:
    return shown(None if measure is None else measure["value"])
