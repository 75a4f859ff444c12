"""Provides the command that evaluates a run on one split of its dataset.

python -m job.evaluate RUN --split test
"""

from collections.abc import Sequence
from typing import Any

import click

from flexunet.cli.interrupts import quiet_interrupts
from flexunet.cli.options import PATH, SettingsCommand, from_options, settings_options
from flexunet.cli.runner import run_command
from flexunet.storage import open_store
from job.evaluation.pipeline import EvaluateConfig, evaluate
from job.reporting.summary_tables import show_summary


@click.command(cls=SettingsCommand)
@click.argument("run", type=PATH)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print summary.json alone on standard output, instead of tables; logs are on standard "
    "error.",
)
@settings_options(EvaluateConfig)
def command(run: str, as_json: bool, **options: Any) -> int:
    """Evaluate a run on one split of its dataset.

    RUN is the folder or gs:// URL of a run (RUNS/NAME). Writes tables (per_case.csv), summary.json
    and images of some cases to RUN/evaluation, or to --output. An earlier evaluation there is
    replaced, except small_regions.json, which only --remove-small-regions replaces.

    Images are measured at network size and at original size. The truth is the stored mask, enlarged
    for the original size: regions that downscaling removed do not count as missed; flexunet prep
    reports how many there are.
    """
    config = from_options(EvaluateConfig, options)
    with quiet_interrupts():
        evaluation, url = evaluate(run, config)
    if as_json:
        click.echo(open_store(url).get("summary.json"), nl=False)
        return 0
    show_summary(evaluation.summary)
    click.echo(f"tables and images: {url}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(command, argv, "flexunet evaluate")


if __name__ == "__main__":
    raise SystemExit(main())
