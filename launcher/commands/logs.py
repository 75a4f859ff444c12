"""`flexunet logs`: shows the output of a submitted job."""

from typing import Any

import click

from flexunet.cli.options import SettingsCommand, from_options, settings_options
from flexunet.settings import option
from launcher.jobs.client import JobsConfig, checked_job_id, connect
from launcher.jobs.follow import follow


class LogsConfig(JobsConfig):
    """Options of `flexunet logs`."""

    follow: bool = option(False, "Show the log until the job ends; exit with its exit code.")


@click.command("logs", cls=SettingsCommand)
@click.argument("job")
@settings_options(LogsConfig)
def command(job: str, **options: Any) -> int:
    """Show the output of JOB, including errors.

    With --follow the exit code is the job's, as with `flexunet submit --follow`. Ctrl-C then stops
    following with exit code 130; the job continues.
    """
    config = from_options(LogsConfig, options)
    job_id = checked_job_id(job)
    client = connect(config)
    if config.follow:
        return follow(client, job_id)
    click.echo(client.get_job_logs(job_id), nl=False)
    return 0
