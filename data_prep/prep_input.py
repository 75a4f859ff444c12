"""Finds the pairs of a source with their groups and names, and the files to reject.

Reads listings and tables only, before any image is read.
"""

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Sequence

from data_prep.config import PrepConfig
from data_prep.hidden_names import dataset_name, hidden, hidden_name, without_name
from data_prep.shards.source_pairs import File, SourcePair
from data_prep.sources import inbreast
from data_prep.sources.listings import Listings
from data_prep.sources.pairs import (
    FolderOptions,
    Pair,
    PairOptions,
    Reject,
    Source,
    find_pairs,
    find_sources,
)
from data_prep.splits import groups
from flexunet.errors import ContentError, StorageError, UsageError
from flexunet.settings import read_text
from flexunet.storage import (
    ObjectStore,
    folder_problem,
    is_subpath,
    join_url,
    open_store,
)
from flexunet.text import legible, pluralize

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PrepInput:
    """The input of a preparation.

    Attributes:
        name: name of the dataset.
        wanted_splits: ready-made splits that need at least one usable pair each.
        refused: (file, reason) of the files without a pair, with names as the report shows them.
    """

    name: str
    wanted_splits: frozenset[str]
    items: tuple[SourcePair, ...]
    refused: tuple[tuple[str, str], ...]


def sources_of(
    source: str, config: PrepConfig, listings: Listings | None = None
) -> tuple[Source, ...]:
    """Returns the folders with the images and masks of `source`.

    Args:
        listings: of the command, which lists the same folders later.

    Raises:
        UsageError: a folder is missing or empty.
    """
    url = open_store(source).url
    problem = folder_problem(open_store(source))
    if problem:
        raise UsageError(f"{url}: {problem}; give the folder that contains the source")
    listings = listings or Listings()
    if config.format == "inbreast":
        return inbreast.find_release(source, listings)
    try:
        options = FolderOptions(config.images, config.masks, config.field_of_view)
        return find_sources(source, listings, options)
    except UsageError as error:
        if (config.images, config.masks, config.field_of_view) != (None, None, None):
            raise
        if not inbreast.is_release(source, listings):
            raise
        raise UsageError(
            f"{url}: has no images/ and masks/, but looks like INbreast; give --format inbreast"
        ) from error


def collect_input(
    sources: Sequence[Source],
    output: ObjectStore,
    config: PrepConfig,
    listings: Listings,
) -> PrepInput:
    """Returns the items of `sources`, sorted by id, and the rejected files.

    Raises:
        UsageError: a source is missing or empty, or contains the output; or --group-regex or
            --group-preset fits no name.
        ContentError: a file has no pair and `config.skip_bad` is off; or --group-csv has none of
            the files.
    """
    _refuse_overlap(output, sources)
    _check_draw_valid(sources, config)
    if config.format == "inbreast":
        pairs, rejects = inbreast.find_cases(sources, listings)
    else:
        options = PairOptions(config.image_name, config.mask_name, config.missing_mask)
        pairs, rejects = find_pairs(sources, listings, options)
    grouped, ungrouped = _grouped(pairs, config)
    refused = _refused([*rejects, *ungrouped], config)
    return PrepInput(
        name=dataset_name(sources, config),
        wanted_splits=frozenset(source.split for source in sources if source.split is not None),
        items=tuple(pairs_of(grouped, config, listings)),
        refused=tuple(refused),
    )


def _check_draw_valid(sources: Sequence[Source], config: PrepConfig) -> None:
    """Checks --draw-valid, and warns of ready-made splits without validation."""
    splits = {source.split for source in sources}
    if config.draw_valid is not None and (None in splits or "valid" in splits):
        has = "has no train/ and test/" if None in splits else "has a validation split"
        fix = "give --fractions instead" if None in splits else "leave it out"
        raise UsageError(f"--draw-valid {config.draw_valid:g}: the source {has}; {fix}")
    if config.draw_valid is None and "train" in splits and "valid" not in splits:
        logger.warning(
            "the source has no validation split: training needs one or --folds; draw one from "
            "train/ with --draw-valid 0.15"
        )


def _refuse_overlap(store: ObjectStore, sources: Sequence[Source]) -> None:
    for source in sources:
        for url in filter(None, (source.images, source.masks, source.views)):
            if is_subpath(store, open_store(url)):
                raise UsageError(
                    f"{store.url}: the output is inside the source folder {url}; choose another"
                )


