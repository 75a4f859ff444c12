"""Finds the options, datasets and protocols in which compared runs differ."""

from collections.abc import Mapping, Sequence
from typing import Any

from flexunet.json_files import read_json
from flexunet.settings import flat_values
from flexunet.storage import ObjectStore, open_store
from job.comparison.runs import ComparedRun, config_of
from job.config import TRACKER_OPTIONS
from job.evaluation.fold_pooling import protocol_of
from job.runs.layout import RESTORE

# They name a run, or change only what people see.
_NO_OPTIONS = {"name", "output", "progress", "tensorboard", "fold", *TRACKER_OPTIONS}


def different_options(runs: Sequence[ComparedRun]) -> dict[str, list[Any]]:
    """Returns the values of each option that differs, one per run; None: not recorded.

    The names of options are those of the config file, `optimizer.learning_rate`. Rows that start
    with "dataset: ", "evaluation: " or "environment: " are no options.
    """
    found = [_values(run) for run in runs]
    names = dict.fromkeys(name for values in found for name in values)
    rows = {name: [values.get(name) for values in found] for name in names}
    return {name: values for name, values in rows.items() if _differ(values)}


def _differ(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values[1:])


def _values(run: ComparedRun) -> dict[str, Any]:
    config = config_of(_config_store(run))
    options = {} if config is None else config.model_dump(mode="json")
    environment = read_json(_config_store(run), "environment.json", RESTORE) or {}
    values = {
        name: value
        for name, value in flat_values(options).items()
        if name.partition(".")[0] not in _NO_OPTIONS
    }
    values |= {f"dataset: {name}": value for name, value in _dataset(run, environment).items()}
    if run.summary is not None:
        protocol = protocol_of(run.summary)
        values |= {f"evaluation: {name}": value for name, value in protocol.items()}
    for name in ("replicas", "precision", "platform"):
        values[f"environment: {name}"] = environment.get(name)
    packages = environment.get("packages") or {}
    return values | {f"environment: {name}": text for name, text in packages.items()}


def _config_store(run: ComparedRun) -> ObjectStore:
    """Returns the folder of the run, or of the first fold of a cross-validation."""
    return run.store if run.summary is not None else open_store(f"{run.url}-fold-0")


def _dataset(run: ComparedRun, environment: Mapping[str, Any]) -> dict[str, Any]:
    manifest = run.manifest
    size = None if manifest is None else f"{manifest.image_width} x {manifest.image_height}"
    return {
        "network size": size,
        "geometry": None if manifest is None else manifest.geometry,
        "SHA-256": str(environment.get("dataset_sha256", ""))[:12] or None,
    }
