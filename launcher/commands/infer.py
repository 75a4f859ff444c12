"""`flexunet launch infer`: predicts masks with processes on a Ray cluster.

The masks are the same as those of `flexunet infer`.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from flexunet.cli.interrupts import quiet_interrupts
from flexunet.cli.options import (
    PATH,
    SettingsCommand,
    explicit_options,
    from_options,
    settings_options,
)
from flexunet.process_pool import Workers
from flexunet.settings import Settings, option, parse_settings
from flexunet.storage import join_url
from job.infer import show_result
from job.inference.inputs import open_images
from job.inference.options import InferConfig
from job.inference.pipeline import infer
from launcher.cluster.connection import connected
from launcher.cluster.node_checks import check_nodes
from launcher.cluster.resources import Resources, require_slots, wait_for_slots, widest
from launcher.executors import RayProcesses


class InferLaunchConfig(Settings):
    """Options of `launch infer`: the cluster and its processes."""

    address: str | None = option(
        None, "HOST:PORT of a Ray cluster; none: RAY_ADDRESS if it is set, else a local Ray."
    )
    num_workers: int | None = option(
        None,
        "Processes, each with the model in memory; none: one per node, or as many as fit with "
        "--gpus-per-worker or --cpus-per-worker.",
        ge=1,
    )
    gpus_per_worker: float = option(
        0, "GPUs per process; with 0.5, two processes share a GPU. 0: use CPUs.", ge=0, le=1
    )
    cpus_per_worker: int | None = option(None, "CPU cores per process; none: as many as fit.", ge=1)
    wait_for_nodes: bool = option(
        False,
        "Wait until the cluster has nodes for --num-workers, or for one if that is not given.",
    )
    join_timeout: float = option(900.0, "Seconds to wait for nodes.", gt=0)


@contextmanager
def process_workers(
    settings: InferLaunchConfig, reads: Sequence[str], writes: Sequence[str]
) -> Iterator[Workers]:
    """Yields processes on a Ray cluster, after checking its nodes with `check_nodes`.

    Raises:
        UsageError: the cluster does not fit the processes, or a node fails a check.
        FlexUNetError: with `wait_for_nodes`, the cluster does not fit them in time.
    """
    with connected(settings.address, worker_logs=False):
        num_workers, per_worker = _size(settings)
        check_nodes(per_worker, reads=reads, writes=writes)
        with RayProcesses(per_worker, num_workers) as executor:
            yield Workers(executor, lambda: num_workers)


def _size(settings: InferLaunchConfig) -> tuple[int, Resources]:
    """Returns the number of workers and the resources of each."""
    num_gpus = settings.gpus_per_worker
    least = Resources(settings.cpus_per_worker or 1, num_gpus)
    if settings.wait_for_nodes:
        wait_for_slots(least, settings.num_workers or 1, settings.join_timeout)
    found = require_slots(least, settings.num_workers or 1)
    is_one_per_node = not num_gpus and settings.cpus_per_worker is None
    num_fitting = len(found) if is_one_per_node else sum(found.values())
    num_workers = settings.num_workers or num_fitting
    if settings.cpus_per_worker is None:
        least = widest(num_workers, num_gpus=num_gpus)
    return num_workers, least


@click.command("infer", cls=SettingsCommand)
@click.argument("run", type=PATH)
@click.argument("images", type=PATH)
@click.argument("output", type=PATH, required=False)
@settings_options(InferLaunchConfig)
@settings_options(InferConfig, skip=["needs_gpu"])
def command(run: str, images: str, output: str | None, **options: Any) -> int:
    """Predict masks for one image or for a folder of images, on a Ray cluster.

    Writes the same masks as `flexunet infer`. RUN, IMAGES and OUTPUT (default: RUN/inference) are
    gs:// URLs, or folders that all nodes mount. The same command continues after a stop.
    """
    where = {name: options.pop(name) for name in InferLaunchConfig.model_fields}
    settings = from_options(InferLaunchConfig, where)
    needs_gpu = settings.gpus_per_worker > 0
    values = explicit_options(options)
    config = parse_settings(InferConfig, values | {"needs_gpu": needs_gpu}, "options", typed=values)
    target = output or join_url(run, "inference")
    reads = [run, *config.ensemble, open_images(images)[0].url]
    workers = functools.partial(process_workers, settings, reads, [target])
    with quiet_interrupts():
        result = infer(run, images, target, config, open_workers=workers)
    show_result(result, config)
    return 0
