"""Finds the rule by which the names of masks follow from the names of images.

The module compares stems; it does not depend on folders or storage.

A rule is a prefix and a suffix on each side: with `("", "_training")` for images and `("",
"_manual1")` for masks, `21_training` has the mask `21_manual1`. One rule pairs all images. It is
accepted if it leaves no file over, or if no other rule pairs more than half as many.
"""

import functools
import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from flexunet.errors import UsageError
from flexunet.text import pluralize

STEM = "{stem}"
MASK_WORDS = frozenset(
    (
        *("mask", "masks", "label", "labels", "gt", "gts", "groundtruth", "groundtruths"),
        *("annotation", "annotations", "segmentation", "segmentations", "segmentationclass"),
        *("seg", "segs", "manual", "manual1", "1stmanual"),
    )
)

_Stems = Collection[str]
_MAX_SAMPLES = 8  # images whose names propose rules
_MAX_PARTNERS = 32  # masks that are compared with each of them
_MAX_SHARING = 2000  # masks with a token that still says which image is theirs
_MAX_RULES = 64  # that are tried on all names
_MIN_SHARE = 0.5  # a rule pairs more of the images, or of the masks
_EXAMPLES = 3
_ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".npz", ".png", ".tif", ".tiff")
_SEPARATORS = " _-."
_TOKEN = re.compile(r"[a-z]+|[0-9]+|[A-Z]+[a-z]*|[^\W\d_]+")


@dataclass(frozen=True)
class NameRule:
    """The text around the key that an image and its mask have in common: (prefix, suffix)."""

    image: tuple[str, str] = ("", "")
    mask: tuple[str, str] = ("", "")

    def mask_of(self, image: str) -> str | None:
        """Returns the stem of the mask of the image with the stem `image`."""
        key = _without(image, self.image)
        return None if key is None else key.join(self.mask)

    def image_of(self, mask: str) -> str | None:
        """Returns the stem of the image of the mask with the stem `mask`."""
        key = _without(mask, self.mask)
        return None if key is None else key.join(self.image)

    def match(self, images: _Stems, masks: _Stems) -> dict[str, tuple[str, ...]]:
        """Returns the stems of the masks of each image that has one."""
        pairs = ((image, self.mask_of(image)) for image in images)
        return {image: (mask,) for image, mask in pairs if mask is not None and mask in masks}

    def is_image(self, stem: str) -> bool:
        """Returns whether the rule gives a mask to the image with this stem."""
        return self.mask_of(stem) is not None

    @property
    def patterns(self) -> tuple[str | None, str]:
        """The values of --image-name and --mask-name; None for image names that are the key."""
        return STEM.join(self.image) if any(self.image) else None, STEM.join(self.mask)

    def as_options(self) -> str:
        """Returns the options of `prep` that state the rule, as text for a message."""
        image, mask = self.patterns
        of_image = "" if image is None else f'--image-name "{image}" '
        return f'{of_image}--mask-name "{mask}"'


EQUAL = NameRule()


class SeveralRules(UsageError):
    """More than one rule pairs images and masks.

    Attributes:
        rules: the rules with their numbers of pairs, the largest number first.
    """

    def __init__(self, text: str, rules: Sequence[tuple["NameRule", int]] = ()) -> None:
        super().__init__(text)
        self.rules = tuple(rules)


@dataclass(frozen=True)
class NamePatterns:
    """A rule that the user gave: patterns with `{stem}` and the wildcards `*`, `?` and `[...]`.

    `mask` may match several masks of one image. Without `{stem}`, its masks belong to the only
    image of their folder.

    Raises:
        UsageError: a pattern is malformed.
    """

    image: str = STEM
    mask: str = STEM

    def __post_init__(self) -> None:
        for option, text in (("--image-name", self.image), ("--mask-name", self.mask)):
            wrong = _wrong_pattern(text, needs_stem=option == "--image-name")
            if wrong:
                raise UsageError(f'{option} {text!r}: {wrong}; write for example "{{stem}}_mask"')

    def match(self, images: _Stems, masks: _Stems) -> dict[str, tuple[str, ...]]:
        """Returns the stems of the masks of each image that has one; sorted.

        Raises:
            UsageError: a mask belongs to several images.
        """
        of_image = _compiled(self.image)
        keys: dict[str, list[str]] = {}
        for image in sorted(images):
            found = of_image.fullmatch(image)
            if found:
                keys.setdefault(found["stem"], []).append(image)
        lengths = sorted({len(key) for key in keys})
        matched: dict[str, list[str]] = {}
        for mask in sorted(masks):
            owners = [image for key in self._keys_in(mask, keys, lengths) for image in keys[key]]
            if len(owners) > 1:
                raise UsageError(
                    f"--mask-name {self.mask!r}: mask {mask} belongs to the images {owners[0]} and "
                    f"{owners[1]}; give a pattern that names one image"
                )
            for image in owners:
                matched.setdefault(image, []).append(mask)
        return {image: tuple(found) for image, found in matched.items()}

    def is_image(self, stem: str) -> bool:
        """Returns whether the rule gives a mask to the image with this stem."""
        return _compiled(self.image).fullmatch(stem) is not None

    def as_options(self) -> str:
        """Returns the options of `prep` that state the rule, as text for a message."""
        of_image = "" if self.image == STEM else f'--image-name "{self.image}" '
        return f'{of_image}--mask-name "{self.mask}"'

    def split(self, stems: _Stems) -> tuple[set[str], set[str]]:
        """Returns the stems of images and of masks in a folder that contains both.

        A mask matches the pattern with the stem of another file.
        """
        keys = dict.fromkeys(stems)
        lengths = sorted(set(map(len, keys)))
        masks = {s for s in stems if any(key != s for key in self._keys_in(s, keys, lengths))}
        return set(stems) - masks, masks

    def _keys_in(
        self, mask: str, keys: Mapping[str, object], lengths: Sequence[int]
    ) -> Iterator[str]:
        """Yields the keys for which the pattern matches `mask`."""
        before, has_stem, after = self.mask.partition(STEM)
        if not has_stem:
            yield from keys if _compiled(self.mask).fullmatch(mask) else ()
            return
        first, last = _compiled(before), _compiled(after)
        seen = set()
        for start in range(len(mask)):
            if not first.fullmatch(mask, 0, start):
                continue
            for length in lengths:
                key = mask[start : start + length]
                fits = key in keys and key not in seen and start + length <= len(mask)
                if fits and last.fullmatch(mask, start + length):
                    seen.add(key)
                    yield key


