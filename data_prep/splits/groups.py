"""Finds the group of a sample from its file name or a table.

All samples of a group must be in one split: those of a patient, or an image with its augmented
copies. The module reads names only.
"""

import csv
import io
import os
import re
from collections.abc import Callable

from flexunet.errors import ContentError, UsageError

PRESETS = ("augmented",)
# Names of the copies made by the offline augmentation of the reference implementation
# (TensorFlow-FlexUNet).
_AUGMENTED = re.compile(
    r"(barrdistorted|pincdistorted|deformed|distorted|rotated|hflipped|vflipped|shrinked|sheared|"
    r"sharpened|brightened)_"
)


def augmented_group(filename: str) -> str:
    """Returns the number of the source image of an augmented copy.

    The reference implementation writes it last: `barrdistorted_1001_0.3_0.3_23.png` is made from
    `23.png`, which is in the same group.

    Raises:
        ContentError: the name does not end in a number.
    """
    stem = os.path.splitext(filename)[0]
    found = re.search(r"(?:^|_)([0-9]+)$", stem)
    if not found:
        raise ContentError(
            "the name does not end in _NUMBER, as --group-preset augmented expects; rename it, or "
            "give groups with --group-regex or --group-csv"
        )
    return str(int(found[1]))


def is_augmented_copy(filename: str) -> bool:
    """Returns whether the name is that of an augmented copy of the reference implementation."""
    return _AUGMENTED.match(filename) is not None


def regex_group(pattern: str) -> Callable[[str], str]:
    """Returns a function that finds a file name's group with a regular expression.

    The group is the first capture group of the pattern, or the whole match if it has none.

    Raises:
        UsageError: the pattern is not a regular expression.
        ContentError: (by the function) no match or an empty one; the message omits the name.
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
                remedy += ", or use --group-preset augmented: it looks like an augmented copy"
            raise ContentError(
                f"no group: {pattern!r} finds nothing in the file name (with its ending); {remedy}"
            )
        return value

    return group


def csv_group(text: str, where: str) -> Callable[[str], str]:
    """Returns a function that finds a file name's group in a table.

    Args:
        text: CSV with a header; columns `file` (or `id`: the name without its ending) and `group`.
        where: name of the table in errors.

    Raises:
        UsageError: another header, a row without a value, or two groups for one file.
        ContentError: (by the function) the file is not in the table.
    """
    rows = csv.DictReader(io.StringIO(text.removeprefix("\ufeff"), newline=""))
    heading = [name.strip().lower() for name in rows.fieldnames or ()]
    rows.fieldnames = heading
    key = next((name for name in ("file", "id") if name in heading), None)
    if key is None or "group" not in heading:
        raise UsageError(f"{where}: the columns are {heading}; expected file,group or id,group")
    groups: dict[str, str] = {}
    for row in rows:
        name, group = (row[key] or "").strip(), (row["group"] or "").strip()
        if not name or not group:
            raise UsageError(f"{where}: line {rows.line_num}: {key} or group is empty; fill it in")
        if groups.setdefault(name, group) != group:
            raise UsageError(
                f"{where}: {name} is in the groups {groups[name]} and {group}; keep one"
            )

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
    """Returns a function that finds the group of an image's file name (without folder).

    Without an option every file is its own group, named by its stem.

    Args:
        preset: one of `PRESETS`.
        regex: see `regex_group`.
        table: text and name of a CSV, see `csv_group`.

    Raises:
        UsageError: more than one option is given, or one is not valid.
    """
    if sum(option is not None for option in (preset, regex, table)) > 1:
        raise UsageError("more than one group option is given; keep one of preset, regex, csv")
    if regex is not None:
        return regex_group(regex)
    if table is not None:
        return csv_group(*table)
    if preset is None:
        return lambda filename: os.path.splitext(filename)[0]
    if preset not in PRESETS:
        raise UsageError(f"--group-preset {preset!r} is unknown; known: {', '.join(PRESETS)}")
    return augmented_group
