"""Defines the presets of `TrainConfig`: sets of defaults, and what `auto` leaves to a plan."""

from collections.abc import Mapping
from typing import Any

from flexunet.settings import Settings

_RECIPE: dict[str, Any] = {
    "model": {"normalization": "group"},
    "loss": {"name": "ce_dice"},
    "optimizer": {"name": "adamw", "learning_rate": 1e-3, "clipvalue": None, "clipnorm": 1.0},
    "schedule": {
        "reduce_on_plateau": False,
        "early_stopping_patience": 0,
        "warmup_epochs": 1.0,
        "cosine": True,
    },
    "foreground_share": 0.5,
}
# Defaults of all other options. The defaults of "reference" are the training of the reference
# implementation; benchmarks/recipe.py compares the recipe with it. Those of "auto" are planned from
# the dataset, see job/planning.
PRESETS: dict[str, dict[str, Any]] = {"auto": {}, "reference": {}, "recipe": _RECIPE}


def dotted_keys(values: Mapping[str, Any], prefix: str = "") -> set[str]:
    """Returns the dotted keys of nested `values`."""
    found: set[str] = set()
    for key, value in values.items():
        name = f"{prefix}{key}"
        found |= dotted_keys(value, f"{name}.") if isinstance(value, Mapping) else {name}
    return found


PRESET_KEYS = frozenset().union(*map(dotted_keys, PRESETS.values()))


def companions(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values that let explicit options pass the checks before the others are planned."""
    found: dict[str, Any] = {}
    if isinstance(values.get("accumulate"), int):
        found["global_batch_size"] = values["accumulate"]
    if isinstance(values.get("foreground_share_end"), int | float):
        found["foreground_share"] = max(0.5, values["foreground_share_end"])
    schedule, model = (values.get(name) or {} for name in ("schedule", "model"))
    if isinstance(schedule, Mapping) and schedule.get("cosine"):
        found["schedule"] = {"reduce_on_plateau": False}
    if isinstance(model, Mapping) and {"dropout_rate", "deep_supervision"} & set(model):
        found["model"] = {"num_layers": 2 + int(model.get("deep_supervision") or 0)}
    return found


def unset(settings: Settings, base: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Marks the fields of `base` that are not in `values` as not set."""
    for name, value in base.items():
        if name not in values:
            settings.__pydantic_fields_set__.discard(name)
        elif isinstance(value, Mapping) and isinstance(values[name], Mapping):
            unset(getattr(settings, name), value, values[name])
