"""The function that each worker on a Ray cluster runs: one process of the training."""

import os
from typing import Any

from job.config import TrainConfig
from job.distributed.rendezvous import process_spec_from_environment
from job.training.process import Placement, run_process
from job.training.setup import Callbacks
from launcher.channel import WorkerChannel
from launcher.cluster.resources import node_share


def work(settings: dict[str, Any]) -> dict[str, Any] | None:
    """Trains as one worker; returns the outcome, or None if all workers ended with an error.

    If only this worker has an error, it raises it: the other workers would wait forever.
    """
    spec = process_spec_from_environment()
    assert spec is not None  # noqa: S101 - Ray Train sets it
    config = TrainConfig.model_validate(settings["config"])
    if settings["num_gpus"] == 0:
        # Ray does not hide the GPUs of a node from a worker that asked for none.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with WorkerChannel(settings["coordinator"], spec.rank) as channel:
        try:
            return run_process(
                config,
                spec,
                Callbacks(channel.report, channel.should_stop),
                placement=Placement(
                    settings["launch"], settings["num_gpus"], node_share(settings["num_cpus"])
                ),
            )
        except Exception as error:
            if channel.is_shared(error, spec.size):
                return None
            raise
