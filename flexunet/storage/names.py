"""Checks object names for safety, and joins them to URLs and local paths."""

import itertools
import os
import re
import unicodedata

from flexunet.errors import ContentError
from flexunet.text import is_invisible

HIDDEN = ".flexunet-"  # our own temporary and lock files; never listed, never a name
TEMPORARY = f"{HIDDEN}tmp-"
LOCK = f"{HIDDEN}lock"
_MAX_PART_BYTES = 255  # NAME_MAX of every Linux file system
_MAX_NAME_BYTES = 1024  # https://cloud.google.com/storage/docs/objects#naming


def join_url(url: str, *parts: str) -> str:
    """Returns `url` with `parts` below it, one slash between them."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def checked_name(name: str) -> str:
    """Returns `name` when it is a safe object name.

    Names come from listings and manifests, so they are not trusted: whoever accepts one may join
    it to a folder.

    Raises:
        ContentError: it is empty, absolute or could leave its folder, or holds characters that one
            of the storages or a terminal would not keep as they are.
    """
    problem = name_problem(name)
    if problem:
        raise ContentError(f"object name {shown(name)} is refused: {problem}; rename the object")
    return name


def name_problem(name: str) -> str | None:
    """Returns why `name` is not a safe object name (see `checked_name`), None when it is."""
    problem = next(filter(None, map(_character_problem, name)), None)
    if problem:
        return problem
    if not unicodedata.is_normalized("NFC", name):
        return "it is not in Unicode normal form C"
    if "\\" in name:
        return "it holds a backslash"
    if re.match(r"[A-Za-z]:", name):
        return "it starts with a drive letter"
    parts = name.split("/")
    if "" in parts:
        return "it is absolute, or a part of it is empty"
    problem = next(filter(None, map(_part_problem, parts)), None)
    if problem is None and len(name.encode()) > _MAX_NAME_BYTES:
        return f"it is longer than {_MAX_NAME_BYTES} bytes"
    return problem


def _character_problem(character: str) -> str | None:
    if unicodedata.category(character) == "Cs":
        return "it is not UTF-8"
    if unicodedata.category(character) in ("Cc", "Zl", "Zp"):
        return f"it holds the control character {character!a}"
    if is_invisible(character):  # the name could look like another one
        return f"it holds {character!a}, which is invisible or turns the text around"
    return None


def _part_problem(part: str) -> str | None:
    if part in (".", ".."):
        return f"it holds {part!r}"
    if part.startswith(HIDDEN):
        return f"names that start with {HIDDEN!r} are reserved"
    if len(part.encode()) > _MAX_PART_BYTES:
        return f"a part of it is longer than {_MAX_PART_BYTES} bytes"
    return None


def local_path(root: str, name: str) -> str:
    """Returns the path of object `name` in the folder `root`.

    Raises:
        ContentError: the name is not safe, or a symbolic link leads out of `root`.
    """
    path = os.path.join(root, checked_name(name))
    # Without a link below the root it is inside; to resolve both asks for every folder above.
    if _has_link(root, name) and not is_inside(os.path.realpath(path), os.path.realpath(root)):
        raise ContentError(f"{path}: a symbolic link leads out of {root}; copy the file into it")
    return path


def _has_link(root: str, name: str) -> bool:
    parts = itertools.accumulate(name.split("/"), os.path.join)
    return any(os.path.islink(os.path.join(root, part)) for part in parts)


def is_inside(path: str, root: str) -> bool:
    """Returns whether `path` is the folder `root` or in it, by their texts alone."""
    return path == root or path.startswith(root.rstrip("/") + "/")


def shown(name: str) -> str:
    """Returns a name as a message may hold it: short, and in ASCII."""
    return ascii(name if len(name) <= 100 else name[:100] + "...")
