"""Finds the images and masks of a source and pairs them by their names.

The module reads names only; it does not depend on the content of the files or on how samples are
split. `source_folders` finds the folders, and `name_rules` the rule of the names.
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from data_prep.sources.folder_patterns import FolderOptions
from data_prep.sources.listings import Listings
from data_prep.sources.name_rules import (
    EQUAL,
    NamePatterns,
    NameRule,
    Naming,
    find_rule,
)
from data_prep.sources.source_files import (
    IMAGE_ENDINGS,
    MASK_ENDINGS,
    Reject,
    Source,
    Stems,
    is_broken_link,
    refused_name,
    stems_of,
)
from data_prep.sources.source_folders import find_sources, folder_made_by
from flexunet.errors import ContentError, UsageError
from flexunet.storage import (
    join_url,
)
from flexunet.text import join_truncated, pluralize

__all__ = [
    "IMAGE_ENDINGS",
    "MASK_ENDINGS",
    "NO_MASK",
    "FolderOptions",
    "Pair",
    "PairOptions",
    "PairedFiles",
    "Reject",
    "Source",
    "describe_rule",
    "find_pairs",
    "find_sources",
    "folder_made_by",
    "is_broken_link",
    "pair_sources",
    "refused_name",
]

NO_MASK = "no mask of this name"  # start of the reason for an image without a mask
_RULE_REMEDY = "rename the files, or give a rule such as --mask-name '{stem}_mask'"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairOptions:
    """How images and masks are paired.

    Attributes:
        image_name, mask_name: patterns of the stems; both None: the rule is found.
        missing_mask: "empty": an image without a mask has no finding.
    """

    image_name: str | None = None
    mask_name: str | None = None
    missing_mask: Literal["error", "empty"] = "error"


@dataclass(frozen=True)
class Pair:
    """An image and its mask: for each the URL of a store and the object's name in it.

    `mask_name` is None if the image has no finding: an INbreast release has no annotation, or
    --missing-mask is "empty". `more_masks` are further masks of the image, in the same store.
    `view_name` is the mask of its field of view, None if there is none.
    """

    id: str
    image_url: str
    image_name: str
    mask_url: str
    mask_name: str | None
    split: str | None
    more_masks: tuple[str, ...] = ()
    view_url: str | None = None
    view_name: str | None = None


def find_pairs(
    sources: Sequence[Source],
    listings: Listings | None = None,
    options: PairOptions = PairOptions(),
) -> tuple[list[Pair], list[Reject]]:
    """Returns the pairs, sorted by id, and every file without a pair, sorted by name.

    The id is the stem of the image. Equal stems are a pair, or else one rule for all names is
    found (see `find_rule`). Subfolders are not read; hidden files and files of file managers are
    skipped.

    Raises:
        UsageError: a folder is missing or empty, or the names have several readings.
        ContentError: no rule pairs the names.
    """
    paired = pair_sources(sources, listings or Listings(), options)
    _log_layout(sources, paired.naming, len(paired.pairs))
    return list(paired.pairs), list(paired.rejects)


@dataclass(frozen=True)
class PairedFiles:
    """The pairs of sources, the files without a pair, and the rule of the names of masks.

    `naming` is None if the format defines the names.
    """

    pairs: tuple[Pair, ...]
    rejects: tuple[Reject, ...]
    naming: Naming | None


def pair_sources(
    sources: Sequence[Source], listings: Listings, options: PairOptions
) -> PairedFiles:
    """Returns the pairs of `sources`; see `find_pairs`, which also logs them."""
    pairs: list[Pair] = []
    rejects: list[Reject] = []
    given = _given_patterns(options)
    found = [stems_of(source, listings, rejects).divided(given) for source in sources]
    rules = _Rules(given or _found_rule(found), _rule_of_views(found))
    for each in found:
        _pair_source(each, rules, options, pairs, rejects)
    if given and not any(pair.mask_name for pair in pairs):
        raise UsageError(
            f"--mask-name {given.mask!r}: no mask of {sources[0].masks} belongs to an image of "
            f"{sources[0].images}; {_first_names(found)}"
        )
    unique, doubles = _without_doubles(pairs)
    rejects.extend(doubles)
    return PairedFiles(
        tuple(sorted(unique, key=lambda pair: pair.id)),
        tuple(sorted(rejects, key=lambda entry: entry.file)),
        rules.masks,
    )


def _given_patterns(options: PairOptions) -> NamePatterns | None:
    if options.image_name is None and options.mask_name is None:
        return None
    return NamePatterns(options.image_name or "{stem}", options.mask_name or "{stem}")


@dataclass(frozen=True)
class _Rules:
    """The rules of the names of masks, and of masks of the field of view."""

    masks: Naming
    views: NameRule


def _found_rule(found: Sequence[Stems], remedy: str = _RULE_REMEDY) -> NameRule:
    """Returns the rule that pairs the names of all sources."""
    without = [e for e in found if e.images and e.masks and not e.images.keys() & e.masks.keys()]
    if not without:
        return EQUAL
    first = without[0]
    url = first.source.root or first.source.images
    rule = find_rule([(each.images, each.masks) for each in found], url)
    if rule is None or rule == EQUAL:
        raise ContentError(
            f"{first.source.images} and {first.source.masks}: no image has a mask of the same "
            f"name, and no rule pairs them: {_first_names([first])}; {remedy}"
        )
    return rule


def _rule_of_views(found: Sequence[Stems]) -> NameRule:
    """Returns the rule that pairs the names of images and of masks of the field of view."""
    of_views = [
        dataclasses.replace(
            each,
            source=dataclasses.replace(each.source, masks=each.source.views or ""),
            masks=each.views,
        )
        for each in found
    ]
    remedy = "rename the files of the field of view"
    try:
        return _found_rule(of_views, remedy)
    except UsageError as error:  # its text names options, but these are for masks
        raise UsageError(
            f"{found[0].source.views}: more than one rule pairs these names with images; {remedy}"
        ) from error


def _first_names(found: Sequence[Stems]) -> str:
    images = min((name for each in found for names in each.images.values() for name in names),
                 default="none")  # fmt: skip
    masks = min((name for each in found for names in each.masks.values() for name in names),
                default="none")  # fmt: skip
    return f"the first image is {images}, the first mask {masks}"


def describe_rule(naming: Naming | None) -> str:
    """Returns the rule of the names of masks in words, or as options of `prep`."""
    return "equal names" if naming in (None, EQUAL) else naming.as_options()


def _log_layout(sources: Sequence[Source], naming: Naming | None, num_pairs: int) -> None:
    root = sources[0].root
    if root is None:
        above = sources[0].images.rstrip("/").rpartition("/")[0]
        root = above.rpartition("/")[0] if sources[0].split else above

    def shown(urls: Collection[str]) -> str:
        return join_truncated(
            [f"{url.removeprefix(root).strip('/')}/" for url in dict.fromkeys(urls)], 3
        )

    logger.info(
        "%s: images in %s, masks in %s, %s: %s",
        root,
        shown([source.images for source in sources]),
        shown([source.masks for source in sources]),
        describe_rule(naming),
        pluralize(num_pairs, "pair"),
    )


def _pair_source(
    found: Stems,
    rules: _Rules,
    options: PairOptions,
    pairs: list[Pair],
    rejects: list[Reject],
) -> None:
    """Adds the pairs of one source to `pairs`, and its files without a pair to `rejects`."""
    source, naming = found.source, rules.masks
    matched = naming.match(found.images, found.masks)
    for stem, of_image in found.images.items():
        of_mask = [found.masks[mask] for mask in matched.get(stem, ())]
        view = _view_of(found, rules, stem)
        is_single = all(len(names) == 1 for names in (of_image, *of_mask))
        is_empty = not of_mask and options.missing_mask == "empty" and naming.is_image(stem)
        if is_single and (of_mask or is_empty) and (view or source.views is None):
            masks = tuple(sorted(names[0] for names in of_mask))
            name, more = (masks[0], masks[1:]) if masks else (None, ())
            place = (source.images, of_image[0], source.masks, name, source.split)
            pairs.append(Pair(stem, *place, more, source.views, view))
            continue
        if is_single and (of_mask or is_empty):
            reason = f"no field of view of this name in {source.views}"
        else:
            reason = _why_double(of_image) if of_mask else _why_no_mask(source, naming, stem)
        rejects.extend(Reject(join_url(source.images, name), reason) for name in of_image)
        for names in of_mask:
            reason = _why_double(names) if not is_single else "its image has no field of view"
            rejects.extend(Reject(join_url(source.masks, name), reason) for name in names)
    used = {mask for masks in matched.values() for mask in masks}
    for names in (names for stem, names in found.masks.items() if stem not in used):
        reason = _why_no_image(source, naming)
        rejects.extend(Reject(join_url(source.masks, name), reason) for name in names)


def _view_of(found: Stems, rules: _Rules, stem: str) -> str | None:
    """Returns the name of the mask of the field of view of an image, None without or with several.

    Those that belong to no image are no bad files: they hold no samples.
    """
    names = found.views.get(rules.views.mask_of(stem) or "", [])
    return names[0] if len(names) == 1 else None


def _why_no_mask(source: Source, naming: Naming, stem: str) -> str:
    if not naming.is_image(stem):
        return f"its name does not fit {naming.as_options()}"
    return f"{NO_MASK} in {source.masks}"


def _why_no_image(source: Source, naming: Naming) -> str:
    reason = f"no image of this name in {source.images}"
    return reason if naming == EQUAL else f"{reason} with {naming.as_options()}"


def _why_double(names: Sequence[str]) -> str:
    if len(names) > 1:
        return f"{len(names)} files in its folder differ only in the ending; keep one"
    return "its partner exists more than once, with different endings; keep one"


def _without_doubles(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Reject]]:
    """Returns the pairs with a unique id, and rejects for the images of the other pairs."""
    count = Counter(pair.id for pair in pairs)
    unique = [pair for pair in pairs if count[pair.id] == 1]
    reason = "the same name is in more than one split or source; rename one"
    doubles = [pair for pair in pairs if count[pair.id] > 1]
    return unique, [Reject(join_url(p.image_url, p.image_name), reason) for p in doubles]
