"""Resolves the options of a run: command line over file over the stored run."""

import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from flexunet.errors import UsageError
from flexunet.json_files import read_json
from flexunet.settings import deep_merge, flag_of, parse_settings, read_text, read_yaml
from flexunet.storage import NotFound, ObjectStore, join_url, open_store
from job.config import (
    DATABRICKS,
    PRESET_KEYS,
    TrainConfig,
    dotted_keys,
    identity_of,
    preset_values,
    stored_options,
)
from job.data.folds import fold_configs, is_cross_validation
from job.planning.plan_file import PLANNED, explicit_values, read_plan
from job.runs.layout import CROSS_VALIDATION_NAME, IDENTITY_NAME, RESTORE, run_url

if TYPE_CHECKING:
    from data_prep.shards.manifest import Manifest
    from job.compat.ini_mapping import ReferenceConfig

logger = logging.getLogger(__name__)


def resolve_config(
    options: Mapping[str, Any],
    file: str | None,
    prep_options: Mapping[str, Any] | None = None,
    *,
    function: str | None = None,
) -> TrainConfig:
    """Returns the config of `file`, overridden by the options of the command line.

    An existing run keeps its options: those that neither gives are read from its `config.yaml`,
    whatever the defaults are now.

    A file of the reference implementation (.config, .ini) is accepted, too. Without a dataset, its
    image folders are prepared next to the run, with `prep_options`.

    Args:
        prep_options: values for PrepConfig.
        function: Python function whose keyword arguments are the options; for error messages.

    Raises:
        UsageError: no dataset, an invalid value, or a preset that conflicts with `file`.
        ContentError: the image folders have bad files or leaking splits.
    """
    from job.compat.ini_mapping import is_reference_config

    if file is not None and is_reference_config(file):
        return _resolve_reference(options, file, prep_options or {}, function)
    if prep_options:
        raise _nothing_to_prepare(prep_options, function)
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
        raise UsageError("no dataset: give --data DATASET, a folder or gs:// URL written by prep")
    return config.data


def _resolved(
    values: Mapping[str, Any],
    where: str,
    options: Mapping[str, Any] | None,
    name_for: Callable[[TrainConfig], str],
    new_preset: str = str(TrainConfig.model_fields["preset"].default),
) -> TrainConfig:
    """Returns the config of `values`; an existing run adds its stored options.

    Args:
        where: origin of the values, for error messages.
        options: values from the command line; None: there is no command line.
        name_for: returns the run name if `values` have none.
        new_preset: of a new run if `values` have none.
    """
    place = {name: values[name] for name in _PLACE if name in values}
    found = parse_settings(TrainConfig, place, where, typed=options)
    name = found.name or name_for(found)
    found = found.model_copy(update={"name": name})
    stored = _stored_values(found)
    _refuse_other_kind(found, is_new=stored is None)
    if stored is None:
        new = {"preset": new_preset, **values, "name": name}
        return parse_settings(TrainConfig, new, where, typed=options)
    given = {**values, "name": name}
    if values.get("preset") == "auto":
        _refuse_to_plan_again(stored, run_url(found))
    elif "preset" in values:  # an explicit preset sets all options of presets
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
        logger.info("%s keeps the options of its first start: %s", run_url(config), ", ".join(own))
    return config


def needs_plan(config: TrainConfig) -> bool:
    """Returns whether options of `config` are still to be planned.

    That of micro-batches does not count: it follows the workers of each attempt.
    """
    explicit = dotted_keys(explicit_values(config))
    return config.preset == "auto" and not explicit >= PLANNED - _OF_ATTEMPT


def begun_config(config: TrainConfig) -> TrainConfig:
    """Returns `config` with the stored options of its run, which another process has begun."""
    values, where = explicit_values(config), run_url(config)
    return _absolute(_resolved(values, where, None, lambda found: str(found.name)))


def _refuse_to_plan_again(stored: Mapping[str, Any], run: str) -> None:
    """Refuses `--preset auto` for a run of another preset.

    Raises:
        UsageError: names that preset.
    """
    if stored["preset"] != "auto":
        raise UsageError(
            f"--preset auto: {run} was started with --preset {stored['preset']}, and a run keeps "
            "its options; leave --preset out, or give another --name"
        )


