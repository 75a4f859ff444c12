"""Finds the images and masks of a source and pairs them by stem.

Defines the layout of a source folder. The module reads names only; it does not depend on the
content of the files or on how samples are split.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from data_prep.imaging.dicom.reader import DICOM_ENDINGS
from data_prep.sources.listings import Listings
from flexunet.errors import ContentError, UsageError
from flexunet.storage import (
    BROKEN_LINK,
    ObjectStore,
    is_subpath,
    join_url,
    name_problem,
    open_source,
    open_store,
)

IMAGE_ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff")
MASK_ENDINGS = (*IMAGE_ENDINGS, ".npz")

_IMAGES = "images"
_MASKS = "masks"
_SPLIT_FOLDERS = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid",
                  "test": "test"}  # fmt: skip
_MISSING = "{}: missing or empty; put images and masks into a folder each"


@dataclass(frozen=True)
class Source:
    """The image folder and mask folder of pairs; `split` is None if it is not ready-made."""

    images: str
    masks: str
    split: str | None


@dataclass(frozen=True)
class Pair:
    """An image and its mask: for each the URL of a store and the object's name in it.

    `mask_name` is None if an INbreast release has no annotation, which means no finding.
    """

    id: str
    image_url: str
    image_name: str
    mask_url: str
    mask_name: str | None
    split: str | None


@dataclass(frozen=True)
class Reject:
    """An unusable file, by its URL, and the reason, which names no other file."""

    file: str
    reason: str


def find_sources(source_url: str, listings: Listings | None = None) -> tuple[Source, ...]:
    """Returns the folders of pairs below `source_url`.

    A source has either `images/` and `masks/`, or `train/`, `valid/` (also `val/`, `validation/`)
    and `test/` with both in each; `valid/` and `test/` may be missing.

    Raises:
        UsageError: neither or both layouts exist, or a folder is missing or empty.
    """
    url = open_store(source_url).url
    listings = listings or Listings()
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
            f"train/{_MASKS}/; give the folder that contains them"
        )
    for split, count in Counter(found.values()).items():
        if count > 1:
            names = [f"{name}/" for name, of in found.items() if of == split]
            raise UsageError(f"{url}: {' and '.join(names)} mean the same split; keep one")
    return tuple(
        _checked(Source(join_url(url, name, _IMAGES), join_url(url, name, _MASKS), split), listings)
        for name, split in found.items()
    )


def find_pairs(
    sources: Sequence[Source], listings: Listings | None = None
) -> tuple[list[Pair], list[Reject]]:
    """Returns the pairs, sorted by id, and every file without a pair, sorted by name.

    The id is the stem of the file name. Subfolders are not read; hidden files and files of file
    managers are skipped.

    Raises:
        UsageError: a folder is missing or empty.
        ContentError: the two folders have no name in common.
    """
    pairs: list[Pair] = []
    rejects: list[Reject] = []
    listings = listings or Listings()
    for source in sources:
        _pair_source(source, pairs, rejects, listings)
    unique, doubles = _without_doubles(pairs)
    rejects.extend(doubles)
    return sorted(unique, key=lambda pair: pair.id), sorted(rejects, key=lambda entry: entry.file)


def folder_made_by(
    output: ObjectStore, source_url: str, listings: Listings | None = None
) -> str | None:
    """Returns the source folder that only `output` would create, None if there is none.

    With such a folder, the next `find_sources` would detect another layout.
    """
    listings = listings or Listings()
    for name in (_IMAGES, _MASKS, *_SPLIT_FOLDERS):
        url = join_url(open_store(source_url).url, name)
        if is_subpath(output, open_store(url)) and not listings.files(url):
            return url
    return None


def _pair_source(
    source: Source, pairs: list[Pair], rejects: list[Reject], listings: Listings
) -> None:
    """Adds the pairs of one source to `pairs`, and its files without a pair to `rejects`."""
    images = _by_stem(source.images, IMAGE_ENDINGS, rejects, listings)
    masks = _by_stem(source.masks, MASK_ENDINGS, rejects, listings)
    if images and masks and not images.keys() & masks.keys():
        image, mask = min(images), min(masks)
        raise ContentError(
            f"{source.images} and {source.masks}: no image has a mask of the same name: "
            f"{images[image][0]} needs {image}.png, but the masks are {masks[mask][0]} and so on; "
            "rename the files"
        )
    for stem in images.keys() | masks.keys():
        of_image, of_mask = images.get(stem, []), masks.get(stem, [])
        if len(of_image) == len(of_mask) == 1:
            names = (source.images, of_image[0], source.masks, of_mask[0])
            pairs.append(Pair(stem, *names, source.split))
            continue
        for url, names_here, partners, missing in (
            (source.images, of_image, of_mask, f"no mask of this name in {source.masks}"),
            (source.masks, of_mask, of_image, f"no image of this name in {source.images}"),
        ):
            reason = _why_double(names_here) if partners else missing
            rejects.extend(Reject(join_url(url, name), reason) for name in names_here)


def is_broken_link(url: str, name: str) -> bool:
    """Returns whether object `name` of a source is a broken symbolic link."""
    store = open_source(url)
    return store.local_root is not None and store.stat(name) is None


def refused_name(problem: str) -> str:
    """Returns the reject reason for a file whose name is not allowed in storage."""
    return f"its name is not allowed: {problem}; rename it"


def _checked(source: Source, listings: Listings) -> Source:
    for url in (source.images, source.masks):
        if not listings.files(url):
            raise UsageError(_MISSING.format(url))
    return source


def _by_stem(
    url: str, endings: Sequence[str], rejects: list[Reject], listings: Listings
) -> dict[str, list[str]]:
    """Returns the object names of each stem; adds unusable files to `rejects`."""
    files = listings.names(url)
    if not files:
        raise UsageError(_MISSING.format(url))
    names: dict[str, list[str]] = {}
    for name in files:
        stem, ending = os.path.splitext(name)
        if "/" in name:
            reason = "is in a subfolder; move it up"
        elif ending.lower() not in endings:
            reason = _why_other_ending(ending, endings)
        elif problem := name_problem(name):
            reason = refused_name(problem)
        elif is_broken_link(url, name):
            reason = BROKEN_LINK
        else:
            names.setdefault(stem, []).append(name)
            continue
        rejects.append(Reject(join_url(url, name), reason))
    return names


def _why_other_ending(ending: str, endings: Sequence[str]) -> str:
    if ending.lower() in DICOM_ENDINGS:
        return (
            "DICOM files are not read as pairs; convert them to 16-bit PNG or TIFF, or give a "
            "release of INbreast with --format inbreast"
        )
    if not ending:
        return (
            f"it has no ending, expected {', '.join(endings)}; convert DICOM files to 16-bit PNG "
            "or TIFF"
        )
    return f"its ending is not one of {', '.join(endings)}"


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