Naming = NameRule | NamePatterns


_Pairs = frozenset[tuple[int, str, str]]  # (number of the folder, image, mask)


def find_rule(folders: Sequence[tuple[_Stems, _Stems]], where: str) -> NameRule | None:
    """Returns the one rule that pairs most images of all `folders`; None if there is none.

    Args:
        folders: the stems of images and masks of each.
        where: the place in errors.

    Raises:
        SeveralRules: several rules are possible: each pairs more than half as many as the best,
            which leaves files over.
    """
    tried: dict[_Pairs, NameRule] = {}
    for rule in _candidates(folders):
        pairs = frozenset(
            (number, image, found[0])
            for number, (images, masks) in enumerate(folders)
            for image, found in rule.match(images, masks).items()
        )
        if pairs:
            tried.setdefault(pairs, rule)
    best: _Pairs = max(tried, key=len, default=frozenset())
    counts = [sum(len(stems[side]) for stems in folders) for side in (0, 1)]
    rivals = [pairs for pairs in tried if not pairs <= best and 2 * len(pairs) > len(best)]
    if rivals and counts != [len(best)] * 2:
        possible = {pairs: tried[pairs] for pairs in (best, *rivals)}
        rules = [(rule, len(pairs)) for pairs, rule in possible.items()]
        raise SeveralRules(_ambiguous(where, possible), sorted(rules, key=lambda each: -each[1]))
    share = max(len(best) / max(1, count) for count in counts)
    return tried[best] if share > _MIN_SHARE else None


def split_one_folder(stems: _Stems) -> tuple[set[str], set[str]]:
    """Returns the stems of images and of masks in a folder that contains both.

    A mask has one of `MASK_WORDS` as a word of its name.
    """
    masks = {stem for stem in stems if not MASK_WORDS.isdisjoint(_words(stem))}
    return set(stems) - masks, masks


def _words(stem: str) -> Iterator[str]:
    yield from (token.lower() for token in _TOKEN.findall(stem))
    for part in re.split(r"[\W_]+", stem.lower()):
        yield part
        yield from re.findall("[a-z]+", part)


def _ambiguous(where: str, tried: Mapping[_Pairs, NameRule]) -> str:
    shown = []
    for pairs, rule in list(tried.items())[:_EXAMPLES]:
        _, image, mask = min(pairs)
        shown.append(f"{image} with {mask} ({pluralize(len(pairs), 'pair')}: {rule.as_options()})")
    more = f", and {len(tried) - _EXAMPLES} more" if len(tried) > _EXAMPLES else ""
    return (
        f"{where}: more than one rule pairs images and masks: {', '.join(shown)}{more}; "
        "choose one of these options"
    )


def _candidates(folders: Sequence[tuple[_Stems, _Stems]]) -> list[NameRule]:
    """Returns the rules to try, without duplicates."""
    votes: Counter[NameRule] = Counter()
    for images, masks in folders:
        by_token: dict[str, list[str]] = {}
        for mask in sorted(masks):
            for token in set(_TOKEN.findall(mask)):
                by_token.setdefault(token, []).append(mask)
        for image in _samples(sorted(images)):
            votes.update(list(dict.fromkeys(_rules_of(image, by_token))))
    pooled = (
        [i for images, _ in folders for i in images],
        [m for _, masks in folders for m in masks],
    )
    common = (rule for each in (*folders, pooled) for rule in _common_rules(*each))
    voted = (rule for rule, _ in votes.most_common(_MAX_RULES))
    return list(dict.fromkeys([EQUAL, *common, *voted]))


