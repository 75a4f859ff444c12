"""Divides samples into splits and folds that keep groups together.

The module reads names only, no images and no storage.

The same samples in any order and the same seed give the same division.
"""

import bisect
import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from data_prep.splits.names import SPLITS
from flexunet.errors import UsageError
from flexunet.text import pluralize


def check_fractions(values: tuple[float, float, float]) -> None:
    """Checks the shares of train, valid and test.

    Raises:
        ValueError: a share is negative, that of train is 0, or they do not add up to 1.
    """
    if min(values) < 0:
        raise ValueError("the three shares must be at least 0 and add up to 1")
    if abs(sum(values) - 1) > 1e-6:
        is_percent = abs(sum(values) - 100) < 1e-4
        fix = f"; write {','.join(f'{each / 100:g}' for each in values)}" if is_percent else ""
        raise ValueError(f"the shares must add up to 1{fix}")
    if values[0] == 0:
        raise ValueError("the share of train must be above 0")


def assign_splits(
    groups: Mapping[str, str], *, fractions: Mapping[str, float], seed: int
) -> dict[str, str]:
    """Returns the split of each id; a group is never divided.

    Groups are exchanged between splits until the number of samples of each split is as close as
    possible to its fraction. Every split with a fraction above 0 has at least one group.

    Args:
        groups: id -> group.
        fractions: split -> share of the samples; they add up to 1.

    Raises:
        UsageError: unknown split, fractions that do not add up to 1, or fewer groups than splits.
    """
    if not set(fractions) <= set(SPLITS):
        raise UsageError(f"splits {sorted(fractions)}: unknown; known: {', '.join(SPLITS)}")
    if min(fractions.values(), default=-1) < 0 or not math.isclose(
        sum(fractions.values()), 1, abs_tol=1e-6
    ):
        shares = ", ".join(f"{name} {share}" for name, share in fractions.items())
        raise UsageError(f"--fractions {shares}: each must be at least 0, and their sum 1")
    names: list[str] = [name for name in SPLITS if fractions.get(name, 0) > 0]
    place = _divide(groups, [fractions[name] for name in names], f"split {seed}", "splits")
    return {sample: names[place[group]] for sample, group in groups.items()}


def assign_folds(groups: Mapping[str, str], *, num_folds: int, seed: int) -> dict[str, int]:
    """Returns the fold 0..num_folds-1 of each id; groups stay whole, folds have about equal sizes.

    Raises:
        UsageError: fewer than two folds, or fewer groups than folds.
    """
    if num_folds < 2:
        raise UsageError(f"{pluralize(num_folds, 'fold')}: at least 2 are needed")
    place = _divide(groups, [1 / num_folds] * num_folds, f"fold {seed}", "folds")
    return {sample: place[group] for sample, group in groups.items()}


def _divide(
    groups: Mapping[str, str], shares: Sequence[float], salt: str, what: str
) -> dict[str, int]:
    """Returns the part 0..len(shares)-1 of each group, close to `shares` of the samples.

    Takes the groups in an order randomized by `salt` and adds each to the part that lacks most
    samples. Then moves or exchanges single groups as long as that improves the parts. The order
    does not depend on the sizes, so that large groups do not all end up in the largest part.
    """
    sizes = Counter(groups.values())
    if len(sizes) < len(shares):
        raise UsageError(
            f"{pluralize(len(sizes), 'group')} cannot fill {len(shares)} {what}; add samples, use "
            f"smaller groups, or request fewer {what}"
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
    """Moves or exchanges groups in place until no step reduces the sum of squares of `missing`."""
    while True:
        # Groups of equal size in a part are interchangeable: only the first is tried.
        first = [{sizes[group]: group for group in reversed(members)} for members in parts]
        ordered = [sorted(by_size) for by_size in first]
        steps = [
            (_gain(missing[giver], missing[taker], size - back), giver, taker, size, back)
            for giver in range(len(parts))
            for taker in range(len(parts))
            if missing[giver] < missing[taker]  # else every step is worse
            for size, back in _near_steps(
                ordered[giver],
                [0, *ordered[taker]] if len(parts[giver]) > 1 else ordered[taker],
                (missing[taker] - missing[giver]) / 2,
            )
        ]
        if not steps:
            return
        # Rounding errors could otherwise make the loop alternate between two states forever.
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
    """Yields (size, back) candidates: `size - back` is above 0 and closest to `ideal`.

    The gain is a parabola in `size - back` with its maximum at `ideal`. So for each size only the
    two `back` values beside the maximum are candidates; all pairs would take minutes.

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