def pairs_of(
    grouped: Sequence[tuple[Pair, str]], config: PrepConfig, listings: Listings
) -> list[SourcePair]:
    """Returns an item to encode for each pair with its group, sorted by id.

    Raises:
        StorageError: a file was deleted after it was listed.
    """
    found = (url for pair, _ in grouped for url in (pair.image_url, pair.mask_url, pair.view_url))
    urls = {url for url in found if url is not None}
    stats = {url: {stat.name: stat for stat in listings.files(url)} for url in urls}

    def file(url: str, name: str) -> File:
        stat = stats[url].get(name)
        if stat is None:
            raise StorageError(f"{url}/{name}: was deleted after it was listed; run prep again")
        # A reason in rejects.csv must not contain a hidden name; an error that ends the command is
        # shown to the user only.
        secret = config.hash_names and config.skip_bad
        label = hidden_name(name, config) if secret else join_url(url, name)
        return File(url, name, label, stat.size, stat.generation, stat.crc32c)

    items = [
        SourcePair(
            id=hidden(pair.id, config),
            group=hidden(group, config),
            filename=hidden_name(pair.image_name, config),
            split=pair.split,
            image=file(pair.image_url, pair.image_name),
            mask=file(pair.mask_url, pair.mask_name) if pair.mask_name else None,
            more_masks=tuple(file(pair.mask_url, name) for name in pair.more_masks),
            view=file(pair.view_url, pair.view_name) if pair.view_url and pair.view_name else None,
        )
        for pair, group in grouped
    ]
    return sorted(items, key=lambda item: item.id)


def _grouped(
    pairs: Sequence[Pair], config: PrepConfig
) -> tuple[list[tuple[Pair, str]], list[Reject]]:
    """Returns the pairs with their groups, and rejects for names without a group."""
    table = None
    if config.group_csv is not None:
        table = (read_text(config.group_csv, "--group-csv"), config.group_csv)
    rule = groups.group_of(preset=config.group_preset, regex=config.group_regex, table=table)
    if config.format == "inbreast":
        rule = inbreast.patient_of
    elif (config.group_preset, config.group_regex, config.group_csv) == (None, None, None):
        _warn_of_files_as_groups(pairs)
    grouped, rejects = [], []
    for pair in pairs:
        try:
            grouped.append((pair, rule(pair.image_name)))
        except ContentError as error:
            rejects.append(Reject(join_url(pair.image_url, pair.image_name), str(error)))
    if rejects and not grouped:
        # The rule of an option that fits no name is a wrong option; a table may lack the files.
        kind = ContentError if config.group_csv is not None else UsageError
        raise kind(
            f"{rejects[0].file}: {rejects[0].reason} "
            f"(same for all {pluralize(len(rejects), 'file')})"
        )
    return grouped, rejects


def _warn_of_files_as_groups(pairs: Sequence[Pair]) -> None:
    augmented = [pair for pair in pairs if groups.is_augmented_copy(pair.image_name)]
    if augmented:
        logger.warning(
            "%d of %d names look like augmented copies (%s), but every file is its own group: "
            "copies of one image may be in several splits; see --group-preset augmented",
            len(augmented),
            len(pairs),
            augmented[0].image_name,
        )
    else:
        logger.warning(
            "no --group option: every file is its own group; give one if a patient has several "
            "images"
        )


def _refused(rejects: Sequence[Reject], config: PrepConfig) -> list[tuple[str, str]]:
    """Returns (file, reason) of the files without a pair, with names as the report shows them."""
    if rejects and not config.skip_bad:
        first = rejects[0]
        num_more = len(rejects) - 1
        more = f" (and {pluralize(num_more, 'more file')})" if num_more else ""
        raise ContentError(
            f"{legible(f'{first.file}: {first.reason}')}{more}; fix it, or skip such files with "
            "--skip-bad"
        )
    if not config.hash_names:
        return [(reject.file, reject.reason) for reject in rejects]
    return [(hidden_name(r.file, config), without_name(r, config)) for r in rejects]


def source_digest(
    items: Sequence[SourcePair],
    crcs: Sequence[tuple[int, int]],
    refused: Sequence[tuple[str, str]],
) -> str:
    """Returns the digest of a source: names, groups, sizes and checksums of all files."""
    parts = [
        (item.id, item.group, item.filename, item.split, *_sizes(item), *crc)
        for item, crc in zip(items, crcs, strict=True)
    ]
    alone = sorted(os.path.basename(file) for file, _ in refused)
    return hashlib.sha256(json.dumps([parts, alone]).encode()).hexdigest()


def _sizes(item: SourcePair) -> tuple[int, int | None]:
    masks = [file.size for file in item.files[1:]]
    return item.image.size, sum(masks) if masks else None
