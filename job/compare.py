"""Provides the command that compares runs on the same cases.

python -m job.compare RUN RUN
"""

import json
from collections.abc import Sequence

import click

from flexunet.cli.interrupts import quiet_interrupts
from flexunet.cli.options import PATH, SettingsCommand
from flexunet.cli.runner import run_command
from job.comparison.comparison import compare_runs
from job.comparison.page import DEFAULT_NAME, page_target, write_page
from job.comparison.tables import show_comparison


@click.command(cls=SettingsCommand)
@click.argument("runs", type=PATH, nargs=-1, required=True)
@click.option(
    "--split",
    type=click.Choice(["train", "valid", "test"]),
    default="test",
    help="Evaluated split to compare. [default: test]",
)
@click.option(
    "--output",
    type=PATH,
    metavar="PATH",
    help="File or gs:// URL of the page; an earlier one is replaced. "
    f"[default: {DEFAULT_NAME} in the current folder]",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print the comparison as JSON on standard output, instead of tables.",
)
def command(runs: tuple[str, ...], split: str, output: str | None, as_json: bool) -> int:
    """Compare runs with the first of them, on the same cases.

    RUNS are two or more folders or gs:// URLs of runs (RUNS/NAME) or cross-validations that were
    evaluated on the same cases. Shows paired differences of all measures with bootstrap intervals
    over groups, and the options that differ; the page also has curves over epochs and minutes.
    """
    target = output or DEFAULT_NAME
    page_target(target)
    with quiet_interrupts():
        compared = compare_runs(runs, split)
        if as_json:
            click.echo(json.dumps(compared.as_json(), indent=2, allow_nan=False))
        else:
            show_comparison(compared)
        url = write_page(compared, target)
    if not as_json:
        click.echo(f"comparison: {url}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(command, argv, "flexunet compare")


if __name__ == "__main__":
    raise SystemExit(main())