_OF_ATTEMPT = frozenset({"accumulate", "precision"})  # an attempt may find its own value

_PATHS = (
    *("data", "output", "cache_dir", "prediction_folder", "init_from", "time_schedule"),
    "tracking_uri",
)

# Options that select the run.
_PLACE = ("data", "output", "name", "folds", "fold")


def _stored_values(place: TrainConfig) -> dict[str, Any] | None:
    """Returns the stored options of a run or of its first existing fold; None for a new run.

    Leaves out the precision: `auto` is the stored precision, see `stored_precision`.

    Raises:
        ContentError: the stored options are damaged, or from a later version.
    """
    output, names = open_store(place.output), [str(place.name)]
    is_parent = is_cross_validation(place)
    if is_parent:
        names = [str(each.name) for each in fold_configs(place)]
    for run in map(output.subpath, names):
        identity = read_json(run, IDENTITY_NAME, RESTORE)
        if identity is None:
            continue
        plan = read_plan(run)
        known: dict[str, Any] = {"preset": "reference" if plan is None else "auto"}
        known = deep_merge(known | (plan.values() if plan else {}), stored_yaml(run))
        values = stored_options(identity["config"], known, run.url)
        left_out = ["precision", "output", "name", *(["fold"] if is_parent else [])]
        if plan is not None and values.get("preset") == "auto" and plan.chose("accumulate"):
            left_out.append("accumulate")  # it follows the workers, see `settle.fit_to_workers`
        for name in left_out:
            values.pop(name, None)
        return values
    return None


def _refuse_other_kind(place: TrainConfig, *, is_new: bool) -> None:
    """Refuses a run in the folder of a cross-validation, and the reverse.

    Each would replace the report of the other.

    Raises:
        UsageError: names the kind of the existing folder.
    """
    output = open_store(place.output)
    run = output.subpath(str(place.name))
    if place.folds is None and is_new:
        first = output.subpath(f"{place.name}-fold-0")
        identity = read_json(first, IDENTITY_NAME, RESTORE)
        if identity is not None or run.stat(CROSS_VALIDATION_NAME) is not None:
            number = identity["config"].get("folds", "N") if identity else "N"
            raise UsageError(
                f"{run.url} is a cross-validation; give --folds {number} to resume it, or another "
                "--name"
            )
    if is_cross_validation(place) and run.stat(IDENTITY_NAME) is not None:
        raise UsageError(f"{run.url} is a single run, not a cross-validation; give another --name")


def stored_yaml(run: ObjectStore) -> dict[str, Any]:
    """Returns the values of a run's `config.yaml`; empty if not written yet."""
    try:
        return read_yaml(run.get("config.yaml").decode(), f"{run.url}/config.yaml")
    except NotFound:
        return {}


def _absolute(config: TrainConfig) -> TrainConfig:
    """Returns `config` with absolute paths."""
    paths: dict[str, Any] = {}
    for name in _PATHS:
        value = getattr(config, name)
        if value is None or "://" in value:
            continue
        if name == "tracking_uri":
            if value in DATABRICKS:
                continue
            value = value.removeprefix("file:")
        paths[name] = os.path.abspath(value)
    model = config.model
    if model.encoder_weights not in ("imagenet", "none"):
        weights = {"encoder_weights": os.path.abspath(model.encoder_weights)}
        paths["model"] = model.model_copy(update=weights)
    return config.model_copy(update=paths)


