"""Groups of samples, splits and folds that keep a group together, and leaks of ready-made splits.

A group is what must never be in two splits: a patient, or a picture with its deformed copies.
Owns how samples are divided. It reads names and digests only: it must not know pictures
or storage.

The same set of samples, in any order, with the same seed gives the same division.
"""

import bisect
import csv
import hashlib
import io
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from data_prep.splits.names import SPLITS
from flexunet.errors import ContentError, UsageError
from flexunet.text import counted

PRESETS = ("augmented",)

# How the reference implementation's off-line generator names its copies.
_AUGMENTED = re.compile(
    r"(barrdistorted|pincdistorted|deformed|distorted|rotated|hflipped|vflipped|shrinked|sheared|"
    r"sharpened|brightened)_"
)

_MAX_NAMED = 3  # files of one group that a leak names, of each split


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


def assign_splits(
    groups: Mapping[str, str], *, fractions: Mapping[str, float], seed: int
) -> dict[str, str]:
    """Returns the split of each id; a group is never divided.

    The number of samples of a split is as near to its fraction as exchanging groups can bring it,
    and every split with a fraction above 0 has at least one group.

    Args:
        groups: id -> group.
        fractions: split -> share of the samples; they add up to 1.

    Raises:
        UsageError: unknown split, fractions that do not add up, or fewer groups than splits.
    """
    if not set(fractions) <= set(SPLITS):
        raise UsageError(f"splits {sorted(fractions)}: known are {', '.join(SPLITS)}")
    if min(fractions.values(), default=-1) < 0 or not math.isclose(
        sum(fractions.values()), 1, abs_tol=1e-6
    ):
        shares = ", ".join(f"{name} {share}" for name, share in fractions.items())
        raise UsageError(f"--fractions {shares}: each is at least 0 and together they are 1")
    names: list[str] = [name for name in SPLITS if fractions.get(name, 0) > 0]
    place = _divide(groups, [fractions[name] for name in names], f"split {seed}", "splits")
    return {sample: names[place[group]] for sample, group in groups.items()}


def assign_folds(groups: Mapping[str, str], *, num_folds: int, seed: int) -> dict[str, int]:
    """Returns the fold 0..num_folds-1 of each id; groups stay whole, folds are of equal size.

    Raises:
        UsageError: fewer than two folds, or fewer groups than folds.
    """
    if num_folds < 2:
        raise UsageError(f"{counted(num_folds, 'fold')}: at least 2 are needed")
    place = _divide(groups, [1 / num_folds] * num_folds, f"fold {seed}", "folds")
    return {sample: place[group] for sample, group in groups.items()}


def find_leaks(samples: Iterable[tuple[str, str, str, str | None]]) -> list[str]:
    """Returns a sentence for every group, and every picture, that is in more than one split.

    Args:
        samples: (id, split, group, sha256 of the pixels) each; None where the pixels are no
            evidence of anything, as those of a blank picture.
    """
    rows = sorted(samples, key=lambda row: row[:3])
    by_group: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    by_pixels: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for sample, split, group, pixels in rows:
        by_group[group][split].append(sample)
        if pixels is not None:
            by_pixels[pixels][split].append(sample)
    leaks = [
        f"group {group!r} is in {_places(places)}"
        for group, places in sorted(by_group.items())
        if len(places) > 1
    ]
    pictures = [
        f"the same picture is in {_places(places)}"
        for places in by_pixels.values()
        if len(places) > 1
    ]
    return leaks + sorted(pictures)


def count_duplicates(samples: Iterable[tuple[str, str, str, str]]) -> int:
    """Returns how many samples repeat the picture of another one of their split.

    Args:
        samples: as `find_leaks`.
    """
    count = Counter((split, pixels) for _, split, _, pixels in samples)
    return sum(number - 1 for number in count.values())


def classes_missing(
    samples: Iterable[tuple[str, Sequence[int]]], classes: Sequence[str]
) -> list[str]:
    """Returns a sentence for every place in which a class but the first has no pixel.

    Args:
        samples: (place, pixels of each class) each; a place is a split or a fold, in words.
        classes: names, in the order of the ids.
    """
    totals: dict[str, list[int]] = {}
    for place, pixels in samples:
        found = totals.setdefault(place, [0] * len(classes))
        totals[place] = [a + b for a, b in zip(found, pixels, strict=False)]
    return [
        f"{place} has no pixel of class {name}: its figures say nothing of how {name} is found"
        for place, found in sorted(totals.items(), key=lambda each: (len(each[0]), each[0]))
        for name, total in list(zip(classes, found, strict=True))[1:]
        if not total
    ]


