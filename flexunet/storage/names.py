"""Checks object names for safety, and joins them to URLs and local paths."""

import itertools
import os
import re
import unicodedata

from flexunet.errors import ContentError
from flexunet.text import is_invisible

HIDDEN = ".flexunet-"  # prefix of temporary and lock files; never listed, not allowed in names
TEMPORARY = f"{HIDDEN}tmp-"
LOCK = f"{HIDDEN}lock"
_MAX_PART_BYTES = 255  # NAME_MAX of every Linux file system
_MAX_NAME_BYTES = 1024  # https://cloud.google.com/storage/docs/objects#naming


def join_url(url: str, *parts: str) -> str:
    """Joins `url` and `parts` with one slash between them."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def checked_name(name: str) -> str:
    """Returns `name` if it is a safe object name.

    Names come from listings and manifests and are not trusted; a safe name can be joined to a
    folder.

    Raises:
        ContentError: the name is empty, absolute or could leave its folder, or contains characters
            that one of the storages or a terminal would change.
    """
    problem = name_problem(name)
    if problem:
        raise ContentError(
            f"object name {shown(name)} is not allowed: {problem}; rename the object"
        )
    return name


def name_problem(name: str) -> str | None:
    """Returns why `name` is not a safe object name (see `checked_name`), None if it is safe."""
    # Most names are ASCII without control characters: all of these are allowed.
    if not (name.isascii() and name.isprintable()):
        problem = next(filter(None, map(_character_problem, name)), None)
        if problem:
            return problem
        if not unicodedata.is_normalized("NFC", name):
            return "it is not in Unicode normal form C"
    if "\\" in name:
        return "it contains a backslash"
    if re.match(r"[A-Za-z]:", name):
        return "it starts with a drive letter"
    parts = name.split("/")
    if "" in parts:
        return "it is absolute or has an empty part"
    problem = next(filter(None, map(_part_problem, parts)), None)
    if problem is None and len(name.encode()) > _MAX_NAME_BYTES:
        return f"it is longer than {_MAX_NAME_BYTES} bytes"
    return problem


def _character_problem(character: str) -> str | None:
    if unicodedata.category(character) == "Cs":
        return "it is not UTF-8"
    if unicodedata.category(character) in ("Cc", "Zl", "Zp"):
        return f"it contains the control character {character!a}"
    if is_invisible(character):  # the name could look like another one
        return f"it contains {character!a}, which is invisible or reverses text"
    return None


def _part_problem(part: str) -> str | None:
    if part in (".", ".."):
        return f"it contains {part!r}"
    if part.startswith(HIDDEN):
        return f"names that start with {HIDDEN!r} are reserved"
    if len(part.encode()) > _MAX_PART_BYTES:
        return f"a part of it is longer than {_MAX_PART_BYTES} bytes"
    return None


def local_path(root: str, name: str) -> str:
    """Returns the path of object `name` in the folder `root`.

    Raises:
        ContentError: the name is not safe, or a symbolic link points outside `root`.
    """
    path = os.path.join(root, checked_name(name))
    # Without a link below the root, the path is inside; resolving both would stat all parents.
    if _has_link(root, name) and not is_inside(os.path.realpath(path), os.path.realpath(root)):
        raise ContentError(
            f"{path}: a symbolic link points outside {root}; copy the file into that folder"
        )
    return path


def _has_link(root: str, name: str) -> bool:
    parts = itertools.accumulate(name.split("/"), os.path.join)
    return any(os.path.islink(os.path.join(root, part)) for part in parts)


def is_inside(path: str, root: str) -> bool:
    """Returns whether `path` is `root` or below it, by text alone."""
    return path == root or path.startswith(root.rstrip("/") + "/")


def shown(name: str) -> str:
    """Returns a name for a message: shortened, in ASCII."""
    return ascii(name if len(name) <= 100 else name[:100] + "...")
