"""Shows the options that a new run would get (command `flexunet plan`).

    flexunet plan DATASET [train options] [--dry-step always] [--json]

Stores nothing. Needs TensorFlow for the dry step only.
"""

import sys
from collections.abc import Sequence
from typing import Any

import click

from flexunet.cli.options import PATH, SettingsCommand, explicit_options, settings_options
from flexunet.cli.runner import run_command
from flexunet.errors import UsageError
from flexunet.settings import deep_merge, parse_settings, read_text, read_yaml
from job.compat.ini_mapping import is_reference_config
from job.config import TrainConfig
from job.planning.plan_file import Plan, plan_json
from job.planning.plan_words import COLUMNS, plan_rows, summary_rows
from job.training.dry_step import DryStepMode, plan_dataset
from job.training.process import stop_signals


@click.command(cls=SettingsCommand)
@click.argument("dataset", type=PATH)
@click.option(
    "--config", "file", type=PATH, metavar="PATH", help="YAML file with any of these options."
)
@click.option(
    "--dry-step",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    help="Train a few steps in another process, to measure memory and time. auto: only if the "
    "estimated memory is not far below that of this machine. [default: auto]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, as in plan.json of a run.")
@settings_options(TrainConfig, skip=("data", "preset"))
def command(
    dataset: str, file: str | None, dry_step: DryStepMode, as_json: bool, **options: Any
) -> int:
    """Show the options that `train --preset auto` chooses for DATASET, and why.

    Options that you give keep their values; the others are planned around them. A run that exists
    keeps its own options, whatever this command shows.
    """
    typed = explicit_options(options)
    values: dict[str, Any] = {}
    if file is not None:
        if is_reference_config(file):
            raise UsageError(
                f"--config {file}: a file of the reference implementation sets all options itself, "
                "so nothing is planned; give a YAML file"
            )
        values = read_yaml(read_text(file), file)
    values = deep_merge(values, typed) | {"data": dataset, "preset": "auto"}
    config = parse_settings(TrainConfig, values, file or "options", typed=typed)
    with stop_signals() as should_stop:
        plan = plan_dataset(config, dry_step, should_stop)
    if as_json:
        click.echo(plan_json(plan).decode(), nl=False)
    else:
        _show(plan)
    return 0


def _show(plan: Plan) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for title, columns, rows in (
        ("Plan", None, summary_rows(plan)),
        ("Choices", COLUMNS, plan_rows(plan)),
    ):
        table = Table(
            box=box.SIMPLE, title=title, title_justify="left", show_header=columns is not None
        )
        for name in columns or ("", ""):
            table.add_column(name, overflow="fold")
        for row in rows:
            # Text, not str: rich would read brackets in a str as markup.
            table.add_row(*map(Text, row))
        console.print(table)
    for note in plan.notes:
        # On one line, so that a command in it can be copied.
        click.echo(f"note: {note}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(command, argv, "flexunet plan")


if __name__ == "__main__":
    sys.exit(main())
