"""Lists the files below a folder, with or without following its symbolic links."""

import contextlib
import functools
import logging
import os
import stat as stat_module
from collections.abc import Iterator

from flexunet.storage.names import HIDDEN, is_inside
from flexunet.text import pluralize

logger = logging.getLogger(__name__)


def walk(
    folder: str, name: str, real_root: str, left_out: list[str]
) -> Iterator[tuple[str, os.stat_result]]:
    """Yields (object name, stat) of the files below `folder`, whose object prefix is `name`.

    Adds symbolic links that are not followed to `left_out`.
    """
    for entry, entry_name in _entries(folder, name):
        if entry.is_dir(follow_symlinks=False):
            yield from walk(entry.path, entry_name, real_root, left_out)
        elif entry.is_symlink() and not (
            os.path.isfile(entry.path) and is_inside(os.path.realpath(entry.path), real_root)
        ):
            left_out.append(entry.path)
        elif entry.is_file() and not entry.name.startswith(HIDDEN):
            with contextlib.suppress(FileNotFoundError):  # just deleted
                yield entry_name, entry.stat()


def walk_links(
    folder: str, name: str, above: frozenset[tuple[int, int]], left_out: list[str]
) -> Iterator[tuple[str, os.stat_result]]:
    """Yields like `walk`, but follows all links; a broken link has its own stat.

    Adds links to a parent folder to `left_out`.

    Args:
        above: (device, inode) of `folder` and of all its parent folders.
    """
    for entry, entry_name in _entries(folder, name):
        with contextlib.suppress(FileNotFoundError):  # just deleted
            info = _stat_target(entry)
            if not stat_module.S_ISDIR(info.st_mode):
                is_known = stat_module.S_ISREG(info.st_mode) or stat_module.S_ISLNK(info.st_mode)
                if is_known and not entry.name.startswith(HIDDEN):
                    yield entry_name, info
            elif (info.st_dev, info.st_ino) in above:
                left_out.append(entry.path)
            else:
                here = above | {(info.st_dev, info.st_ino)}
                yield from walk_links(entry.path, entry_name, here, left_out)


def _entries(folder: str, name: str) -> list[tuple[os.DirEntry[str], str]]:
    """Returns the entries of `folder` with their object names; none if it is missing."""
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [(entry, f"{name}/{entry.name}" if name else entry.name) for entry in entries]


def _stat_target(entry: os.DirEntry[str]) -> os.stat_result:
    """Returns the stat of a link's target if that is a file or folder, else the entry's stat."""
    if entry.is_symlink():
        with contextlib.suppress(OSError):  # target missing, circular or not permitted
            info = os.stat(entry.path)
            if stat_module.S_ISREG(info.st_mode) or stat_module.S_ISDIR(info.st_mode):
                return info
    return entry.stat(follow_symlinks=False)


def with_folders_above(folder: str) -> frozenset[tuple[int, int]]:
    """Returns (device, inode) of a folder and its parents; none if the folder is missing."""
    path, found = os.path.realpath(folder), set()
    with contextlib.suppress(FileNotFoundError):
        while True:
            info = os.stat(path)
            found.add((info.st_dev, info.st_ino))
            if path == os.path.dirname(path):
                break
            path = os.path.dirname(path)
    return frozenset(found)


def size_of(info: os.stat_result) -> int:
    """Returns the size of a listed file in bytes, 0 for a broken link."""
    return 0 if stat_module.S_ISLNK(info.st_mode) else info.st_size


@functools.lru_cache(maxsize=1024)  # a folder is listed many times
def log_left_out(url: str, number: int, where: str, first: str) -> None:
    """Warns once about links below `url` that are not listed."""
    links = pluralize(number, "symbolic link")
    logger.warning("%s: skipped %s %s, first %s", url, links, where, first)
