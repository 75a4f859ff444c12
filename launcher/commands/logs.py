"""`flexunet logs`: what a job of a cluster has written."""

from typing import Any

import click

from flexunet.cli.options import SettingsCommand, from_options, settings_options
from flexunet.settings import option
from launcher.jobs.client import JobsConfig, checked_job_id, connect
from launcher.jobs.follow import follow


class LogsConfig(JobsConfig):
    """How much of the log."""

    follow: bool = option(False, "Go on until the job ends, and end with its exit code.")


@click.command("logs", cls=SettingsCommand)
@click.argument("job")
@settings_options(LogsConfig)
def command(job: str, **options: Any) -> int:
    """Shows what JOB has written, its errors included.

    With --follow the exit code is that of the job, as of `flexunet submit --follow`. Ctrl-C then
    leaves the job alone, and gives 130.
    """
    config = from_options(LogsConfig, options)
    job_id = checked_job_id(job)
    client = connect(config)
    if config.follow:
        return follow(client, job_id)
    click.echo(client.get_job_logs(job_id), nl=False)
    return 0
