"""Resolves the options of a run: command line over file over the run as it was begun."""

import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from flexunet.errors import UsageError
from flexunet.json_files import read_json
from flexunet.settings import deep_merge, flag_of, parse_settings, read_text, read_yaml
from flexunet.storage import NotFound, ObjectStore, join_url, open_store
from job.config import (
    PRESET_KEYS,
    TrainConfig,
    dotted_keys,
    identity_of,
    preset_values,
    stored_options,
)
from job.data.folds import fold_configs, is_cross_validation
from job.runs.layout import CROSS_VALIDATION_NAME, IDENTITY_NAME, RESTORE, run_url

logger = logging.getLogger(__name__)


def resolve_config(
    options: Mapping[str, Any],
    file: str | None,
    prep_options: Mapping[str, bool] | None = None,
    *,
    function: str | None = None,
) -> TrainConfig:
    """Returns the config of `file` with the options of the command line laid over it.

    A run that exists goes on as it was begun: what neither of them says is taken from its own
    `config.yaml`, whatever the defaults are by now.

    A file of the reference implementation (.config, .ini) is read as it is; when no dataset is
    given, its image folders are prepared first, beside the run, with `prep_options` as well.

    Args:
        function: of Python, whose keyword arguments the options are; errors then name them so.

    Raises:
        UsageError: no dataset, a value that is not allowed, or a preset that `file` overrules.
        ContentError: the image folders hold bad files or leaking splits.
    """
    from job.compat.ini_mapping import is_reference_config

    if file is not None and is_reference_config(file):
        return _resolve_reference(options, file, prep_options or {}, function)
    if prep_options:
        raise _nothing_to_prepare(prep_options)
    values = read_yaml(read_text(file), file) if file else {}
    if file is not None:
        _check_preset(options, values, file)
    config = _resolved(
        deep_merge(values, options),
        file or function or "options",
        options if function is None else None,
        lambda found: run_name(_data_of(found)),
    )
    _data_of(config)
    return _absolute(config)


def _data_of(config: TrainConfig) -> str:
    if config.data is None:
        raise UsageError("no dataset: give --data DATASET, a folder or gs:// URL made by prep")
    return config.data


def _resolved(
    values: Mapping[str, Any],
    where: str,
    options: Mapping[str, Any] | None,
    name_for: Callable[[TrainConfig], str],
) -> TrainConfig:
    """Returns the config of `values`; of a run that exists, what they do not say is as it was.

    Args:
        where: what the values came from, named in errors.
        options: those of them that were given on the command line; None: there is none.
        name_for: the name of a run for which `values` have none.
    """
    place = {name: values[name] for name in _PLACE if name in values}
    found = parse_settings(TrainConfig, place, where, typed=options)
    name = found.name or name_for(found)
    found = found.model_copy(update={"name": name})
    stored = _stored_values(found)
    _refuse_other_kind(found, is_new=stored is None)
    if stored is None:
        return parse_settings(TrainConfig, {**values, "name": name}, where, typed=options)
    given = {**values, "name": name}
    if "preset" in values:  # it says all that presets say
        preset = parse_settings(TrainConfig, {"preset": values["preset"]}, where, typed=options)
        given = deep_merge(preset_values(preset), given)
    config = parse_settings(TrainConfig, deep_merge(stored, given), where, typed=options)
    now, defaults = (
        {**identity_of(each, is_whole=True), "epochs": each.epochs}
        for each in (config, TrainConfig())
    )
    given_keys = dotted_keys(given)
    own = [
        f"{flag_of(key.split('.'))} {json.dumps(value)}"
        for key, value in now.items()
        if key not in given_keys and value != defaults[key]
    ]
    if own:
        logger.info("%s goes on as it was begun: %s", run_url(config), ", ".join(own))
    return config


# What says which run is meant.
_PLACE = ("data", "output", "name", "folds", "fold")


def _stored_values(place: TrainConfig) -> dict[str, Any] | None:
    """Returns the options of a run, or of a fold of it that exists, as values; None for a new run.

    Without the precision: `auto` is what the run was begun in, see `stored_precision`.

    Raises:
        ContentError: what the run has stored is damaged, or of a later version.
    """
    output, names = open_store(place.output), [str(place.name)]
    is_parent = is_cross_validation(place)
    if is_parent:
        names = [str(each.name) for each in fold_configs(place)]
    for run in map(output.subpath, names):
        identity = read_json(run, IDENTITY_NAME, RESTORE)
        if identity is None:
            continue
        values = stored_options(identity["config"], stored_yaml(run), run.url)
        for name in ("precision", "output", "name", *(["fold"] if is_parent else [])):
            values.pop(name, None)
        return values
    return None


