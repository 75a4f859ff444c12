"""Prints a comparison of runs on a terminal, in 80 columns."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flexunet.text import pluralize
from job.comparison.comparison import ComparedRuns
from job.comparison.differences import Difference
from job.reporting.phrases import measure_label
from job.reporting.summary_tables import shown

if TYPE_CHECKING:
    from rich.table import Table

_SHOWN = "dice_mean"  # of each class; the page has all measures
_MOST_OPTIONS = 20  # on a terminal


def show_comparison(compared: ComparedRuns) -> None:
    """Prints the differences of the Dice of each class, and the options that differ."""
    from rich.console import Console

    console = Console()
    first = compared.runs[0]
    cases = pluralize(len(first.groups), "image")
    groups = pluralize(len(set(first.groups.values())), "group")
    for size, of_runs in compared.differences.items():
        for name, found in of_runs.items():
            console.print(_table(f"{name} minus {first.name}, {size} size", found))
    console.print(
        f"{compared.split}: {cases}, {groups}. Paired differences with 95 % bootstrap intervals "
        "over groups; no interval with fewer than 5 groups.",
        style="dim",
    )
    for note in compared.notes:
        console.print(note, markup=False)
    console.print(_options_table(compared))


def _table(title: str, found: Sequence[Difference]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title))
    table.add_column(measure_label(_SHOWN), overflow="fold")
    for column in ("first", "this", "difference", "95 % interval", ""):
        table.add_column(column, justify="right", no_wrap=True)
    for each in found:
        # All measures of the first owner, the mean over classes or the only class.
        if each.measure != _SHOWN and each.key != found[0].key:
            continue
        label = each.label if each.measure == _SHOWN else f"  {measure_label(each.measure)}"
        interval = "-" if each.low is None else f"{each.low:+.4f} to {each.high:+.4f}"
        difference = "-" if each.difference is None else f"{each.difference:+.4f}"
        table.add_row(
            Text(label), shown(each.first), shown(each.value), difference, interval, each.verdict
        )
    return table


def _options_table(compared: ComparedRuns) -> "Table":
    """Returns the options that differ, one row for each; of many, the first ones."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="options that differ" if compared.options else "no option differs")
    table.add_column("option", overflow="fold")
    for run in compared.runs:
        table.add_column(Text(run.name), overflow="fold")
    for name, values in list(compared.options.items())[:_MOST_OPTIONS]:
        table.add_row(Text(name), *(Text(option_words(value)) for value in values))
    if len(compared.options) > _MOST_OPTIONS:
        table.caption = f"and {len(compared.options) - _MOST_OPTIONS} more on the page"
    return table


def option_words(value: Any) -> str:
    """Returns the value of an option as text; None is a dash."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)
