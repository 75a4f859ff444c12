"""`flexunet stop`: stops a submitted job; training stores a checkpoint first."""

import time
from typing import Any

import click

from flexunet.cli.options import SettingsCommand, from_options, settings_options
from launcher.jobs.client import STOP_TIMEOUT_VARIABLE, JobsConfig, checked_job_id, connect
from launcher.jobs.follow import described_end, wait


@click.command("stop", cls=SettingsCommand)
@click.argument("job")
@settings_options(JobsConfig)
def command(job: str, **options: Any) -> None:
    """Stop JOB, wait until it has ended, and report how it ended.

    Training stores a checkpoint first. Submit the same command again to resume, under another job
    name: Ray keeps the ended job. Processes that still run after the --stop-timeout of
    `flexunet submit` are killed.
    """
    config = from_options(JobsConfig, options)
    job_id = checked_job_id(job)
    client = connect(config)
    details = client.get_job_info(job_id)
    if details.status.is_terminal():
        click.echo(f"job {job_id} had ended already: {described_end(details)}")
        return
    begin = time.monotonic()
    client.stop_job(job_id)
    details = wait(client, job_id)
    seconds = time.monotonic() - begin
    click.echo(f"job {job_id}: {described_end(details)}{_manner(details, seconds)}")


def _manner(details: Any, seconds: float) -> str:
    """Returns a text on how the processes of a job ended, `seconds` after the stop request."""
    variables = (details.runtime_env or {}).get("env_vars") or {}
    allowed = variables.get(STOP_TIMEOUT_VARIABLE)
    if details.status != "STOPPED" or allowed is None:
        return ""
    if seconds < int(allowed):
        return f"; it ended by itself within {seconds:.0f} s"
    return f"; it was killed because it had not ended within {allowed} s"
