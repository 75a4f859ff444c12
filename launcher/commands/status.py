"""`flexunet status`: shows the state of submitted jobs."""

import datetime
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import click

from flexunet.cli.options import SettingsCommand, from_options, settings_options
from launcher.jobs.client import JobsConfig, checked_job_id, connect, printable
from launcher.jobs.follow import seconds_of

_TITLES = ("job", "state", "started", "duration", "exit code", "command")


@click.command("status", cls=SettingsCommand)
@click.argument("job", required=False)
@settings_options(JobsConfig)
def command(job: str | None, **options: Any) -> None:
    """Show the state of JOB, or of all jobs submitted to a cluster.

    A stopped job has no exit code, because Ray does not keep it. On a terminal, the list of all
    jobs shortens long commands; with JOB, the whole command is shown.
    """
    config = from_options(JobsConfig, options)
    job_id = checked_job_id(job) if job else None
    client = connect(config)
    found = [client.get_job_info(job_id)] if job_id else client.list_jobs()
    # Programs started without Ray Jobs cannot be followed or stopped.
    submitted = [each for each in found if each.type == "SUBMISSION"]
    rows = [_row(each) for each in sorted(submitted, key=lambda each: each.start_time or 0)]
    is_cut = job_id is None and sys.stdout.isatty()
    _print_table(rows, shutil.get_terminal_size().columns if is_cut else None)


def _row(details: Any) -> tuple[str, ...]:
    started = datetime.datetime.fromtimestamp((details.start_time or 0) / 1000)
    code = details.driver_exit_code
    return (
        str(details.submission_id),
        str(details.status.value).lower(),
        started.isoformat(" ", "seconds"),
        str(datetime.timedelta(seconds=round(seconds_of(details)))),
        "" if code is None else str(code),
        printable(details.entrypoint),
    )


def _print_table(rows: Sequence[tuple[str, ...]], max_width: int | None) -> None:
    rows = [_TITLES, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_TITLES))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        line = "  ".join(cells).rstrip()
        if max_width is not None and len(line) > max_width:
            line = f"{line[: max_width - 3]}..."
        click.echo(line)
