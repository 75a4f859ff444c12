"""Says which values of a configuration identify a run, and reads those of runs of any version."""

import json
from collections.abc import Mapping
from typing import Any

from flexunet.errors import ContentError, UsageError
from flexunet.settings import fields_of, merged, validated
from job.config.train_config import PRESET_KEYS, TrainConfig

# Identity fields that came later, and what runs did that do not name them. The values are frozen: a
# new default changes none of them.
_LATER: dict[str, Any] = {
    "folds": None,
    "fold": None,
    "foreground_share": None,
    "schedule.warmup_epochs": 0.0,
    "schedule.cosine": False,
    "random_streams": 1,
}


def identity_of(config: TrainConfig, *, is_whole: bool = False) -> dict[str, Any]:
    """Returns the values that identify a run, by dotted path; JSON types only.

    A later field is left out where it says what runs did that were begun before it: they go on.

    Args:
        is_whole: leave nothing out.
    """
    values = json.loads(config.model_dump_json())
    identity = {}
    for path, field in fields_of(TrainConfig):
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("free"):
            continue
        value = values
        for part in path:
            value = value[part]
        name = ".".join(path)
        if is_whole or name not in _LATER or value != _LATER[name]:
            identity[name] = value
    return identity


def values_of_identity(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested values of the config that has this identity, see `identity_of`."""
    return _nested({**_LATER, **identity})


def preset_values(config: TrainConfig) -> dict[str, Any]:
    """Returns the nested values that `config` has wherever some preset sets one."""
    whole = identity_of(config, is_whole=True)
    return _nested({name: whole[name] for name in PRESET_KEYS})


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values by dotted path as groups of values."""
    values: dict[str, Any] = {}
    for name, value in flat.items():
        *groups, last = name.split(".")
        group = values
        for each in groups:
            group = group.setdefault(each, {})
        group[last] = value
    return values


def stored_options(identity: Any, values: Mapping[str, Any], run_url: str) -> dict[str, Any]:
    """Returns the options of a run that exists, as nested values.

    Args:
        identity: of the run, by dotted path; it wins over `values`.
        values: of its `config.yaml`; empty where it has none yet.
        run_url: named in the error.

    Raises:
        ContentError: they are no config, as they are damaged, or of a later version.
    """
    try:
        found = merged(merged(values_of_identity({}), values), values_of_identity(identity))
        validated(TrainConfig, found, run_url)
    except (UsageError, AttributeError, TypeError) as error:
        raise ContentError(
            f"{run_url}: its identity.json and config.yaml are no settings of this version "
            f"({error}); restore the files, or train with the version that wrote them"
        ) from error
    return found


def stored_config(values: Mapping[str, Any], where: str) -> TrainConfig:
    """Returns the config that a run has stored, all of its options written out.

    Args:
        values: of its `config.yaml`; one of an earlier version lacks options that came later.
        where: named in the error.

    Raises:
        UsageError: it is not a config.
    """
    return validated(TrainConfig, merged(values_of_identity({}), values), where)
