"""`flexunet submit`: submits a command to a cluster, whose head runs it as a Ray job."""

import importlib
import secrets
import shlex
from collections.abc import Sequence
from typing import Any

import click

from flexunet.cli.options import SettingsCommand, from_options, settings_options
from flexunet.errors import UsageError
from flexunet.settings import option, suggestion
from launcher.commands.launch import COMMANDS
from launcher.jobs.client import JobsConfig, checked_job_id, connect, start
from launcher.jobs.follow import follow

# The program that the head runs for each command, and the module with its options.
_PROGRAMS = {name: (f"flexunet launch {name}", module) for name, (module, _) in COMMANDS.items()}
_PROGRAMS["evaluate"] = ("flexunet evaluate", "job.evaluate")


class SubmitConfig(JobsConfig):
    """Options of `flexunet submit`."""

    follow: bool = option(False, "Show the job's log until it ends; exit with its exit code.")
    name: str | None = option(None, "Name of the job; none: the command and eight hex digits.")
    stop_timeout: int = option(
        120,
        "Seconds for a stopped job to store a checkpoint before its processes are killed.",
        ge=1,
    )


@click.command("submit", cls=SettingsCommand, context_settings={"allow_interspersed_args": False})
@click.argument("words", metavar="[--] COMMAND...", nargs=-1, type=click.UNPROCESSED, required=True)
@settings_options(SubmitConfig)
@click.pass_context
def command(context: click.Context, /, words: Sequence[str], **options: Any) -> int:
    """Submit COMMAND (prep, train, infer or evaluate, with its options) to a Ray cluster.

    The cluster's head runs it as `flexunet launch COMMAND`, or `flexunet evaluate`. It continues
    when this machine disconnects. Paths are paths on the cluster's machines; prefer gs:// URLs.

    The token of the cluster is read from RAY_AUTH_TOKEN, from the file RAY_AUTH_TOKEN_PATH, or
    from ~/.ray/auth_token.

    With --follow the exit code is the command's: 128 + N if signal N ended it, 6 if it was
    stopped, 1 if it could not start. Ctrl-C then stops following with exit code 130; the job
    continues.
    """
    entrypoint = _entrypoint(context, words)
    config = from_options(SubmitConfig, options)
    job_id = checked_job_id(config.name or f"{words[0]}-{secrets.token_hex(4)}")
    client = connect(config)
    start(client, job_id=job_id, entrypoint=entrypoint, stop_timeout_s=config.stop_timeout)
    _print_next(job_id, config)
    return follow(client, job_id) if config.follow else 0


def _entrypoint(context: click.Context, words: Sequence[str]) -> str:
    """Returns the command line for the head; reports mistakes before anything is submitted.

    Raises:
        UsageError: this command cannot be submitted.
        click.UsageError: the command has no such option.
    """
    name, *arguments = words
    if name not in _PROGRAMS:
        raise UsageError(f"{name!r} cannot be submitted; {suggestion(name, list(_PROGRAMS))}")
    program, module = _PROGRAMS[name]
    found: click.Command = importlib.import_module(module).command
    found.make_context(f"{context.command_path} {name}", list(arguments))
    return f"{program} {shlex.join(arguments)}".strip()


def _print_next(job_id: str, config: SubmitConfig) -> None:
    where = f"--address {shlex.quote(config.address)}" + (" --insecure" if config.insecure else "")
    click.echo(f"job: {job_id}")
    for verb in ("status", "logs --follow", "stop"):
        click.echo(f"  flexunet {verb} {where} {job_id}")