def _rules_of(image: str, by_token: Mapping[str, Sequence[str]]) -> Iterator[NameRule]:
    """Yields the rules of the pairs of `image` and the masks with most tokens in common."""
    shared: Counter[str] = Counter()
    for token in set(_TOKEN.findall(image)):
        found = by_token.get(token, ())
        shared.update(found if len(found) <= _MAX_SHARING else ())
    for mask, _ in shared.most_common(_MAX_PARTNERS):
        match = SequenceMatcher(None, image, mask, autojunk=False).find_longest_match()
        rule = NameRule(
            (image[: match.a], image[match.a + match.size :]),
            (mask[: match.b], mask[match.b + match.size :]),
        )
        yield from _tidied(rule, image[match.a : match.a + match.size])


def _common_rules(images: _Stems, masks: _Stems) -> Iterator[NameRule]:
    """Yields the rules that are left if all images and all masks have a partner.

    Then the text that all images have at their start, and all masks, belongs to no key, or to all.
    """
    if len(images) < 2 or len(masks) < 2:
        return
    for image, mask in itertools.product(_common_affixes(images), _common_affixes(masks)):
        before = len(_common_end([image[0], mask[0]]))
        after = len(_common_start([image[1], mask[1]]))
        rule = NameRule(
            (image[0][: len(image[0]) - before], image[1][after:]),
            (mask[0][: len(mask[0]) - before], mask[1][after:]),
        )
        left, right = image[0][len(image[0]) - before :], image[1][:after]
        yield from _tidied(rule, f"{left}a{right}")


def _common_affixes(stems: _Stems) -> Iterator[tuple[str, str]]:
    """Yields the prefix and the suffix of all stems; in two ways, because they may overlap."""
    prefix, suffix = _common_start(stems), _common_end(stems)
    yield prefix, _common_end([stem[len(prefix) :] for stem in stems])
    yield _common_start([stem[: len(stem) - len(suffix)] for stem in stems]), suffix


def _tidied(rule: NameRule, key: str) -> Iterator[NameRule]:
    """Yields the rule with separators at the ends of `key` moved to the text around it, and itself.

    So `21_training` and `21_manual1` have `{stem}_training`, and not `{stem}training`. A key that
    is a separator only has no other rule.
    """
    image, mask = rule.image, rule.mask
    core = key.strip(_SEPARATORS)
    if core and rule != EQUAL:
        start = key.index(core)
        left = key[:start] if image[0] or mask[0] else ""
        right = key[start + len(core) :] if image[1] or mask[1] else ""
        yield NameRule((image[0] + left, right + image[1]), (mask[0] + left, right + mask[1]))
    yield rule


def _common_start(texts: Collection[str]) -> str:
    first, last = min(texts), max(texts)
    pairs = enumerate(zip(first, last, strict=False))
    length = next((i for i, (a, b) in pairs if a != b), len(first))
    return first[:length]


def _common_end(texts: Collection[str]) -> str:
    return _common_start([text[::-1] for text in texts])[::-1]


def _samples(stems: Sequence[str]) -> Sequence[str]:
    step = max(1, len(stems) // _MAX_SAMPLES)
    return stems[::step][:_MAX_SAMPLES]


def _without(stem: str, affix: tuple[str, str]) -> str | None:
    """Returns the key of a stem, None if it lacks the prefix or the suffix, or has no key."""
    prefix, suffix = affix
    fits = stem.startswith(prefix) and stem.endswith(suffix)
    is_long = len(stem) > len(prefix) + len(suffix)
    return stem[len(prefix) : len(stem) - len(suffix)] if fits and is_long else None


_WILDCARD = re.compile(r"(\*|\?|\[[^\[\]]+\])")


def glob_as_regex(pattern: str, *, captures: bool = False) -> str:
    """Returns the regular expression of a name's pattern with `*`, `?` and `[...]`.

    Args:
        captures: each wildcard is a group.
    """
    group = "({})" if captures else "{}"
    return "".join(
        group.format(_wildcard_as_regex(piece)) if _WILDCARD.fullmatch(piece) else re.escape(piece)
        for piece in _WILDCARD.split(pattern)
    )


def _wildcard_as_regex(piece: str) -> str:
    if piece in ("*", "?"):
        return "[^/]*" if piece == "*" else "[^/]"
    inside = piece[1:-1]
    is_not = inside.startswith("!")
    letters = re.escape(inside[is_not:]).replace(r"\-", "-")
    return f"[{'^/' if is_not else ''}{letters}]"


@functools.lru_cache(maxsize=16)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile("(?P<stem>.+)".join(map(glob_as_regex, pattern.split(STEM))), re.DOTALL)


def _wrong_pattern(text: str, *, needs_stem: bool) -> str | None:
    """Returns what is wrong with a pattern of a stem, None if nothing is."""
    if text.count(STEM) > 1:
        return f"contains {STEM} more than once"
    if needs_stem and STEM not in text:
        return f"lacks {STEM}"
    if "/" in text:
        return "contains a slash, but is compared with file names"
    if not text or text.lower().endswith(
        (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif")
    ):
        return "must be a name without its ending"
    try:
        _compiled(text)
    except re.error as error:
        return f"is not a pattern ({error})"
    return None
