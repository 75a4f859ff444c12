"""Finds folders and pairs of a source like `prep`, and what is possible where `prep` would stop.

Reads names only. Where a source has several readings, the likeliest one is inspected further, and
the others are listed.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.config import PrepConfig
from data_prep.prep_input import sources_of
from data_prep.sources import inbreast
from data_prep.sources.folder_patterns import FolderOptions, choose_folders
from data_prep.sources.layout import SPLIT_WORDS, FolderPair, Folders, possible_pairs
from data_prep.sources.listings import Listings
from data_prep.sources.name_rules import NameRule, SeveralRules
from data_prep.sources.pairs import PairedFiles, PairOptions, Source, pair_sources
from data_prep.sources.source_folders import all_folders, as_sources
from flexunet.errors import ContentError, FlexUNetError, UsageError
from flexunet.settings import parse_settings
from flexunet.storage import folder_problem, open_store
from flexunet.text import pluralize

_LAYOUT_OPTIONS = ("images", "masks", "field_of_view")
_GENERIC = ("mask", "masks")  # beside a more specific folder, often a field of view
_MAX_READINGS = 8


@dataclass(frozen=True)
class Reading:
    """A possible layout.

    Attributes:
        text: how it differs from the others, for the user.
        options: of `prep`, that select it.
        num_pairs: images with a mask.
    """

    text: str
    options: Mapping[str, Any]
    num_pairs: int


@dataclass(frozen=True)
class FoundLayout:
    """The layout that is inspected.

    Attributes:
        given: the options of `prep` that the user gave, and a format that was found.
        options: the same, and those of the inspected reading.
        sources, paired: its folders and pairs.
        problem: why `prep` would stop without more options; None if it would not.
        readings: the possible layouts if there is a problem, the inspected one first; empty if
            none is possible.
    """

    given: Mapping[str, Any]
    options: Mapping[str, Any]
    sources: tuple[Source, ...] = ()
    paired: PairedFiles | None = None
    problem: str | None = None
    readings: tuple[Reading, ...] = ()

    @property
    def config(self) -> PrepConfig:
        """The options as those of `prep`."""
        return parse_settings(PrepConfig, dict(self.options), "inspect options")


def find_layout(source: str, options: Mapping[str, Any], listings: Listings) -> FoundLayout:
    """Returns the layout of `source`, as `prep` would find it with `options`.

    Raises:
        UsageError: `source` does not exist, or an option is wrong.
        StorageError: it cannot be listed.
    """
    url = open_store(source).url
    if problem := folder_problem(open_store(source)):
        raise UsageError(f"{url}: {problem}; give the folder that contains the source")
    layout = FoundLayout(options, options)
    config = layout.config
    is_given = any(options.get(name) is not None for name in (*_LAYOUT_OPTIONS, "format"))
    try:
        sources = sources_of(source, config, listings)
    except UsageError as error:
        if not is_given and inbreast.is_release(source, listings):
            return find_layout(source, {**options, "format": "inbreast"}, listings)
        readings = [] if is_given else _folder_readings(url, layout, listings)
        return _with_readings(layout, str(error), readings)
    try:
        return dataclasses.replace(
            layout, sources=sources, paired=_paired(sources, config, listings)
        )
    except SeveralRules as error:
        found = [_name_reading(layout, sources, rule, listings) for rule, _ in error.rules]
        return _with_readings(layout, str(error), [each for each in found if each is not None])
    except (ContentError, UsageError) as error:
        return dataclasses.replace(layout, sources=sources, problem=str(error))


_Readable = tuple[Reading, FoundLayout]


def _with_readings(layout: FoundLayout, problem: str, readings: Sequence[_Readable]) -> FoundLayout:
    """Returns the first of `readings`, with the others beside it."""
    if not readings:
        return dataclasses.replace(layout, problem=problem)
    _, first = readings[0]
    listed = tuple(reading for reading, _ in readings[:_MAX_READINGS])
    return dataclasses.replace(first, problem=problem, readings=listed)


def _paired(sources: Sequence[Source], config: PrepConfig, listings: Listings) -> PairedFiles:
    if config.format == "inbreast":
        pairs, rejects = inbreast.find_cases(sources, listings)
        return PairedFiles(tuple(pairs), tuple(rejects), None)
    options = PairOptions(config.image_name, config.mask_name, config.missing_mask)
    return pair_sources(sources, listings, options)


def _name_reading(
    layout: FoundLayout, sources: Sequence[Source], rule: NameRule, listings: Listings
) -> _Readable | None:
    image, mask = rule.patterns
    options = {"mask_name": mask} | ({} if image is None else {"image_name": image})
    return _reading(layout, rule.as_options(), options, sources, listings)


def _folder_readings(url: str, layout: FoundLayout, listings: Listings) -> list[_Readable]:
    """Returns the layouts that folder names allow, the likeliest first."""
    try:
        folders = all_folders(url, listings)
    except UsageError:  # too many files
        return []
    found = []
    for pairs in _selections(folders):
        options, chosen = _options_of(folders, pairs)
        text = f"images in {options['images']}, masks in {options['masks']}"
        reading = _reading(layout, text, options, as_sources(url, chosen), listings)
        if reading is not None:
            found.append(reading)
    found.sort(key=lambda each: (-each[0].num_pairs, _is_generic(each[0].options["masks"])))
    return [*_with_views(url, folders, layout, found, listings), *found]


def _selections(folders: Folders) -> Iterator[list[FolderPair]]:
    """Yields the pairs of folders that patterns can select together, or single ones."""
    by_pattern: dict[tuple[str, str], list[FolderPair]] = {}
    for pair in possible_pairs(folders):
        key = _without_split(pair.images), _without_split(pair.masks)
        by_pattern.setdefault(key, []).append(pair)
    for pairs in by_pattern.values():
        if len(pairs) > 1 and _can_select(folders, pairs):
            yield pairs
        else:
            yield from ([pair] for pair in pairs)


def _without_split(path: str) -> str:
    parts = ("*" if part.lower() in SPLIT_WORDS else part for part in path.split("/"))
    return "/".join(parts)


def _can_select(folders: Folders, pairs: Sequence[FolderPair]) -> bool:
    options = FolderOptions(_without_split(pairs[0].images), _without_split(pairs[0].masks))
    try:
        found = choose_folders(folders, options)
    except UsageError:
        return False
    chosen = {(each.images, each.masks) for each in found or ()}
    return chosen == {(each.images, each.masks) for each in pairs}


def _options_of(
    folders: Folders, pairs: Sequence[FolderPair]
) -> tuple[dict[str, Any], tuple[FolderPair, ...]]:
    """Returns the options that select `pairs`, and what `prep` makes of them."""
    images, masks = pairs[0].images or ".", pairs[0].masks or "."
    if len(pairs) > 1:
        images, masks = _without_split(images), _without_split(masks)
    # On a command line, none unsets the option.
    images, masks = (f"./{each}" if each == "none" else each for each in (images, masks))
    chosen = choose_folders(folders, FolderOptions(images, masks))
    return {"images": images, "masks": masks}, chosen or ()


def _reading(
    layout: FoundLayout,
    text: str,
    options: Mapping[str, Any],
    sources: Sequence[Source],
    listings: Listings,
) -> _Readable | None:
    """Returns the layout with more options, None if no files are paired then."""
    found = dataclasses.replace(layout, options={**layout.options, **options})
    try:
        paired = _paired(sources, found.config, listings)
    except FlexUNetError:
        return None
    number = len(paired.pairs)
    if not number:
        return None
    reading = Reading(f"{text}: {pluralize(number, 'pair')}", options, number)
    return reading, dataclasses.replace(found, sources=tuple(sources), paired=paired)


def _with_views(
    url: str,
    folders: Folders,
    layout: FoundLayout,
    readings: Sequence[_Readable],
    listings: Listings,
) -> list[_Readable]:
    """Returns a reading with the second folder of masks as field of view, if there are two."""
    if len(readings) != 2 or not _is_generic(readings[1][0].options["masks"]):
        return []
    first, second = (reading.options for reading, _ in readings)
    if first["images"] != second["images"]:
        return []
    options = {**first, "field_of_view": second["masks"]}
    try:
        chosen = choose_folders(folders, FolderOptions(**options)) or ()
    except UsageError:
        return []
    text = (
        f"images in {first['images']}, masks in {first['masks']}, and {second['masks']} is the "
        "field of view"
    )
    found = _reading(layout, text, options, as_sources(url, chosen), listings)
    return [] if found is None else [found]


def _is_generic(path: str) -> bool:
    return path.rpartition("/")[2].lower() in _GENERIC
