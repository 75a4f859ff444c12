"""Finds problems of splits: groups or images in two splits, and classes missing in a split."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from data_prep.splits.names import SPLITS

_MAX_NAMED = 3  # files listed per split for one leak


def find_leaks(samples: Iterable[tuple[str, str, str, str | None]]) -> list[str]:
    """Returns a sentence for every group and every image that is in more than one split.

    Args:
        samples: (id, split, group, sha256 of the pixels) each; None for pixels that prove nothing,
            such as those of a blank image.
    """
    rows = sorted(samples, key=lambda row: row[:3])
    by_group: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    by_pixels: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for sample, split, group, pixels in rows:
        by_group[group][split].append(sample)
        if pixels is not None:
            by_pixels[pixels][split].append(sample)
    leaks = [
        f"group {group!r} is in {_files_by_split(places)}"
        for group, places in sorted(by_group.items())
        if len(places) > 1
    ]
    images = [
        f"the same image is in {_files_by_split(places)}"
        for places in by_pixels.values()
        if len(places) > 1
    ]
    return leaks + sorted(images)


def classes_missing(
    samples: Iterable[tuple[str, Sequence[int]]], classes: Sequence[str]
) -> list[str]:
    """Returns a sentence for every split or fold where a foreground class has no pixel.

    Args:
        samples: (place, pixels of each class) each; a place is a split or fold, in words.
        classes: names, in the order of the ids.
    """
    totals: dict[str, list[int]] = {}
    for place, pixels in samples:
        found = totals.setdefault(place, [0] * len(classes))
        totals[place] = [a + b for a, b in zip(found, pixels, strict=False)]
    return [
        f"{place} has no pixel of class {name}: its metrics say nothing about {name}"
        for place, found in sorted(totals.items(), key=lambda each: (len(each[0]), each[0]))
        for name, total in list(zip(classes, found, strict=True))[1:]
        if not total
    ]


def _files_by_split(places: Mapping[str, Sequence[str]]) -> str:
    texts = []
    for split in sorted(places, key=_split_order):
        named = ", ".join(places[split][:_MAX_NAMED])
        more = len(places[split]) - _MAX_NAMED
        texts.append(f"{split} ({named}{f' and {more} more' if more > 0 else ''})")
    return " and ".join(texts)


def _split_order(split: str) -> tuple[int, str]:
    known: tuple[str, ...] = SPLITS
    return (known.index(split) if split in known else len(known)), split
