"""`flexunet launch train`: trains on a Ray cluster, or on a local Ray.

python -m launcher train --data DATASET --output RUNS --name NAME --num-workers 2
"""

import logging
from typing import Any

import click

from flexunet.cli.options import (
    PATH,
    SettingsCommand,
    explicit_options,
    extra_options,
    from_options,
    settings_options,
)
from flexunet.storage import open_store
from job.compat.ini_prep import PreparationConfig
from job.config import TrainConfig
from job.data.folds import is_cross_validation
from job.planning.options import resolve_config
from job.reporting.fold_tables import show_folds
from job.reporting.html_report import write_report
from job.runs.layout import run_url
from job.train import show_end
from job.training.cross_validation import cross_validate, separate_process
from job.training.process import stop_signals
from launcher.cluster.connection import connected
from launcher.cluster.resources import require_slots, widest, worker_slots
from launcher.config import LaunchConfig
from launcher.supervisor import launch

logger = logging.getLogger(__name__)


@click.command(cls=SettingsCommand)
@click.option(
    "--config",
    "file",
    type=PATH,
    metavar="PATH",
    help="YAML file with train options, or a .config file of the reference implementation "
    "(TensorFlow-FlexUNet).",
)
@settings_options(LaunchConfig)
@settings_options(TrainConfig)
@extra_options(PreparationConfig, "prep", [TrainConfig, LaunchConfig])
def command(file: str | None, **options: Any) -> int:
    """Train on a Ray cluster, or on a local Ray.

    The same command again resumes the run, on any number of workers that divides the batch size.
    """
    where = {name: options.pop(name) for name in LaunchConfig.model_fields}
    settings = from_options(LaunchConfig, where)
    values = explicit_options(options)
    config = resolve_config(values, file, values.pop("prep", {}))
    if is_cross_validation(config):
        return _cross_validate(config, settings)
    show_end(launch(config, settings), run_url(config))
    return 0


def _cross_validate(config: TrainConfig, settings: LaunchConfig) -> int:
    """Trains as many folds at once as the cluster fits; returns the exit code."""
    import ray

    with stop_signals() as should_stop, connected(settings.address, worker_logs=False):
        num_parallel, settings = _side_by_side(int(config.folds or 1), settings)
        address = ray.get_runtime_context().gcs_address
        arguments = _arguments(settings.model_copy(update={"address": address}))
        command = separate_process("launcher", "train", *arguments)
        logger.info("%d folds, %d at a time", config.folds, num_parallel)
        code = cross_validate(config, command, num_parallel, should_stop)
    if code == 0:
        show_folds(config)
        click.echo(f"report: {write_report(open_store(run_url(config)))}")
    return code


def _side_by_side(num_folds: int, settings: LaunchConfig) -> tuple[int, LaunchConfig]:
    """Returns how many folds fit at once, and `settings` with the cores per worker.

    Raises:
        UsageError: not even one fold fits.
    """
    for count in range(num_folds, 0, -1):
        num_workers, num_gpus = count * settings.num_workers, settings.gpus_per_worker
        num_cpus = settings.cpus_per_worker
        if num_cpus is None:
            num_cpus = int(widest(num_workers, num_gpus=num_gpus).num_cpus)
        sized = settings.model_copy(update={"cpus_per_worker": num_cpus})
        if sum(worker_slots(sized.per_worker).values()) >= num_workers:
            return count, sized
    if not settings.wait_for_nodes:
        require_slots(sized.per_worker, settings.num_workers)
    return 1, sized


def _arguments(settings: LaunchConfig) -> list[str]:
    """Returns the command-line arguments for these settings."""
    arguments = []
    for name, value in settings.model_dump().items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            arguments += [f"--{flag}", str(value)]
    return arguments
