"""Lists the usable files of a source by stem, and gives a reason for every other file.

Defines which files are images and masks. The module reads names only and does not pair them.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from data_prep.imaging.arrays import NPY_ENDING
from data_prep.imaging.dicom.reader import DICOM_ENDINGS
from data_prep.sources.listings import Listings
from data_prep.sources.name_rules import NamePatterns, glob_as_regex, split_one_folder
from flexunet.errors import UsageError
from flexunet.storage import BROKEN_LINK, join_url, name_problem, open_source

IMAGE_ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff")
MASK_ENDINGS = (*IMAGE_ENDINGS, ".npz")

MISSING = "{}: missing or empty; put images and masks into a folder each"


def image_endings(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the endings of images among `names`: arrays only where there are no other images.

    Beside images, arrays are features or labels.
    """
    endings = {os.path.splitext(name)[1].lower() for name in names}
    has_arrays = NPY_ENDING in endings and not endings & set(IMAGE_ENDINGS)
    return (*IMAGE_ENDINGS, NPY_ENDING) if has_arrays else IMAGE_ENDINGS


@dataclass(frozen=True)
class Source:
    """The image folder and mask folder of pairs; `split` is None if it is not ready-made.

    Attributes:
        root: the folder in which they were found by their names or by patterns; None if they have
            the usual names. Files in their subfolders belong to other folders then.
        image_glob, mask_glob: pattern of the names of the files, None for all.
        views: the folder of the masks of the field of view, None if there is none.
    """

    images: str
    masks: str
    split: str | None
    root: str | None = None
    image_glob: str | None = None
    mask_glob: str | None = None
    views: str | None = None
    view_glob: str | None = None

    @property
    def is_one_folder(self) -> bool:
        """Whether images and masks are in one folder and differ only in their names."""
        return self.images == self.masks and self.image_glob == self.mask_glob


@dataclass(frozen=True)
class Reject:
    """An unusable file, by its URL, and the reason, which names no other file."""

    file: str
    reason: str


Names = dict[str, list[str]]  # stem -> names of its files


@dataclass(frozen=True)
class Stems:
    """The images and masks of a source by stem. In one folder with both, they are the same."""

    source: Source
    images: Names
    masks: Names
    views: Names = field(default_factory=dict)

    def divided(self, naming: NamePatterns | None) -> "Stems":
        """Returns the images and the masks of a folder with both, divided by their names."""
        if not self.source.is_one_folder:
            return self
        images, masks = split_one_folder(self.masks) if naming is None else naming.split(self.masks)
        return Stems(
            self.source,
            {stem: names for stem, names in self.images.items() if stem in images},
            {stem: names for stem, names in self.masks.items() if stem in masks},
            self.views,
        )


def stems_of(source: Source, listings: Listings, rejects: list[Reject]) -> Stems:
    """Returns the usable files of a source; adds the others to `rejects`."""
    views = {} if source.views is None else _by_stem(source, "views", listings, rejects)
    if source.is_one_folder:
        masks = _by_stem(source, "masks", listings, rejects)
        only = {
            stem: found
            for stem, names in masks.items()
            if (found := [name for name in names if name.lower().endswith(IMAGE_ENDINGS)])
        }
        return Stems(source, only, masks, views)
    images = _by_stem(source, "images", listings, rejects)
    return Stems(source, images, _by_stem(source, "masks", listings, rejects), views)


def _by_stem(
    source: Source,
    role: Literal["images", "masks", "views"],
    listings: Listings,
    rejects: list[Reject],
) -> Names:
    """Returns the object names of each stem; adds unusable files to `rejects`."""
    url, glob, endings = {
        "images": (source.images, source.image_glob, IMAGE_ENDINGS),
        "masks": (source.masks, source.mask_glob, MASK_ENDINGS),
        "views": (source.views or "", source.view_glob, IMAGE_ENDINGS),
    }[role]
    stats = listings.files(url)
    if role == "images":
        endings = image_endings([stat.name for stat in stats])
    if not stats:
        raise UsageError(MISSING.format(url))
    pattern = None if glob is None else re.compile(glob_as_regex(glob), re.DOTALL)
    names: Names = {}
    for stat in stats:
        name = stat.name
        is_elsewhere = "/" in name and source.root is not None
        if is_elsewhere or (pattern is not None and not pattern.fullmatch(name)):
            continue
        stem, ending = os.path.splitext(name)
        if "/" in name:
            reason = "is in a subfolder; move it up"
        elif ending.lower() not in endings:
            reason = _why_other_ending(ending, endings)
        elif problem := name_problem(name):
            reason = refused_name(problem)
        elif not stat.size and is_broken_link(url, name):  # which is listed with size 0
            reason = BROKEN_LINK
        else:
            names.setdefault(stem, []).append(name)
            continue
        rejects.append(Reject(join_url(url, name), reason))
    return names


def is_broken_link(url: str, name: str) -> bool:
    """Returns whether object `name` of a source is a broken symbolic link."""
    store = open_source(url)
    return store.local_root is not None and store.stat(name) is None


def refused_name(problem: str) -> str:
    """Returns the reject reason for a file whose name is not allowed in storage."""
    return f"its name is not allowed: {problem}; rename it"


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
