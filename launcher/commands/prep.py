"""`flexunet launch prep`: prepares a dataset with tasks on a Ray cluster.

The dataset is the same as that of `flexunet prep`, byte for byte.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from data_prep.cli import read_config, run
from data_prep.config import PrepConfig
from data_prep.prep_input import sources_of
from flexunet.cli.interrupts import quiet_interrupts
from flexunet.cli.options import PATH, SettingsCommand, from_options, settings_options
from flexunet.process_pool import Workers
from flexunet.settings import Settings, option
from launcher.cluster.connection import connected
from launcher.cluster.node_checks import check_nodes
from launcher.cluster.resources import Resources, wait_for_slots
from launcher.executors import RayExecutor


class PrepLaunchConfig(Settings):
    """Options of `launch prep`: the cluster and its workers."""

    address: str | None = option(
        None, "HOST:PORT of a Ray cluster; none: RAY_ADDRESS if it is set, else a local Ray."
    )
    memory_per_worker: float | None = option(
        None, "Memory reserved per worker, GB; none: only the CPUs limit the workers.", gt=0
    )
    wait_for_nodes: bool = option(False, "Wait until the cluster has a node for a worker.")
    join_timeout: float = option(900.0, "Seconds to wait for nodes.", gt=0)


@contextmanager
def task_workers(
    settings: PrepLaunchConfig, per_worker: Resources, reads: Sequence[str], writes: Sequence[str]
) -> Iterator[Workers]:
    """Yields Ray tasks as workers, after checking the cluster's nodes with `check_nodes`."""
    with connected(settings.address, worker_logs=False):
        if settings.wait_for_nodes:
            wait_for_slots(per_worker, 1, settings.join_timeout)
        check_nodes(per_worker, reads=reads, writes=writes)
        executor = RayExecutor(per_worker)
        yield Workers(executor, executor.num_workers)


@click.command("prep", cls=SettingsCommand)
@click.argument("source", type=PATH)
@click.argument("output", type=PATH)
@click.option(
    "--config", "config_file", type=PATH, metavar="FILE", help="YAML file with prep options."
)
@settings_options(PrepLaunchConfig)
@settings_options(PrepConfig, skip=["num_processes"])
def command(source: str, output: str, config_file: str | None, **options: Any) -> None:
    """Convert the images and masks of SOURCE into a dataset at OUTPUT, on a Ray cluster.

    Writes the same dataset as `flexunet prep`. SOURCE and OUTPUT are gs:// URLs, or folders that
    all nodes mount. The same command continues after a stop.
    """
    where = {name: options.pop(name) for name in PrepLaunchConfig.model_fields}
    settings = from_options(PrepLaunchConfig, where)
    config = read_config(config_file, options)
    per_worker = Resources(memory_bytes=int((settings.memory_per_worker or 0) * 1e9))
    sources = sources_of(source, config)
    folders = [url for each in sources for url in (each.images, each.masks, each.views) if url]
    workers = functools.partial(task_workers, settings, per_worker, folders, [output])
    with quiet_interrupts():
        run(source, output, config, workers)
