"""Selects the settings that identify a run, and reads settings stored by any version."""

import json
from collections.abc import Mapping
from typing import Any

from flexunet.errors import ContentError, UsageError
from flexunet.settings import deep_merge, fields_of, parse_settings
from job.config.presets import PRESET_KEYS
from job.config.train_config import TrainConfig

# Identity fields of later versions, each with the value that earlier versions used. The values
# are frozen: a new default does not change them.
_LATER: dict[str, Any] = {
    "folds": None,
    "fold": None,
    "foreground_share": None,
    "schedule.warmup_epochs": 0.0,
    "schedule.cosine": False,
    "random_streams": 1,
    "gradient_dtype": "float32",
    "hybrid_weights": [1.5, 0.5],
    "optimizer.ema_momentum": None,
    "foreground_share_end": None,
    "augmentation.preset": None,
    "augmentation.border": "black",
    "augmentation.scale_probability": 0.0,
    "augmentation.scale_range": [0.7, 1.4],
    "augmentation.crop_probability": 0.0,
    "augmentation.crop_range": [0.5, 1.0],
    "augmentation.crop_aspects": [0.75, 1.333],
    "augmentation.contrast_probability": 0.0,
    "augmentation.contrast_range": [0.75, 1.25],
    "augmentation.gamma_probability": 0.0,
    "augmentation.gamma_range": [0.7, 1.5],
    "augmentation.blur_probability": 0.0,
    "augmentation.blur_range": [0.5, 1.0],
    "augmentation.noise_probability": 0.0,
    "augmentation.noise_range": [0.0, 0.05],
    "model.max_filters": None,
    "model.residual_blocks": [1, 3, 4, 6],
    "model.deep_supervision": 0,
    "fit_postprocessing": False,
    "model.encoder": "efficientnet-lite0",
    "model.encoder_weights": "imagenet",
    "model.encoder_batch_norm": "auto",
    "model.encoder_frozen_epochs": 0,
    "optimizer.encoder_learning_rate_factor": 1.0,
}


def identity_of(config: TrainConfig, *, is_whole: bool = False) -> dict[str, Any]:
    """Returns the values that identify a run, by dotted path; JSON types only.

    A later field is left out while it has the value of earlier versions, so that runs of those
    versions resume.

    Args:
        is_whole: include all fields.
    """
    values = json.loads(config.model_dump_json())
    identity = {}
    for path, field in fields_of(TrainConfig):
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("not_identity"):
            continue
        value = values
        for part in path:
            value = value[part]
        name = ".".join(path)
        if is_whole or name not in _LATER or value != _LATER[name]:
            identity[name] = value
    return identity


def values_of_identity(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested config values of an identity, see `identity_of`."""
    return nested_values({**_LATER, **identity})


def preset_values(config: TrainConfig) -> dict[str, Any]:
    """Returns the nested values of `config` for all options that any preset sets."""
    whole = identity_of(config, is_whole=True)
    return nested_values({name: whole[name] for name in PRESET_KEYS})


def nested_values(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values by dotted path as nested groups."""
    values: dict[str, Any] = {}
    for name, value in flat.items():
        *groups, last = name.split(".")
        group = values
        for each in groups:
            group = group.setdefault(each, {})
        group[last] = value
    return values


def stored_options(identity: Any, values: Mapping[str, Any], run_url: str) -> dict[str, Any]:
    """Returns the options of an existing run as nested values.

    Args:
        identity: the run's identity by dotted path; overrides `values`.
        values: the run's `config.yaml`; empty if it has none yet.
        run_url: for the error message.

    Raises:
        ContentError: they are no config: damaged, or from a later version.
    """
    try:
        found = deep_merge(deep_merge(values_of_identity({}), values), values_of_identity(identity))
        parse_settings(TrainConfig, found, run_url)
    except (UsageError, AttributeError, TypeError) as error:
        raise ContentError(
            f"{run_url}: this version cannot read identity.json and config.yaml ({error}); restore "
            "the files, or train with the version that wrote them"
        ) from error
    return found


def stored_config(values: Mapping[str, Any], where: str) -> TrainConfig:
    """Returns the complete config that a run has stored.

    Args:
        values: the run's `config.yaml`; earlier versions lack later options.
        where: for the error message.

    Raises:
        UsageError: `values` are no config.
    """
    return parse_settings(TrainConfig, deep_merge(values_of_identity({}), values), where)