def _refuse_other_kind(place: TrainConfig, *, is_new: bool) -> None:
    """Refuses a run in the folder of a cross-validation, and a cross-validation in that of a run.

    Each would replace the report of the other.

    Raises:
        UsageError: says which of the two it is.
    """
    output = open_store(place.output)
    run = output.subpath(str(place.name))
    if place.folds is None and is_new:
        first = output.subpath(f"{place.name}-fold-0")
        identity = read_json(first, IDENTITY_NAME, RESTORE)
        if identity is not None or run.stat(CROSS_VALIDATION_NAME) is not None:
            number = identity["config"].get("folds", "N") if identity else "N"
            raise UsageError(
                f"{run.url} is a cross-validation: give --folds {number} to go on with it, or "
                "another --name"
            )
    if is_cross_validation(place) and run.stat(IDENTITY_NAME) is not None:
        raise UsageError(f"{run.url} is a run, and no cross-validation; give another --name")


def stored_yaml(run: ObjectStore) -> dict[str, Any]:
    """Returns `config.yaml` of a run; empty where its first process has not come so far."""
    try:
        return read_yaml(run.get("config.yaml").decode(), f"{run.url}/config.yaml")
    except NotFound:
        return {}


def _absolute(config: TrainConfig) -> TrainConfig:
    """Returns `config` with paths that mean the same in every working folder."""
    paths = {}
    for name in ("data", "output", "cache_dir", "prediction_folder", "init_from"):
        value = getattr(config, name)
        if value is not None and "://" not in value:
            paths[name] = os.path.abspath(value)
    return config.model_copy(update=paths)


def _resolve_reference(
    options: Mapping[str, Any],
    file: str,
    prep_options: Mapping[str, bool],
    function: str | None,
) -> TrainConfig:
    from job.compat.ini_mapping import read_reference_config
    from job.compat.ini_prep import prepare_sources
    from job.compat.ini_reader import format_notes

    reference = read_reference_config(file)
    _check_preset(options, reference.train, file)
    from rich.console import Console

    Console(stderr=True).print(format_notes(reference.notes))
    folder = os.path.dirname(os.path.abspath(file))
    config = _resolved(
        deep_merge(reference.train, options),
        file,
        options if function is None else None,
        lambda found: run_name(found.data or folder),
    )
    name = str(config.name)
    if config.data is None:
        data = join_url(config.output, f"{name}-dataset")
        prepare_sources(reference.sources, {**reference.prep, **prep_options}, data, file)
        config = config.model_copy(update={"data": data})
    elif prep_options:
        raise _nothing_to_prepare(prep_options)
    return _absolute(config)


def _check_preset(options: Mapping[str, Any], values: Mapping[str, Any], file: str) -> None:
    """Refuses a preset of the command line where `file` would win over parts of it.

    Raises:
        UsageError: names the keys that are set in the file and not on the command line.
    """
    preset = options.get("preset")
    if preset in (None, values.get("preset", "reference")):
        return
    lost = sorted(PRESET_KEYS & dotted_keys(values) - dotted_keys(options))
    if lost:
        raise UsageError(
            f"--preset {preset} lies below {file}, which sets {', '.join(lost)}; take these out "
            "of the file, give them as options too, or leave --preset out"
        )


def _nothing_to_prepare(prep_options: Mapping[str, bool]) -> UsageError:
    flag = "--" + next(iter(prep_options)).replace("_", "-")
    return UsageError(
        f"{flag} is for a .config file without --data; give it to `flexunet prep` instead"
    )


def run_name(url: str) -> str:
    """Returns a run name made from the last part of `url`."""
    last = url.rstrip("/").rsplit("/", 1)[-1].lower()
    name = re.sub(r"[^a-z0-9]+", "-", last).strip("-")[:47].rstrip("-")
    return name if re.match(r"[a-z]", name) else f"run-{name}"[:47].rstrip("-")
