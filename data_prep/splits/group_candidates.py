"""Proposes how file names may say which images belong together, such as those of a patient.

Compares names only. A proposal is a guess: only the user knows what a number in a name means.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from data_prep.splits.groups import augmented_group, is_augmented_copy, regex_group
from flexunet.errors import ContentError

_MAX_CANDIDATES = 4
_MAX_PARTS = 4  # of a name, at its start or end
_MIN_GROUPS = 3  # fewer groups cannot fill three splits
_MAX_LARGEST = 0.5  # share of the images in the largest group
_MIN_AUGMENTED = 0.5  # share of the names that look like augmented copies
_EXAMPLES = 3
_SEPARATORS = "_-. "


@dataclass(frozen=True)
class GroupCandidate:
    """A possible rule for groups.

    Attributes:
        option, value: of `prep`: "group_regex" or "group_preset".
        num_groups: number of groups.
        smallest, median, largest: images in a group.
        num_shared: groups with images in several ready-made splits.
        examples: (group, names of two of its images) of a few large groups.
    """

    option: str
    value: str
    num_groups: int
    smallest: int
    median: int
    largest: int
    num_shared: int
    examples: tuple[tuple[str, tuple[str, ...]], ...]


def group_candidates(splits: Mapping[str, str | None]) -> tuple[GroupCandidate, ...]:
    """Returns the rules that divide images into plausible groups, the coarsest first.

    A rule is plausible if it fits all names and gives at least 3 groups, of which one has several
    images and none has more than half of them.

    Args:
        splits: ready-made split of each image by file name, None without one.
    """
    names = sorted(splits)
    found: dict[frozenset[tuple[str, ...]], GroupCandidate] = {}
    for option, value, rule in _rules(names):
        groups = _groups(names, rule)
        if groups is None or not _is_plausible(groups, len(names)):
            continue
        members = frozenset(tuple(each) for each in groups.values())
        found.setdefault(members, _candidate(option, value, groups, splits))
    ordered = sorted(found.values(), key=lambda each: (each.option, each.num_groups))
    return tuple(ordered[:_MAX_CANDIDATES])


def given_groups(
    splits: Mapping[str, str | None], option: str, value: str, rule: Callable[[str], str]
) -> tuple[GroupCandidate | None, dict[str, str]]:
    """Returns the groups by a rule that the user gave, and why other names have none.

    Args:
        splits: see `group_candidates`.
        option, value: see `GroupCandidate`.
        rule: returns the group of a file name, or raises ContentError.
    """
    groups: dict[str, list[str]] = {}
    problems: dict[str, str] = {}
    for name in sorted(splits):
        try:
            groups.setdefault(rule(name), []).append(name)
        except ContentError as error:
            problems[name] = str(error)
    return (_candidate(option, value, groups, splits) if groups else None), problems


def are_augmented(names: Sequence[str]) -> bool:
    """Returns whether at least half of the names are those of augmented copies."""
    num_copies = sum(map(is_augmented_copy, names))
    return num_copies > 0 and num_copies >= _MIN_AUGMENTED * len(names)


def _rules(names: Sequence[str]) -> Iterator[tuple[str, str, Callable[[str], str]]]:
    if are_augmented(names):
        # Other parts of such names are parameters of the deformation.
        yield "group_preset", "augmented", augmented_group
        return
    letters = r"^([A-Za-z]+[0-9]+)", r"^([0-9]+)", r"^([A-Za-z]+)"
    for pattern in (*_patterns_of_parts(names), *letters):
        yield "group_regex", pattern, regex_group(pattern)


def _patterns_of_parts(names: Sequence[str]) -> Iterator[str]:
    """Yields patterns of the first parts of a name, between the separators that names have."""
    found = {letter for name in names for letter in os.path.splitext(name)[0]}
    separators = [each for each in _SEPARATORS if each in found]
    if not separators:
        return
    joined = re.escape("".join(separators))
    part, gap = f"[^{joined}]+", f"[{joined}]"
    if len(separators) == 1:
        gap = r"\." if separators == ["."] else separators[0]
    for number in range(1, _MAX_PARTS + 1):
        yield f"^({gap.join([part] * number)}){gap}"


def _groups(names: Sequence[str], rule: Callable[[str], str]) -> dict[str, list[str]] | None:
    """Returns the names by group, None if the rule does not fit all names."""
    groups: dict[str, list[str]] = {}
    try:
        for name in names:
            groups.setdefault(rule(name), []).append(name)
    except ContentError:
        return None
    return groups


def _is_plausible(groups: Mapping[str, Sequence[str]], num_names: int) -> bool:
    largest = max((len(each) for each in groups.values()), default=0)
    return len(groups) >= _MIN_GROUPS and 1 < largest <= _MAX_LARGEST * num_names


def _candidate(
    option: str,
    value: str,
    groups: Mapping[str, Sequence[str]],
    splits: Mapping[str, str | None],
) -> GroupCandidate:
    sizes = sorted(map(len, groups.values()))
    shared = [each for each in groups.values() if len({splits[name] for name in each}) > 1]
    largest = sorted(groups, key=lambda group: (-len(groups[group]), group))[:_EXAMPLES]
    return GroupCandidate(
        option,
        value,
        len(groups),
        sizes[0],
        sizes[len(sizes) // 2],
        sizes[-1],
        len(shared),
        tuple((group, tuple(groups[group][:2])) for group in largest),
    )
