"""Finds the images and masks of a source and pairs them by their names.

The module reads names only; it does not depend on the content of the files or on how samples are
split. `layout` finds folders that are not named as usual, and `name_rules` the rule of the names.
"""

import logging
import os
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from data_prep.sources.layout import (
    FolderPair,
    Folders,
    find_folders,
    folders_of,
    meaning_of,
    select_folders,
)
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
    MISSING,
    Reject,
    Source,
    Stems,
    is_broken_link,
    refused_name,
    stems_of,
)
from flexunet.errors import ContentError, UsageError
from flexunet.storage import (
    ObjectStore,
    is_subpath,
    join_url,
    open_store,
)
from flexunet.text import join_truncated, pluralize

__all__ = [
    "IMAGE_ENDINGS",
    "MASK_ENDINGS",
    "Pair",
    "PairOptions",
    "Reject",
    "Source",
    "find_pairs",
    "find_sources",
    "folder_made_by",
    "is_broken_link",
    "refused_name",
]

logger = logging.getLogger(__name__)

_IMAGES = "images"
_MASKS = "masks"
_SPLIT_FOLDERS = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid",
                  "test": "test"}  # fmt: skip


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
    """

    id: str
    image_url: str
    image_name: str
    mask_url: str
    mask_name: str | None
    split: str | None
    more_masks: tuple[str, ...] = ()


def find_sources(
    source_url: str,
    listings: Listings | None = None,
    *,
    images: str | None = None,
    masks: str | None = None,
) -> tuple[Source, ...]:
    """Returns the folders of pairs below `source_url`.

    A source has either `images/` and `masks/`, or `train/`, `valid/` (also `val/`, `validation/`)
    and `test/` with both in each; `valid/` and `test/` may be missing. Otherwise all its folders
    are listed, and `find_folders` looks for other names.

    Args:
        images, masks: patterns of folders or files below the source, instead of their names.

    Raises:
        UsageError: no layout or several are found, a folder is missing or empty, or a pattern
            fits nothing.
    """
    url = open_store(source_url).url
    listings = listings or Listings()
    if images is not None or masks is not None:
        return _as_sources(url, select_folders(_all_folders(url, listings), images, masks))
    try:
        usual = _usual_sources(url, listings)
    except UsageError:
        found = find_folders(_all_folders(url, listings))
        if found is None:
            raise
        return _as_sources(url, found)
    # images/train/ and masks/train/ instead of train/images/ and train/masks/
    if not any("/" not in name for source in usual for name in listings.names(source.images)):
        found = find_folders(_all_folders(url, listings))
        if found is not None:
            return _as_sources(url, found)
    return usual


def _usual_sources(url: str, listings: Listings) -> tuple[Source, ...]:
    listings.look_for(url, (_IMAGES, _MASKS, *_SPLIT_FOLDERS))

    def has_files(name: str) -> bool:
        return bool(listings.files(join_url(url, name)))

    found = {name: split for name, split in _SPLIT_FOLDERS.items() if has_files(name)}
    is_flat = has_files(_IMAGES) or has_files(_MASKS)
    if is_flat and found:
        raise UsageError(
            f"{url}: contains {_IMAGES}/ or {_MASKS}/ and also {next(iter(found))}/; keep one of "
            "the two layouts"
        )
    if is_flat:
        source = Source(join_url(url, _IMAGES), join_url(url, _MASKS), None)
        return (_checked(source, listings),)
    if "train" not in found:
        raise UsageError(
            f"{url}: no files in {_IMAGES}/ and {_MASKS}/, nor in train/{_IMAGES}/ and "
            f"train/{_MASKS}/, nor in folders of similar names; give the folder that contains "
            "them, or name them with --images and --masks"
        )
    for split, count in Counter(found.values()).items():
        if count > 1:
            names = [f"{name}/" for name, of in found.items() if of == split]
            raise UsageError(f"{url}: {' and '.join(names)} mean the same split; keep one")
    return tuple(
        _checked(Source(join_url(url, name, _IMAGES), join_url(url, name, _MASKS), split), listings)
        for name, split in found.items()
    )


def _all_folders(url: str, listings: Listings) -> Folders:
    return folders_of(url, listings.names(url), IMAGE_ENDINGS, MASK_ENDINGS)


def _as_sources(url: str, found: Sequence[FolderPair]) -> tuple[Source, ...]:
    def url_of(path: str) -> str:
        return join_url(url, path) if path else url

    return tuple(
        Source(
            url_of(each.images),
            url_of(each.masks),
            each.split,
            url,
            each.image_glob,
            each.mask_glob,
        )
        for each in found
    )


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
    pairs: list[Pair] = []
    rejects: list[Reject] = []
    listings = listings or Listings()
    given = _given_patterns(options)
    found = [stems_of(source, listings, rejects).divided(given) for source in sources]
    naming = given or _found_rule(found)
    for each in found:
        _pair_source(each, naming, options, pairs, rejects)
    if given and not any(pair.mask_name for pair in pairs):
        raise UsageError(
            f"--mask-name {given.mask!r}: no mask of {sources[0].masks} belongs to an image of "
            f"{sources[0].images}; {_first_names(found)}"
        )
    unique, doubles = _without_doubles(pairs)
    rejects.extend(doubles)
    _log_layout(sources, naming, len(unique))
    return sorted(unique, key=lambda pair: pair.id), sorted(rejects, key=lambda entry: entry.file)


def _given_patterns(options: PairOptions) -> NamePatterns | None:
    if options.image_name is None and options.mask_name is None:
        return None
    return NamePatterns(options.image_name or "{stem}", options.mask_name or "{stem}")


def _found_rule(found: Sequence[Stems]) -> NameRule:
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
            f"name, and no rule pairs them: {_first_names([first])}; rename the files, or give a "
            "rule such as --mask-name '{stem}_mask'"
        )
    return rule


def _first_names(found: Sequence[Stems]) -> str:
    images = min((name for each in found for names in each.images.values() for name in names),
                 default="none")  # fmt: skip
    masks = min((name for each in found for names in each.masks.values() for name in names),
                default="none")  # fmt: skip
    return f"the first image is {images}, the first mask {masks}"


def _log_layout(sources: Sequence[Source], naming: Naming, num_pairs: int) -> None:
    root = sources[0].root
    if root is None:
        above = sources[0].images.rstrip("/").rpartition("/")[0]
        root = above.rpartition("/")[0] if sources[0].split else above

    def shown(urls: Collection[str]) -> str:
        return join_truncated(
            [f"{url.removeprefix(root).strip('/')}/" for url in dict.fromkeys(urls)], 3
        )

    rule = "equal names" if naming == EQUAL else naming.as_options()
    logger.info(
        "%s: images in %s, masks in %s, %s: %s",
        root,
        shown([source.images for source in sources]),
        shown([source.masks for source in sources]),
        rule,
        pluralize(num_pairs, "pair"),
    )


def folder_made_by(
    output: ObjectStore, source_url: str, listings: Listings | None = None
) -> str | None:
    """Returns the source folder that only `output` would create, None if there is none.

    With such a folder, the next `find_sources` would detect another layout.
    """
    source = open_store(source_url)
    first = _first_folder(output, source)
    meaning = meaning_of(first or "")
    if first is None or (meaning.role is None and meaning.split is None):
        return None
    url = join_url(source.url, first)
    return None if (listings or Listings()).files(url) else url


def _first_folder(inner: ObjectStore, outer: ObjectStore) -> str | None:
    """Returns the folder of `outer` that contains `inner`, None if `inner` is not below it."""
    if not is_subpath(inner, outer):
        return None
    if inner.local_root and outer.local_root:
        path = os.path.relpath(os.path.realpath(inner.local_root),
                               os.path.realpath(outer.local_root))  # fmt: skip
    else:
        path = inner.url[len(outer.url.rstrip("/")) + 1 :]
    first = path.split("/")[0]
    return first if first not in ("", ".") else None


def _pair_source(
    found: Stems,
    naming: Naming,
    options: PairOptions,
    pairs: list[Pair],
    rejects: list[Reject],
) -> None:
    """Adds the pairs of one source to `pairs`, and its files without a pair to `rejects`."""
    source = found.source
    matched = naming.match(found.images, found.masks)
    for stem, of_image in found.images.items():
        of_mask = [found.masks[mask] for mask in matched.get(stem, ())]
        is_single = all(len(names) == 1 for names in (of_image, *of_mask))
        is_empty = not of_mask and options.missing_mask == "empty" and naming.is_image(stem)
        if is_single and (of_mask or is_empty):
            masks = tuple(sorted(names[0] for names in of_mask))
            name, more = (masks[0], masks[1:]) if masks else (None, ())
            pairs.append(
                Pair(stem, source.images, of_image[0], source.masks, name, source.split, more)
            )
            continue
        reason = _why_double(of_image) if of_mask else _why_no_mask(source, naming, stem)
        rejects.extend(Reject(join_url(source.images, name), reason) for name in of_image)
        for names in of_mask:
            reason = _why_double(names)
            rejects.extend(Reject(join_url(source.masks, name), reason) for name in names)
    used = {mask for masks in matched.values() for mask in masks}
    for names in (names for stem, names in found.masks.items() if stem not in used):
        reason = _why_no_image(source, naming)
        rejects.extend(Reject(join_url(source.masks, name), reason) for name in names)


def _why_no_mask(source: Source, naming: Naming, stem: str) -> str:
    if not naming.is_image(stem):
        return f"its name does not fit {naming.as_options()}"
    return f"no mask of this name in {source.masks}"


def _why_no_image(source: Source, naming: Naming) -> str:
    reason = f"no image of this name in {source.images}"
    return reason if naming == EQUAL else f"{reason} with {naming.as_options()}"


def _checked(source: Source, listings: Listings) -> Source:
    for url in (source.images, source.masks):
        if not listings.files(url):
            raise UsageError(MISSING.format(url))
    return source


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
