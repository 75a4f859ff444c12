"""Finds the folders of a source, and those that an output would add to it.

Defines the usual folders. Others are found by their names (`layout`) or by patterns that the user
gives (`folder_patterns`).
"""

import logging
import os
from collections import Counter
from collections.abc import Sequence

from data_prep.sources.folder_patterns import FolderOptions, choose_folders
from data_prep.sources.layout import FolderPair, Folders, find_folders, folders_of, meaning_of
from data_prep.sources.listings import Listings
from data_prep.sources.source_files import IMAGE_ENDINGS, MASK_ENDINGS, MISSING, Source
from flexunet.errors import UsageError
from flexunet.storage import ObjectStore, is_subpath, join_url, open_store

logger = logging.getLogger(__name__)

_MAX_FILES = 1_000_000  # in which folders are looked for; about 20 s and 0.5 GB
_IMAGES = "images"
_MASKS = "masks"
_SPLIT_FOLDERS = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid",
                  "test": "test"}  # fmt: skip


def find_sources(
    source_url: str,
    listings: Listings | None = None,
    options: FolderOptions | None = None,
) -> tuple[Source, ...]:
    """Returns the folders of pairs below `source_url`.

    A source has either `images/` and `masks/`, or `train/`, `valid/` (also `val/`, `validation/`)
    and `test/` with both in each; `valid/` and `test/` may be missing. Otherwise all its folders
    are listed, and `find_folders` looks for other names.

    Args:
        options: patterns of folders or files below the source, instead of their names.

    Raises:
        UsageError: no layout or several are found, a folder is missing or empty, or a pattern
            fits nothing.
    """
    url = open_store(source_url).url
    listings = listings or Listings()
    if options is not None and options != FolderOptions():
        chosen = choose_folders(all_folders(url, listings), options)
        if chosen is None:
            raise UsageError(
                f"{url}: no folder of images with masks beside the field of view; name them with "
                "--images and --masks"
            )
        return as_sources(url, chosen)
    try:
        usual = _usual_sources(url, listings)
    except UsageError:
        logger.info("%s: no %s/ and %s/; listing all folders", url, _IMAGES, _MASKS)
        found = find_folders(all_folders(url, listings))
        if found is None:
            raise
        return as_sources(url, found)
    # images/train/ and masks/train/ instead of train/images/ and train/masks/
    if not any("/" not in name for source in usual for name in listings.names(source.images)):
        found = find_folders(all_folders(url, listings))
        if found is not None:
            return as_sources(url, found)
    return usual


def _usual_sources(url: str, listings: Listings) -> tuple[Source, ...]:
    existing = listings.look_for(url, (_IMAGES, _MASKS, *_SPLIT_FOLDERS))

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
        source = _checked(Source(join_url(url, _IMAGES), join_url(url, _MASKS), None), listings)
        others = [n for n in existing if n != _MASKS and meaning_of(n).role == "masks"]
        if others:
            logger.warning(
                "%s: %s/ is used, not %s/; choose with --masks", url, _MASKS, "/, ".join(others)
            )
        return (source,)
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


def all_folders(url: str, listings: Listings) -> Folders:
    """Returns all folders below the source `url`.

    Raises:
        UsageError: they contain more than a million files.
    """
    listings.check_number(url, _MAX_FILES)
    return folders_of(url, listings.names(url), IMAGE_ENDINGS, MASK_ENDINGS)


def as_sources(url: str, found: Sequence[FolderPair]) -> tuple[Source, ...]:
    """Returns the pairs of folders `found` below the source `url`."""

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
            None if each.views is None else url_of(each.views),
            each.view_glob,
        )
        for each in found
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


def _checked(source: Source, listings: Listings) -> Source:
    for url in (source.images, source.masks):
        if not listings.files(url):
            raise UsageError(MISSING.format(url))
    return source