def _places(places: Mapping[str, Sequence[str]]) -> str:
    texts = []
    for split in sorted(places, key=_split_order):
        named = ", ".join(places[split][:_MAX_NAMED])
        more = len(places[split]) - _MAX_NAMED
        texts.append(f"{split} ({named}{f' and {more} more' if more > 0 else ''})")
    return " and ".join(texts)


def _split_order(split: str) -> tuple[int, str]:
    known: tuple[str, ...] = SPLITS
    return (known.index(split) if split in known else len(known)), split


def _divide(
    groups: Mapping[str, str], shares: Sequence[float], salt: str, what: str
) -> dict[str, int]:
    """Returns the part 0..len(shares)-1 of each group, near to `shares` of the samples.

    Groups in an order drawn by `salt` go where most is missing; then single groups are moved or
    exchanged as long as that brings the parts nearer. Sizes play no role in the order, so that
    large groups do not all end up in the largest part.
    """
    sizes = Counter(groups.values())
    if len(sizes) < len(shares):
        raise UsageError(
            f"{counted(len(sizes), 'group')} cannot fill {len(shares)} {what}; add samples, group "
            f"them less coarsely, or ask for fewer {what}"
        )
    order = sorted(sizes, key=lambda group: (_draw(salt, group), group))
    missing = [share * len(groups) for share in shares]
    parts: list[list[str]] = [[] for _ in shares]
    for position, group in enumerate(order):
        empty = [part for part, members in enumerate(parts) if not members]
        is_last_chance = len(order) - position == len(empty)
        candidates = empty if is_last_chance else range(len(parts))
        part = max(candidates, key=lambda part: missing[part])
        parts[part].append(group)
        missing[part] -= sizes[group]
    _exchange(parts, missing, sizes)
    return {group: part for part, members in enumerate(parts) for group in members}


def _draw(salt: str, group: str) -> bytes:
    return hashlib.sha256(f"{salt} {group}".encode()).digest()


def _exchange(parts: list[list[str]], missing: list[float], sizes: Mapping[str, int]) -> None:
    """Moves or exchanges groups in place until no step lowers the sum of squares of `missing`."""
    while True:
        # Of the groups of one size in a part the first stands for all.
        first = [{sizes[group]: group for group in reversed(members)} for members in parts]
        ordered = [sorted(by_size) for by_size in first]
        steps = [
            (_gain(missing[giver], missing[taker], size - back), giver, taker, size, back)
            for giver in range(len(parts))
            for taker in range(len(parts))
            if missing[giver] < missing[taker]  # else every step makes the two more unlike
            for size, back in _near_steps(
                ordered[giver],
                [0, *ordered[taker]] if len(parts[giver]) > 1 else ordered[taker],
                (missing[taker] - missing[giver]) / 2,
            )
        ]
        if not steps:
            return
        # Rounding errors must not make two states look better than each other.
        gain, giver, taker, size, back = max(steps)
        if gain < 1e-6:
            return
        given = first[giver][size]
        parts[giver].remove(given)
        parts[taker].append(given)
        if back:
            returned = first[taker][back]
            parts[taker].remove(returned)
            parts[giver].append(returned)
        missing[giver] += size - back
        missing[taker] -= size - back


def _near_steps(
    given: Sequence[int], returned: Sequence[int], ideal: float
) -> Iterator[tuple[int, int]]:
    """Yields the (size, back) that can be best: `size - back` is above 0 and nearest to `ideal`.

    The gain is a parabola of `size - back` whose top is at `ideal`. So of all that can be returned
    for a size only the two neighbours of the top count; the whole product takes minutes.

    Args:
        given, returned: sizes, ascending.
    """
    for size in given:
        end = bisect.bisect_left(returned, size)
        place = bisect.bisect_left(returned, size - ideal, 0, end)
        for back in returned[max(0, place - 1) : min(place + 1, end)]:
            yield size, back


def _gain(giver: float, taker: float, moved: int) -> float:
    before = giver**2 + taker**2
    return before - (giver + moved) ** 2 - (taker - moved) ** 2
