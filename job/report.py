"""Provides the command that writes the report of a run or of a cross-validation.

python -m job.report RUN
"""

from collections.abc import Sequence

import click

from flexunet.cli.interrupts import quiet_interrupts
from flexunet.cli.options import PATH, SettingsCommand
from flexunet.cli.runner import run_command
from flexunet.storage import open_store
from job.reporting.html_report import write_report


@click.command(cls=SettingsCommand)
@click.argument("run", type=PATH)
def command(run: str) -> int:
    """Write RUN/report.html: one self-contained page about a run.

    RUN is the folder or gs:// URL of a run (RUNS/NAME), or of a cross-validation. The page is made
    from the files of the run. Training writes it when it ends.
    """
    with quiet_interrupts():
        url = write_report(open_store(run))
    click.echo(f"report: {url}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(command, argv, "flexunet report")


if __name__ == "__main__":
    raise SystemExit(main())
