"""The group of a sample, found from its file name or a table.

A group is what must never be in two splits: a patient, or a picture with its deformed copies. The
module reads names only.
"""

import csv
import io
import os
import re
from collections.abc import Callable

from flexunet.errors import ContentError, UsageError

PRESETS = ("augmented",)
# How the reference implementation's off-line generator names its copies.
_AUGMENTED = re.compile(
    r"(barrdistorted|pincdistorted|deformed|distorted|rotated|hflipped|vflipped|shrinked|sheared|"
    r"sharpened|brightened)_"
)


def augmented_group(filename: str) -> str:
    """Returns the number of the picture that a deformed copy was made from.

    The reference implementation's generator writes it last: `barrdistorted_1001_0.3_0.3_23.png` is
    made from `23.png`, which is a member of its own group.

    Raises:
        ContentError: the name does not end so.
    """
    stem = os.path.splitext(filename)[0]
    found = re.search(r"(?:^|_)([0-9]+)$", stem)
    if not found:
        raise ContentError(
            "the name does not end in _NUMBER, as --group-preset augmented expects; rename it or "
            "give groups by --group-regex or --group-csv"
        )
    return str(int(found[1]))


def is_augmented_copy(filename: str) -> bool:
    """Returns whether the reference implementation's generator names its copies so."""
    return _AUGMENTED.match(filename) is not None


def regex_group(pattern: str) -> Callable[[str], str]:
    """Returns the function file name -> group by a regular expression searched in the name.

    The group is the first bracket of the pattern, or without one all that it matches.

    Raises:
        UsageError: the pattern is not a regular expression.
        ContentError: (by the function) no match, or an empty one; it does not repeat the name.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"--group-regex {pattern!r}: {error}; correct the expression") from error

    def group(filename: str) -> str:
        found = compiled.search(filename)
        value = found[min(1, compiled.groups)] if found else None
        if not value:
            remedy = "correct --group-regex"
            if is_augmented_copy(filename):
                remedy += ", or give --group-preset augmented instead: it looks like such a copy"
            raise ContentError(
                f"no group, {pattern!r} finds nothing in the file name (its ending belongs to it); "
                f"{remedy}"
            )
        return value

    return group


def csv_group(text: str, where: str) -> Callable[[str], str]:
    """Returns the function file name -> group by a table.

    Args:
        text: CSV with a heading; columns `file` (or `id`: the name without its ending) and `group`.
        where: what to call the table in errors.

    Raises:
        UsageError: another heading, a row without a value, or two groups for one file.
        ContentError: (by the function) the file is not in the table.
    """
    rows = csv.DictReader(io.StringIO(text.removeprefix("\ufeff"), newline=""))
    heading = [name.strip().lower() for name in rows.fieldnames or ()]
    rows.fieldnames = heading
    key = next((name for name in ("file", "id") if name in heading), None)
    if key is None or "group" not in heading:
        raise UsageError(f"{where}: columns {heading}; expected file,group or id,group")
    groups: dict[str, str] = {}
    for row in rows:
        name, group = (row[key] or "").strip(), (row["group"] or "").strip()
        if not name or not group:
            raise UsageError(f"{where}: line {rows.line_num}: {key} or group is empty; fill it in")
        if groups.setdefault(name, group) != group:
            raise UsageError(f"{where}: {name} is in the groups {groups[name]} and {group}")

    def group_of_file(filename: str) -> str:
        stem = os.path.splitext(filename)[0]
        found = groups.get(filename) or groups.get(stem)
        if found is None:
            raise ContentError(f"has no row in {where}; add one")
        return found

    return group_of_file


def group_of(
    *, preset: str | None = None, regex: str | None = None, table: tuple[str, str] | None = None
) -> Callable[[str], str]:
    """Returns the function image file name (no folder) -> group that the options ask for.

    Without an option every file is its own group, named by its stem.

    Args:
        preset: one of `PRESETS`.
        regex: see `regex_group`.
        table: text and name of a CSV, see `csv_group`.

    Raises:
        UsageError: more than one is given, or one is not valid.
    """
    if sum(option is not None for option in (preset, regex, table)) > 1:
        raise UsageError("groups are given in more than one way; keep one of preset, regex, csv")
    if regex is not None:
        return regex_group(regex)
    if table is not None:
        return csv_group(*table)
    if preset is None:
        return lambda filename: os.path.splitext(filename)[0]
    if preset not in PRESETS:
        raise UsageError(f"--group-preset {preset!r} is unknown; known: {', '.join(PRESETS)}")
    return augmented_group
