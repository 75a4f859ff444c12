"""Chooses how masks are read where the user gives no options, once for the whole dataset.

A dataset that exists keeps the choice that it was made with. For a new one the choice follows from
a sample of its masks; where that is not certain, the user has to choose.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.choices.command_line import prep_command
from data_prep.config import PrepConfig, identity_of
from data_prep.masks.class_names import VOC_COLORS
from data_prep.masks.color_map import (
    EARLIER_CLASSES,
    FIRST_CLASS,
    Color,
    Palette,
    parse_color_map,
    parse_ignored,
)
from data_prep.masks.decision.decide import GivenOptions, MaskDecision, decide_masks
from data_prep.masks.decision.findings import Reading
from data_prep.masks.rules import Encoding
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
_BLACK: Color = (0, 0, 0)
_MAX_SHOWN = 4  # candidates in an error


@dataclass(frozen=True)
class Existing:
    """The options of a dataset that exists, or of a preparation that was interrupted.

    Attributes:
        url: where it is.
        options: its identity.
        choice: how its masks are read by choice of `prep`; None: an earlier version made it, or
            the user gave all options.
        is_finished: the dataset is complete.
    """

    url: str
    options: Mapping[str, Any]
    choice: MaskChoice | None
    is_finished: bool = True

    @property
    def read_each_mask_by_itself(self) -> bool:
        """Whether an earlier version made it, which did not decide once for all masks."""
        return self.choice is None and self.options.get("mask_encoding", "auto") == "auto"

    def is_made_by(self, config: PrepConfig) -> bool:
        """Returns whether these options make this dataset, if the source is the same."""
        return identity_of(config) == dict(self.options)


def existing_options(store: ObjectStore) -> Existing | None:
    """Returns the options of the dataset in `store`, finished or interrupted; None if it is new."""
    if store.stat(MANIFEST_NAME) is not None:
        manifest, _ = read_manifest(store)
        return Existing(store.url, manifest.options, manifest.mask_choice)
    plan = read_plan(store)
    if not plan:
        return None
    choice = plan.get("mask_choice")
    options = plan.get("options", {})
    found = choice and MaskChoice.model_validate(choice)
    return Existing(store.url, options, found, is_finished=False)


@dataclass(frozen=True)
class CommandPaths:
    """The source and the output of a `prep` command."""

    source: str
    output: str


@dataclass(frozen=True)
class MaskChecks:
    """What all masks must have: classes in `encoding`, and palettes with the same colours."""

    encoding: Encoding
    palette: Palette


@dataclass(frozen=True)
class ChosenMasks:
    """How the masks of a dataset are read.

    Attributes:
        config: the options of `prep`, with those about masks.
        choice: what `prep` decided; None: all options are given, or an earlier version began.
        checked: what masks must have that an earlier version began to read, each by itself. None:
            `config` and `choice` say it.
        is_new: the choice was made now. A stored one of an earlier version has no palette.
    """

    config: PrepConfig
    choice: MaskChoice | None = None
    checked: MaskChecks | None = None
    is_new: bool = False

    @property
    def encoding(self) -> Encoding:
        """What carries the classes in each file."""
        return self.config.file_encoding if self.checked is None else self.checked.encoding

    @property
    def palette(self) -> Palette:
        """Indices of palettes, and the colours that all masks must have there.

        Empty if the user says what carries the classes, or if it is not known. Level 0 of grey
        masks is black.
        """
        if self.encoding != "index" or not (self.checked or self._is_encoding_decided):
            return ()
        found = self.checked or self.choice
        black: Palette = ((0, _BLACK),) if self.checked or self.is_new else ()
        return (found and found.palette) or black

    @property
    def _is_encoding_decided(self) -> bool:
        return self.choice is not None and "mask_encoding" in self.choice.decided


Samples = Callable[[], Iterable[MaskStatistics]]
"""Reads masks: yields the statistics of a sample, and then, if more are asked for, of all."""


def choose_mask_options(
    config: PrepConfig,
    existing: Existing | None,
    samples: Samples,
    paths: CommandPaths | None = None,
) -> ChosenMasks:
    """Returns how the masks are read: by given options, by an existing dataset, or by the masks.

    Args:
        existing: a dataset that this command continues.
        samples: not called if all options are known.
        paths: for the commands in an error.

    Raises:
        UsageError: the masks have several readings, and the user has to choose one; or an option
            of the existing dataset is missing.
    """
    unset = [name for name in NAMES if getattr(config, name) == _UNSET[name]]
    if config.format != "pairs":
        return ChosenMasks(config)
    # If all classes and their encoding are given, pixels are ignored only on demand.
    if not set(unset) - {"ignore"}:
        is_same = existing is not None and existing.is_made_by(config)
        return ChosenMasks(config, existing.choice if existing is not None and is_same else None)
    if existing is None:
        return _newly_chosen(config, unset, samples, paths)
    if existing.read_each_mask_by_itself:
        return _as_begun_earlier(config, existing, unset, samples)
    return _as_in(config, existing, unset, samples)


def _newly_chosen(
    config: PrepConfig, unset: Sequence[str], samples: Samples, paths: CommandPaths | None
) -> ChosenMasks:
    """Returns how the masks of a new dataset are read."""
    masks, decision = _decide(config, samples)
    if decision.reading is None:
        raise _undecided(config, decision, masks, paths)
    result = _with_reading(config, unset, decision.reading)
    logger.info(
        "masks: read as %s%s, %s: %s (%s read); options that you give win",
        result.mask_encoding,
        "" if result.ignore is None else f", {result.ignore} ignored",
        result.classes,
        "; ".join(decision.evidence),
        pluralize(masks.num_files, "mask"),
    )
    choice = MaskChoice(
        decided=tuple(unset),
        evidence=decision.evidence,
        num_files=masks.num_files,
        palette=palette_of(masks, decision.reading),
    )
    return ChosenMasks(result, choice, is_new=True)


def _as_in(
    config: PrepConfig, existing: Existing, unset: Sequence[str], samples: Samples
) -> ChosenMasks:
    """Returns how the masks of an existing dataset are read.

    An option that the user gave then and not now must follow from the masks.
    """
    stored = {name: existing.options.get(name, _UNSET[name]) for name in unset}
    decided = () if existing.choice is None else existing.choice.decided
    missing = [name for name in unset if name not in decided and stored[name] != _UNSET[name]]
    if not missing:
        return ChosenMasks(_with(config, stored), existing.choice)
    reading = _decide(config, samples)[1].reading
    if reading is not None:
        result = _with_reading(config, unset, reading)
        if existing.is_made_by(result):
            return ChosenMasks(result, existing.choice)
    raise _not_given_again(existing, missing[0])


def _not_given_again(existing: Existing, name: str) -> UsageError:
    return UsageError(
        f"{existing.url}: was made with --{name.replace('_', '-')} {existing.options[name]}; give "
        "it again, or choose another folder"
    )


def _as_begun_earlier(
    config: PrepConfig, existing: Existing, unset: Sequence[str], samples: Samples
) -> ChosenMasks:
    """Returns how masks are read for what a version began that read each mask by itself.

    A finished dataset stays as it is. An interrupted one is finished only if the decision for all
    masks has the same meaning.
    """
    begun = _with(config, {name: _EARLIER[name] for name in unset})
    if existing.is_finished:
        return ChosenMasks(begun)
    for name in unset:
        if existing.options.get(name, _UNSET[name]) not in (_EARLIER[name], _UNSET[name]):
            raise _not_given_again(existing, name)
    masks, decision = _decide(config, samples)
    found, reading = "; ".join(decision.evidence), decision.reading
    if reading is None or not _has_meaning_of(begun, reading, masks):
        now = "have several readings" if reading is None else f"are read as {reading.arguments()}"
        raise UsageError(
            f"{existing.url}: an earlier version was interrupted here, which read each mask by "
            f"itself, with --classes {begun.classes}; now the masks {now}: {found}; delete the "
            "folder and run the same command, or choose another folder"
        )
    logger.info(
        "%s: an earlier version began with --classes %s, which these masks have: %s; going on",
        existing.url,
        begun.classes,
        found,
    )
    encoding: Encoding = "auto" if reading.encoding == "mixed" else reading.encoding
    return ChosenMasks(begun, checked=MaskChecks(encoding, palette_of(masks, reading)))


def _has_meaning_of(begun: PrepConfig, reading: Reading, masks: MaskStatistics) -> bool:
    """Returns whether a reading gives the ids that each mask had by itself.

    Earlier versions read palettes by their colours.
    """
    classes, found = begun.color_map, parse_color_map(reading.classes)
    if reading.encoding not in ("index", "colour", "mixed") or reading.ignore != begun.ignore:
        return False
    if reading.encoding == "index":
        by_color = {entry.color: entry.id for entry in classes}
        is_alike = all(by_color.get(color) == i for i, color in masks.palette.items())
        return is_alike and len(found) == len(classes)
    return [entry.color for entry in found] == [entry.color for entry in classes]


def _decide(config: PrepConfig, samples: Samples) -> tuple[MaskStatistics, MaskDecision]:
    """Returns the decision from a sample; if that is not certain, from all masks."""
    given = given_options(config)
    masks, decision = MaskStatistics(), decide_masks(MaskStatistics(), given)
    for masks in samples():
        decision = decide_masks(masks, given)
        if decision.is_certain:
            break
    return masks, decision


def palette_of(masks: MaskStatistics, reading: Reading) -> Palette:
    """Returns the colours that palettes must have, if their indices are the class ids."""
    if reading.encoding != "index":
        return ()
    known = dict(masks.palette)
    if masks.num_voc and masks.num_voc == masks.kinds["palette"]:
        known = {**dict(enumerate(VOC_COLORS)), **known}
    return tuple(sorted(known.items()))


def _with_reading(config: PrepConfig, unset: Sequence[str], reading: Reading) -> PrepConfig:
    return _with(config, {name: getattr(reading, _FIELDS[name]) for name in unset})


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
