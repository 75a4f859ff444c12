"""Finds the folders of images and masks of a source, by their names or by patterns.

The module compares names of a listing; it reads no files and does not pair them.

A folder is recognized by the words of its path, in any case and order: one word for its role
(images, masks), one for its split. The other parts of the path must be the same for images and
masks. A path that can be read in two ways is never guessed.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from data_prep.sources.name_rules import MASK_WORDS, split_one_folder
from flexunet.errors import UsageError

IMAGE_WORDS = frozenset(
    ("images", "image", "imgs", "img", "jpegimages", "pngimages", "photos", "originals")
)
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "val": "valid",
    "validation": "valid",
    "test": "test",
    "testing": "test",
}

Role = Literal["images", "masks"]
MAX_LISTED = 5  # folders named in a message
OPTIONS: dict[Role, str] = {"images": "--images", "masks": "--masks"}


@dataclass(frozen=True)
class FolderPair:
    """A folder of images and its folder of masks, relative to the source; "" is the source.

    Attributes:
        image_glob, mask_glob, view_glob: pattern of the file names, None for all.
        views: folder of the masks of the field of view, None if there is none.
    """

    images: str
    masks: str
    split: str | None
    image_glob: str | None = None
    mask_glob: str | None = None
    views: str | None = None
    view_glob: str | None = None


@dataclass(frozen=True)
class Meaning:
    """The role and the split in a path, None if it has no word for it, and its other parts."""

    role: Role | None
    split: str | None
    rest: tuple[str, ...] = ()


@dataclass(frozen=True)
class Folders:
    """The files of a source by folder.

    Attributes:
        url: the source, named in errors.
        images, masks: path of a folder -> names of its files with an ending of an image or a mask.
    """

    url: str
    images: Mapping[str, Sequence[str]]
    masks: Mapping[str, Sequence[str]]


def folders_of(
    url: str, names: Iterable[str], image_endings: Sequence[str], mask_endings: Sequence[str]
) -> Folders:
    """Returns the folders of the files `names`, which are relative to the source `url`."""
    images: dict[str, list[str]] = {}
    masks: dict[str, list[str]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        for found, endings in ((images, image_endings), (masks, mask_endings)):
            if file.lower().endswith(tuple(endings)):
                found.setdefault(folder, []).append(file)
    return Folders(url, images, masks)


def meaning_of(path: str) -> Meaning:
    """Returns the role and the split that the parts of `path` name."""
    role: Role | None = None
    split: str | None = None
    rest: list[str] = []
    for part in filter(None, path.split("/")):
        its_role, its_split = _meaning_of_part(part)
        if its_role is None and its_split is None:
            rest.append(part)
        if its_role is not None:
            rest += [] if role is None else [role]
            role = its_role
        if its_split is not None:
            rest += [] if split is None else [its_split]
            split = split or its_split
    return Meaning(role, split, tuple(rest))


def _meaning_of_part(part: str) -> tuple[Role | None, str | None]:
    words = re.findall("[a-z0-9]+", part.lower())
    joined = "".join(words)
    if role := _role_of_word(joined):
        return role, None
    if joined in SPLIT_WORDS:
        return None, SPLIT_WORDS[joined]
    roles = [role for word in words if (role := _role_of_word(word))]
    splits = [SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS]
    # train_masks and mask_images are known, left_images and train_masks_old are not.
    if len(words) != 2 or len(roles) + len(splits) != 2 or len(splits) == 2:
        return None, None
    return "masks" if "masks" in roles else roles[0], splits[0] if splits else None


def _role_of_word(word: str) -> Role | None:
    if word in MASK_WORDS:
        return "masks"
    return "images" if word in IMAGE_WORDS else None


@dataclass
class _Siblings:
    """The folders of one split whose other parts are the same, by role."""

    images: list[str] = field(default_factory=list)
    masks: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def find_folders(folders: Folders) -> tuple[FolderPair, ...] | None:
    """Returns the folders that the names say, None if no folder of images has masks.

    Raises:
        UsageError: the names have several readings, or some folder lacks its partner.
    """
    groups = _siblings_of(folders)
    if not any(siblings.masks for siblings in groups.values()):
        return _folders_with_both(folders)
    pairs: list[FolderPair] = []
    alone: list[str] = []
    for (split, _), siblings in groups.items():
        images, masks = siblings.images or siblings.others, siblings.masks
        if images and masks:
            image, mask = only(folders.url, "images", images), only(folders.url, "masks", masks)
            pairs.append(FolderPair(image, mask, split))
        else:
            # A folder of images without such a name, such as docs/, is no part of the source.
            alone += [*siblings.images, *masks, *(siblings.others if split else ())]
    if pairs and alone:
        raise UsageError(without_partner(folders.url, alone[0]))
    return with_splits(folders.url, pairs) if pairs else None


def possible_pairs(folders: Folders) -> list[FolderPair]:
    """Returns each folder of images with each folder of masks that may belong to it.

    Unlike `find_folders`, accepts names with several readings and splits without train.
    """
    return [
        FolderPair(images, masks, split)
        for (split, _), siblings in _siblings_of(folders).items()
        for images in siblings.images or siblings.others
        for masks in siblings.masks
    ]


def _siblings_of(folders: Folders) -> dict[tuple[str | None, tuple[str, ...]], _Siblings]:
    groups: dict[tuple[str | None, tuple[str, ...]], _Siblings] = {}
    for path in sorted(folders.images.keys() | folders.masks.keys()):
        meaning = meaning_of(path)
        siblings = groups.setdefault((meaning.split, meaning.rest), _Siblings())
        if meaning.role == "masks":
            siblings.masks.append(path)
        elif path in folders.images:
            (siblings.images if meaning.role else siblings.others).append(path)
    return groups


def _folders_with_both(folders: Folders) -> tuple[FolderPair, ...] | None:
    """Returns the folders that contain images and masks, divided by the words of their names."""
    pairs, alone = [], []
    for path, files in sorted(folders.images.items()):
        meaning = meaning_of(path)
        if all(split_one_folder({os.path.splitext(file)[0] for file in files})):
            pairs.append(FolderPair(path, path, meaning.split))
        elif meaning.role or meaning.split:
            alone.append(path)
    if pairs and alone:
        raise UsageError(without_partner(folders.url, alone[0]))
    return with_splits(folders.url, pairs) if pairs else None


def with_splits(
    url: str, pairs: Sequence[FolderPair], *, are_chosen: bool = False
) -> tuple[FolderPair, ...]:
    """Returns `pairs` in the order of their splits; without splits if all are of train.

    Args:
        are_chosen: the user named the folders, so that all of them may be of another split, too.

    Raises:
        UsageError: some are in a split and some are not, or none is of train.
    """
    splits = {pair.split for pair in pairs}
    if None in splits and len(splits) > 1:
        inside = next(pair.images for pair in pairs if pair.split)
        outside = next(pair.images for pair in pairs if not pair.split)
        raise UsageError(
            f"{url}: {shown(inside)} is in a folder of a split and {shown(outside)} is not; give "
            "the folders to use with --images and --masks"
        )
    is_one = splits == {"train"} or (are_chosen and len(splits) == 1)
    if not is_one and splits != {None} and "train" not in splits:
        raise UsageError(
            f"{url}: no folder train/ or training/ beside {shown(pairs[0].images)}; give the "
            "folders to use with --images and --masks"
        )
    if is_one:
        pairs = [replace(pair, split=None) for pair in pairs]
    order = [None, "train", "valid", "test"]
    return tuple(sorted(pairs, key=lambda pair: (order.index(pair.split), pair.images)))


def only(url: str, role: Role, paths: Sequence[str]) -> str:
    """Returns the only one of `paths`; raises an error that names the choices."""
    if len(paths) > 1:
        raise UsageError(_several(url, role, paths))
    return paths[0]


def _several(url: str, role: Role, paths: Sequence[str]) -> str:
    named = " and ".join(map(shown, paths[:MAX_LISTED]))
    choice = f"{OPTIONS[role]} {paths[0] or '.'}"
    view = "; a field of view belongs to --field-of-view" if role == "masks" else ""
    return f"{url}: {named} may be the {role}; choose one, for example {choice}{view}"


def without_partner(url: str, path: str) -> str:
    """Returns the error for a folder of images or masks without the other one."""
    partner = "images" if meaning_of(path).role == "masks" else "masks"
    return (
        f"{url}: no folder of {partner} belongs to {shown(path)}; add it, or give the folders to "
        "use with --images and --masks"
    )


def shown(path: str) -> str:
    """Returns the path of a folder as in messages."""
    return f"{path}/" if path else "the folder itself"