def _resolve_reference(
    options: Mapping[str, Any],
    file: str,
    prep_options: Mapping[str, Any],
    function: str | None,
) -> TrainConfig:
    from job.compat.ini_mapping import read_reference_config
    from job.compat.ini_prep import prep_config, prepare_sources, warn_of_other_size
    from job.compat.ini_reader import format_notes

    reference = read_reference_config(file)
    if options.get("preset") == "auto":
        raise UsageError(
            f"--preset auto: {file} sets all options as the reference implementation does, so "
            "nothing is planned; leave --preset or the file out"
        )
    _check_preset(options, reference.train, file)
    if options.get("progress", True) or function is None:
        from rich.console import Console

        Console(stderr=True).print(format_notes(reference.notes))
    for note in reference.notes:
        if note.problem:
            logger.warning("%s. Ignored: %s", note.problem, note.detail)
    folder = os.path.dirname(os.path.abspath(file))
    config = _resolved(
        deep_merge(reference.train, options),
        file,
        options if function is None else None,
        lambda found: run_name(found.data or folder),
        "reference",
    )
    own = _absolute(config.model_copy(update={"data": join_url(config.output, _own_name(config))}))
    is_own = "data" not in options and config.data in (None, own.data)
    if config.data is None or (is_own and prep_options):
        prep = prep_config(reference.prep, prep_options, file, is_typed=function is None)
        _check_can_prepare(reference, prep_options, file)
        manifest = prepare_sources(reference.sources, prep, str(own.data), file)
        _check_channels(own, manifest, file)
        return own
    if prep_options:
        raise _nothing_to_prepare(prep_options, function)
    if not is_own:
        warn_of_other_size(config.data, reference.prep, file)
    return _absolute(config)


def _own_name(config: TrainConfig) -> str:
    """Returns the folder of the dataset that is prepared for a run."""
    return f"{config.name}-dataset"


def _check_can_prepare(
    reference: "ReferenceConfig", prep_options: Mapping[str, Any], file: str
) -> None:
    """Refuses images and masks of `file` that would be read wrongly.

    Raises:
        UsageError: names the key.
    """
    model = reference.train["model"]
    if "classes" not in {*reference.prep, *prep_options} and model["num_classes"] > 2:
        raise UsageError(
            f"{file}: mask.rgb_map is missing; add {{(r,g,b): class, ...}} with the colours of the "
            f"{model['num_classes']} classes, or give --classes. The reference implementation "
            "would use the colours of an example, without a message"
        )


def _check_channels(config: TrainConfig, manifest: "Manifest", file: str) -> None:
    """Refuses images of fewer channels than `file` asks for; grey can become RGB.

    Raises:
        UsageError: names both numbers.
    """
    wanted, found = config.model.image_channels, manifest.channels
    if wanted is not None and found != wanted and (found, wanted) != (1, 3):
        raise UsageError(
            f"{file}: model.image_channels = {wanted}, but the images have {found} "
            f"channel{'s' if found > 1 else ''}; change the key or the images"
        )


def _check_preset(options: Mapping[str, Any], values: Mapping[str, Any], file: str) -> None:
    """Refuses a preset of the command line if `file` would override parts of it.

    Raises:
        UsageError: names the keys that only the file sets.
    """
    preset = options.get("preset")
    # With auto, all values of the file count as given, and the plan is made around them.
    if preset in (None, "auto", values.get("preset", "reference")):
        return
    lost = sorted(PRESET_KEYS & dotted_keys(values) - dotted_keys(options))
    if lost:
        raise UsageError(
            f"--preset {preset}: {file} would override it, since it sets {', '.join(lost)}; remove "
            "these from the file, give them as options, too, or leave --preset out"
        )


def _nothing_to_prepare(prep_options: Mapping[str, Any], function: str | None) -> UsageError:
    name = next(iter(prep_options))
    flag = flag_of(["prep", name] if name in TrainConfig.model_fields else [name])
    if function is not None and name not in ("skip_bad", "allow_leaks"):
        flag = f"prep={{'{name}': ...}}"
    return UsageError(
        f"{flag} needs a .config file without --data; give it to `flexunet prep` instead"
    )


def run_name(url: str) -> str:
    """Returns a valid run name made from the last part of `url`."""
    last = url.rstrip("/").rsplit("/", 1)[-1].lower()
    name = re.sub(r"[^a-z0-9]+", "-", last).strip("-")[:47].rstrip("-")
    return name if re.match(r"[a-z]", name) else f"run-{name}"[:47].rstrip("-")
