"""Reads what trackers have of a run, as their own programs do."""

from pathlib import Path
from typing import Any

from job.trackers.mlflow_run import mlflow_environment
from job.trackers.target import Target


def client_of(target: Target) -> Any:
    """Returns a client, within `mlflow_environment`."""
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=target.uri)


def only_run(target: Target) -> Any:
    """Returns the one run of the experiment of `target`."""
    client = client_of(target)
    experiment = client.get_experiment_by_name(target.experiment).experiment_id
    (found,) = client.search_runs([experiment])
    return client.get_run(found.info.run_id)


def values_of(target: Target, name: str) -> list[tuple[int, float]]:
    """Returns the (step, value) of a metric of the one run, in the order in which they came."""
    history = client_of(target).get_metric_history(only_run(target).info.run_id, name)
    return [(point.step, point.value) for point in history]


def tracked_values(folder: Path, experiment: str, name: str) -> list[tuple[int, float]]:
    """Returns `values_of` the one run in a folder of MLflow, which must be finished."""
    target = Target(str(folder), experiment)
    with mlflow_environment(target):
        assert only_run(target).info.status == "FINISHED"
        return values_of(target, name)


def steps_by_run(folder: Path) -> dict[str, dict[str, list[int]]]:
    """Returns the steps by run and tag, as TensorBoard itself loads them."""
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer

    multiplexer = EventMultiplexer(tensor_size_guidance={"tensors": 0})
    multiplexer.AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    found: dict[str, dict[str, list[int]]] = {}
    for name, tags in sorted(multiplexer.Runs().items()):
        for tag in tags["tensors"]:
            steps = [each.step for each in multiplexer.Tensors(name, tag)]
            found.setdefault(name, {})[tag] = steps
    return found
