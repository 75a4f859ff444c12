"""Selects the folders of images and masks of a source by patterns that the user gives.

The module compares names of a listing. Folders of a role without a pattern are found beside the
selected ones by their names.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from data_prep.sources.layout import (
    MAX_LISTED,
    OPTIONS,
    FolderPair,
    Folders,
    Role,
    find_folders,
    meaning_of,
    only,
    shown,
    with_splits,
    without_partner,
)
from data_prep.sources.name_rules import glob_as_regex
from flexunet.errors import UsageError
from flexunet.text import join_truncated, pluralize


@dataclass(frozen=True)
class FolderOptions:
    """Patterns of folders or files below the source; None: they are found by their names.

    There are masks of the field of view only if `field_of_view` names them.
    """

    images: str | None = None
    masks: str | None = None
    field_of_view: str | None = None


@dataclass(frozen=True)
class _Selected:
    """A folder that a pattern matches, the text of its wildcards, and the pattern of files."""

    path: str
    wildcards: tuple[str, ...]
    glob: str | None = None


def choose_folders(folders: Folders, options: FolderOptions) -> tuple[FolderPair, ...] | None:
    """Returns the folders that `options` select or that the names say; None as `find_folders`.

    Raises:
        UsageError: see `find_folders` and `select_folders`.
    """
    views: list[_Selected] = []
    if options.field_of_view is not None:
        views = _selected(folders, "masks", options.field_of_view, "--field-of-view")
        folders = _without_files(folders, views)
    if options.images is None and options.masks is None:
        pairs = find_folders(folders)
    else:
        pairs = select_folders(folders, options.images, options.masks)
    if pairs is None or not views:
        return pairs
    return tuple(_with_views(folders.url, pair, views, len(pairs)) for pair in pairs)


def _without_files(folders: Folders, selected: Sequence[_Selected]) -> Folders:
    globs = {each.path: re.compile(glob_as_regex(each.glob or "*"), re.DOTALL) for each in selected}

    def rest(files: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        found = {
            path: [n for n in names if path not in globs or not globs[path].fullmatch(n)]
            for path, names in files.items()
        }
        return {path: names for path, names in found.items() if names}

    return Folders(folders.url, rest(folders.images), rest(folders.masks))


def _with_views(
    url: str, pair: FolderPair, views: Sequence[_Selected], num_pairs: int
) -> FolderPair:
    """Returns `pair` with its folder of the field of view."""
    own = [
        view
        for view in views
        if 1 in (_num_different(view.path, pair.images), _num_different(view.path, pair.masks))
    ]
    if len(views) == num_pairs == 1:
        own = list(views)
    if len(own) != 1:
        raise UsageError(
            f"{url}: --field-of-view selects {pluralize(len(own), 'folder')} for "
            f"{shown(pair.images)}; give a pattern with one folder for each folder of images"
        )
    return replace(pair, views=own[0].path, view_glob=own[0].glob)


def select_folders(
    folders: Folders, images: str | None, masks: str | None
) -> tuple[FolderPair, ...]:
    """Returns the folders that the patterns select; the folders of the other role are found.

    Args:
        images, masks: patterns of folders or files, relative to the source; at least one.

    Raises:
        UsageError: a pattern is malformed, matches nothing, or the folders do not match.
    """
    of_images = None if images is None else _selected(folders, "images", images)
    of_masks = None if masks is None else _selected(folders, "masks", masks)
    if of_images is not None and of_masks is not None:
        pairs = _joined(folders.url, of_images, of_masks)
    elif of_images is not None:
        pairs = [(each, _partner(folders, "masks", each)) for each in of_images]
    else:
        pairs = [(_partner(folders, "images", each), each) for each in of_masks or ()]
    found = [
        FolderPair(image.path, mask.path, meaning_of(image.path).split, image.glob, mask.glob)
        for image, mask in pairs
    ]
    return with_splits(folders.url, found, are_chosen=True)


def _selected(
    folders: Folders, role: Role, pattern: str, option: str | None = None
) -> list[_Selected]:
    option = option or OPTIONS[role]
    files = folders.images if role == "images" else folders.masks
    problem = _pattern_problem(pattern)
    if problem:
        raise UsageError(f"{option} {pattern!r}: {problem}")
    parts = [part for part in pattern.split("/") if part not in ("", ".")]
    found = _matching(files, parts)
    if not found and parts and not pattern.endswith("/"):
        file_pattern = re.compile(glob_as_regex(parts[-1]), re.DOTALL)
        found = [
            replace(each, glob=parts[-1])
            for each in _matching(files, parts[:-1])
            if any(map(file_pattern.fullmatch, files[each.path]))
        ]
    if not found:
        existing = join_truncated([shown(path) for path in sorted(files)], MAX_LISTED)
        raise UsageError(
            f"{option} {pattern!r}: no {role} there in {folders.url}; folders with "
            f"{role}: {existing or 'none'}"
        )
    return found


def _matching(files: Mapping[str, object], parts: Sequence[str]) -> list[_Selected]:
    regex = re.compile("/".join(glob_as_regex(part, captures=True) for part in parts))
    found = ((path, regex.fullmatch(path)) for path in sorted(files))
    return [_Selected(path, match.groups()) for path, match in found if match]


def _pattern_problem(pattern: str) -> str | None:
    parts = pattern.split("/")
    if not pattern or pattern.startswith(("/", "~")) or "://" in pattern:
        return "must be relative to SOURCE; write for example train/images"
    if ".." in parts:
        return "leaves SOURCE; give a folder that contains images and masks as SOURCE"
    if "**" in pattern:
        return "** is not supported; write one * for each folder"
    try:
        for part in parts:
            re.compile(glob_as_regex(part))
    except re.error as error:
        return f"is not a pattern ({error})"
    return None


def _joined(
    url: str, images: Sequence[_Selected], masks: Sequence[_Selected]
) -> list[tuple[_Selected, _Selected]]:
    """Returns the folders whose wildcards match the same text."""
    if len(images) == len(masks) == 1:
        return [(images[0], masks[0])]
    by_wildcards = {each.wildcards: each for each in masks}
    if len(by_wildcards) == len(masks) == len(images) and all(
        each.wildcards in by_wildcards for each in images
    ):
        return [(each, by_wildcards[each.wildcards]) for each in images]
    alone = [each.path for each in images if each.wildcards not in by_wildcards]
    named = f", and {shown(alone[0])} has no partner" if alone else ""
    raise UsageError(
        f"{url}: --images and --masks select {pluralize(len(images), 'folder')} and "
        f"{pluralize(len(masks), 'folder')}{named}; each * must match the same text in both"
    )


def _partner(folders: Folders, role: Role, given: _Selected) -> _Selected:
    """Returns the folder of `role` that belongs to a given one of the other role."""
    files = folders.images if role == "images" else folders.masks
    known = [path for path in sorted(files) if meaning_of(path).role == role]
    beside = [path for path in known if _num_different(path, given.path) == 1]
    above = [given.path.rpartition("/")[0]] if given.path else []
    found = beside or [path for path in above if path in files]
    if not found:
        raise UsageError(without_partner(folders.url, given.path))
    return _Selected(only(folders.url, role, found), ())


def _num_different(path: str, other: str) -> int | None:
    parts, others = path.split("/"), other.split("/")
    if len(parts) != len(others):
        return None
    return sum(part != its for part, its in zip(parts, others, strict=True))
