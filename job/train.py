"""Trains a network on a prepared dataset, then evaluates it (command `flexunet train`).

python -m job.train --local --data DATASET --output RUNS --name NAME
"""

from collections.abc import Mapping, Sequence
from typing import Any

import click

from flexunet.cli.options import (
    PATH,
    SettingsCommand,
    explicit_options,
    extra_options,
    settings_options,
)
from flexunet.cli.runner import run_command
from flexunet.errors import UsageError
from flexunet.storage import join_url, open_store
from job.compat.ini_prep import PreparationConfig
from job.config import TrainConfig
from job.data.folds import is_cross_validation
from job.distributed.rendezvous import ProcessSpec, process_spec_from_environment
from job.planning.options import resolve_config
from job.reporting.fold_tables import show_folds
from job.reporting.html_report import REPORT_NAME, read_summary, write_report
from job.reporting.summary_tables import show_summary
from job.runs.layout import run_url
from job.training.cross_validation import cross_validate, separate_process
from job.training.process import run_in_cluster, run_local, stop_signals


@click.command(cls=SettingsCommand)
@click.option(
    "--local",
    is_flag=True,
    help="Train on the devices of this machine. Without it, join the cluster in TF_CONFIG.",
)
@click.option(
    "--config",
    "file",
    type=PATH,
    metavar="PATH",
    help="YAML file with any of these options, or a .config file of the reference implementation "
    "(TensorFlow-FlexUNet).",
)
@settings_options(TrainConfig)
@extra_options(PreparationConfig, "prep", [TrainConfig])
def command(local: bool, file: str | None, **options: Any) -> int:
    """Train a segmentation network on a prepared dataset, then evaluate it.

    The same command again resumes the run. Ctrl-C saves and stops with exit code 6.
    """
    spec = None if local else process_spec_from_environment()
    if not local and spec is None:
        raise UsageError(
            "no cluster is described here (TF_CONFIG is not set); give --local to train on this "
            "machine, or use `flexunet launch train` for a Ray cluster"
        )
    values = explicit_options(options)
    config = resolve_config(values, file, values.pop("prep", {}))
    if is_cross_validation(config):
        return _cross_validate(config, spec)
    outcome = run_in_cluster(config, spec) if spec else run_local(config)
    if spec and spec.rank > 0:
        return 0
    show_end(outcome, run_url(config))
    return 0


def show_end(outcome: Mapping[str, Any], url: str) -> None:
    """Prints the newest evaluation of the test split, and the locations of run and report.

    `evaluate` may have replaced the evaluation at the end of training. The report was written while
    this process owned the run.
    """
    store = open_store(url)
    summary = read_summary(store) or outcome["evaluation"]
    if summary:
        show_summary(summary)
    click.echo(f"run: {url}")
    click.echo(f"report: {join_url(store.url, REPORT_NAME)}")


def _cross_validate(config: TrainConfig, spec: ProcessSpec | None) -> int:
    if spec is not None:
        raise UsageError(
            "--folds trains several runs; give --local, or --fold to train one of them, or use "
            "`flexunet launch train`"
        )
    with stop_signals() as should_stop:
        code = cross_validate(config, separate_process("job.train", "--local"), 1, should_stop)
    if code == 0:
        show_folds(config)
        url = run_url(config)
        click.echo(f"report: {write_report(open_store(url))}")
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(command, argv, "flexunet train")


if __name__ == "__main__":
    raise SystemExit(main())
