"""Chooses how masks are read where the user gives no options, once for the whole dataset.

A dataset that exists keeps the choice that it was made with. For a new one the choice follows from
a sample of its masks; where that is not certain, the user has to choose.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from data_prep.choices.command_line import prep_command
from data_prep.config import PrepConfig
from data_prep.masks.color_map import (
    EARLIER_CLASSES,
    FIRST_CLASS,
    parse_color_map,
    parse_ignored,
)
from data_prep.masks.decision.decide import GivenOptions, MaskDecision, decide_masks
from data_prep.masks.decision.findings import Reading
from data_prep.masks.statistics import MaskStatistics
from data_prep.shards.manifest import MANIFEST_NAME, MaskChoice, read_manifest
from data_prep.shards.output import read_plan
from flexunet.errors import UsageError
from flexunet.settings import parse_settings
from flexunet.storage import ObjectStore
from flexunet.text import pluralize

logger = logging.getLogger(__name__)

NAMES = ("classes", "mask_encoding", "ignore")
_UNSET: dict[str, Any] = {"classes": None, "mask_encoding": "auto", "ignore": None}
# Until the choice was made for the whole dataset, each mask was read by itself.
_EARLIER: dict[str, Any] = {"classes": EARLIER_CLASSES, "mask_encoding": "auto", "ignore": None}
_MAX_SHOWN = 4  # candidates in an error


@dataclass(frozen=True)
class Existing:
    """The options of a dataset that exists, or of a preparation that was interrupted.

    Attributes:
        url: where it is.
        options: its identity.
        choice: how its masks are read by choice of `prep`; None: an earlier version made it, or
            the user gave all options.
    """

    url: str
    options: Mapping[str, Any]
    choice: MaskChoice | None


def existing_options(store: ObjectStore) -> Existing | None:
    """Returns the options of the dataset in `store`, finished or interrupted; None if it is new."""
    if store.stat(MANIFEST_NAME) is not None:
        manifest, _ = read_manifest(store)
        return Existing(store.url, manifest.options, manifest.mask_choice)
    plan = read_plan(store)
    if not plan:
        return None
    choice = plan.get("mask_choice")
    return Existing(
        store.url, plan.get("options", {}), choice and MaskChoice.model_validate(choice)
    )


@dataclass(frozen=True)
class CommandPaths:
    """The source and the output of a `prep` command."""

    source: str
    output: str


def choose_mask_options(
    config: PrepConfig,
    existing: Existing | None,
    read_sample: Callable[[], MaskStatistics],
    paths: CommandPaths | None = None,
) -> tuple[PrepConfig, MaskChoice | None]:
    """Returns the options with those about masks, and what was chosen; None: all are given.

    Args:
        existing: a dataset that this command continues.
        read_sample: reads a sample of the masks; not called if all options are known.
        paths: for the commands in an error.

    Raises:
        UsageError: the masks have several readings, and the user has to choose one; or an option
            of the existing dataset is missing.
    """
    unset = [name for name in NAMES if getattr(config, name) == _UNSET[name]]
    # If all classes and their encoding are given, pixels are ignored only on demand.
    if config.format != "pairs" or not set(unset) - {"ignore"}:
        return config, None
    if existing is not None:
        return _with(config, _stored(existing, unset)), existing.choice
    masks = read_sample()
    decision = decide_masks(masks, given_options(config))
    if decision.reading is None:
        raise _undecided(config, decision, masks, paths)
    chosen = {name: getattr(decision.reading, _FIELDS[name]) for name in unset}
    result = _with(config, chosen)
    logger.info(
        "masks: read as %s%s, %s: %s (%s read); options that you give win",
        result.mask_encoding,
        "" if result.ignore is None else f", {result.ignore} ignored",
        result.classes,
        "; ".join(decision.evidence),
        pluralize(masks.num_files, "mask"),
    )
    choice = MaskChoice(decided=tuple(unset), evidence=decision.evidence, num_files=masks.num_files)
    return result, choice


_FIELDS = {"classes": "classes", "mask_encoding": "encoding", "ignore": "ignore"}


def given_options(config: PrepConfig) -> GivenOptions:
    """Returns the options about masks that the user gives."""
    return GivenOptions(
        encoding=config.mask_encoding,
        classes=None if config.classes is None else parse_color_map(config.classes),
        ignored=None if config.ignore is None else parse_ignored(config.ignore.split(";")),
        ignore_id=config.ignore_id,
        background=None if config.background == FIRST_CLASS else config.background,
    )


def _with(config: PrepConfig, options: Mapping[str, Any]) -> PrepConfig:
    values = {**config.model_dump(exclude_unset=True), **options}
    return parse_settings(type(config), values, "prep options")


def _stored(existing: Existing, unset: Collection[str]) -> dict[str, Any]:
    """Returns the values of unset options in an existing dataset."""
    if existing.choice is None:
        return {name: _EARLIER[name] for name in unset}
    decided = existing.choice.decided
    for name in unset:
        value = existing.options.get(name, _UNSET[name])
        if name not in decided and value != _UNSET[name]:
            raise UsageError(
                f"{existing.url}: was made with --{name.replace('_', '-')} {value}; give it again, "
                "or choose another folder"
            )
    return {name: existing.options.get(name, _UNSET[name]) for name in unset}


def _undecided(
    config: PrepConfig,
    decision: MaskDecision,
    masks: MaskStatistics,
    paths: CommandPaths | None,
) -> UsageError:
    """Logs the commands to choose from; returns the error."""
    for reading in decision.candidates:
        command = _command(config, reading, paths)
        logger.warning("if %s:\n  %s", reading.meaning, command)
    found = f"{'; '.join(decision.evidence)} ({pluralize(masks.num_files, 'mask')} read)"
    if not decision.candidates:
        return UsageError(
            f"the masks have no clear reading: {found}; replace the files, or give --mask-encoding "
            "and --classes"
        )
    choices = " or ".join(each.arguments() for each in decision.candidates[:_MAX_SHOWN])
    return UsageError(f"the masks have several readings: {found}; give {choices}")


def _command(config: PrepConfig, reading: Reading, paths: CommandPaths | None) -> str:
    if paths is None:
        return f"give {reading.arguments()}"
    options = config.model_dump(exclude_unset=True) | reading.options
    return prep_command(paths.source, paths.output, options)
