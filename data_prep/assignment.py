"""Assigns each usable sample to a split and a fold, and warns of problems with them.

Decides which groups are merged and whether leaks are allowed; `splits` divides the groups.
"""

import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence

from data_prep.config import MAX_LISTED, PrepConfig
from data_prep.shards.source_pairs import EncodedSample
from data_prep.splits.leaks import classes_missing, find_leaks
from data_prep.splits.names import SPLITS
from data_prep.splits.split import assign_folds, assign_splits
from flexunet.errors import ContentError, UsageError
from flexunet.text import join_truncated, pluralize

logger = logging.getLogger(__name__)

_FEW_GROUPS = 5  # with fewer, one group changes the mean by more than a fifth


@dataclasses.dataclass(frozen=True)
class Assignment:
    """The group, split and fold of each sample id.

    Attributes:
        groups: after merging.
        folds: only of samples that have a fold.
    """

    groups: dict[str, str]
    splits: dict[str, str]
    folds: dict[str, int]
    is_leaky: bool


def check_usable(
    samples: Sequence[EncodedSample], refused: Sequence[tuple[str, str]], wanted: Collection[str]
) -> None:
    """Checks that the samples left after pass 1 suffice for a dataset; warns of skipped files.

    Args:
        refused: (file, reason) of each rejected file.
        wanted: ready-made splits that must not be empty.

    Raises:
        ContentError: no sample is left, a split is empty, or no mask has foreground.
    """
    if not samples:
        raise ContentError(f"none of {len(refused)} files is usable: {_named(refused)}")
    if refused:
        # Logged now, because rejects.csv is written later, and the next steps may fail.
        logger.warning("skipped %s: %s", pluralize(len(refused), "file"), _named(refused))
    _refuse_empty_splits(samples, wanted)
    _refuse_all_empty(samples)


def _named(refused: Sequence[tuple[str, str]]) -> str:
    """Returns the first rejected files with their reasons, and the number of the rest."""
    return join_truncated([_worded(*each) for each in refused], MAX_LISTED)


def _worded(file: str, reason: str) -> str:
    return reason if reason.startswith(file) else f"{file}: {reason}"


def _refuse_empty_splits(samples: Sequence[EncodedSample], wanted: Collection[str]) -> None:
    """Rejects a source with a split folder that has no usable pair.

    Otherwise the dataset would look complete, but training would have no images for that split.
    """
    filled = {sample.split for sample in samples}
    empty = [name for name in SPLITS if name in wanted and name not in filled]
    if empty:
        raise ContentError(
            f"no pair of {' and '.join(f'split {name}' for name in empty)} is usable (see the "
            "skipped files); replace these files, or remove the folder of the split"
        )


def _refuse_all_empty(samples: Sequence[EncodedSample]) -> None:
    """Rejects masks with unmapped colours if no pixel of all masks is foreground.

    The check of a single mask can miss an area of another colour with noise, such as JPEG's.
    """
    has_foreground = any(
        any(s.pixels_per_class[1:]) or (s.regions is not None and any(s.regions.regions))
        for s in samples
    )
    images = {s.image_id: s for s in samples}.values()
    others = [s.filename for s in images if s.unmapped_pixels]
    if others and not has_foreground:
        raise ContentError(
            f"all {len(images)} masks would be read as empty, but {len(others)} of them have "
            f"pixels in colours of no class, the first is {others[0]}; give the colours of "
            "these masks with --classes"
        )


def assign(samples: Sequence[EncodedSample], config: PrepConfig) -> Assignment:
    """Assigns each sample to its ready-made split or to a random one, and to a fold.

    Raises:
        UsageError: there are fewer groups than splits or folds.
        ContentError: the ready-made splits leak, and `config.allow_leaks` is off.
    """
    _log_blank(samples)
    groups, joined = _joined_groups(samples)
    try:
        return _divided(samples, groups, config)
    except UsageError as error:
        if not joined:
            raise
        raise UsageError(
            f"{error} ({pluralize(len(joined), 'group')} merged with another, because they share "
            f"an image: {join_truncated(joined, MAX_LISTED)})"
        ) from error


def _divided(
    samples: Sequence[EncodedSample], groups: dict[str, str], config: PrepConfig
) -> Assignment:
    if samples[0].split is None:
        fractions: dict[str, float] = dict(zip(SPLITS, config.fractions, strict=True))
        splits = assign_splits(groups, fractions=fractions, seed=config.seed)
        _warn_of_small_splits(groups, splits)
        is_leaky = False
    else:
        splits = _with_drawn_valid(samples, groups, config)
        is_leaky = _check_leaks(samples, config)
    folds = {}
    if config.num_folds is not None:
        members = {name: group for name, group in groups.items() if splits[name] != "test"}
        folds = assign_folds(members, num_folds=config.num_folds, seed=config.seed)
    return Assignment(groups, splits, folds, is_leaky)


def _with_drawn_valid(
    samples: Sequence[EncodedSample], groups: Mapping[str, str], config: PrepConfig
) -> dict[str, str]:
    """Returns the ready-made split of each sample; draws valid from train with --draw-valid."""
    splits = {sample.id: str(sample.split) for sample in samples}
    if config.draw_valid is None:
        return splits
    train = {name: groups[name] for name, split in splits.items() if split == "train"}
    fractions = {"train": 1 - config.draw_valid, "valid": config.draw_valid}
    drawn = assign_splits(train, fractions=fractions, seed=config.seed)
    _warn_of_small_splits(train, drawn, "--draw-valid")
    return splits | drawn


def _log_blank(samples: Sequence[EncodedSample]) -> None:
    blank = {sample.image_id: sample.filename for sample in samples if sample.is_blank}
    if blank:
        logger.warning(
            "%s blank (all pixels are equal); groups that share one are not merged: %s",
            "1 image is" if len(blank) == 1 else f"{len(blank)} images are",
            join_truncated(list(blank.values()), MAX_LISTED),
        )


def _warn_of_small_splits(
    groups: Mapping[str, str], splits: Mapping[str, str], option: str = "--fractions"
) -> None:
    for name in ("valid", "test"):
        num_groups = len({groups[sample] for sample, its in splits.items() if its == name})
        if 0 < num_groups < _FEW_GROUPS:
            logger.warning(
                "split %s has only %s, so its results are uncertain: increase its share in "
                "%s, or train with --folds",
                name,
                pluralize(num_groups, "group"),
                option,
            )


def warn_of_missing_classes(
    samples: Sequence[EncodedSample], assignment: Assignment, config: PrepConfig
) -> None:
    """Warns of every split and fold without a pixel of some class."""
    names = [each.name for each in config.color_map]
    in_splits = [(f"split {assignment.splits[s.id]}", s.pixels_per_class) for s in samples]
    in_folds = [
        (f"fold {assignment.folds[s.id] + 1} of {config.num_folds}", s.pixels_per_class)
        for s in samples
        if s.id in assignment.folds
    ]
    for line in classes_missing([*in_splits, *in_folds], names):
        logger.warning("%s", line)


def _joined_groups(samples: Sequence[EncodedSample]) -> tuple[dict[str, str], list[str]]:
    """Returns the group of each id, and the merged groups: those that share an image.

    Otherwise a duplicate image could be in both train and test. Blank images are skipped: images of
    different patients may both be blank.
    """
    parents: dict[str, str] = {}

    def root(group: str) -> str:
        while parents.setdefault(group, group) != group:
            group = parents[group]
        return group

    first_with: dict[str, str] = {}
    joined: list[str] = []
    for sample in samples:
        if sample.is_blank:
            continue
        first = first_with.setdefault(sample.image_sha256, sample.group)
        group, other = root(sample.group), root(first)
        if group != other:
            joined.append(f"{sample.group} with {first}")
            parents[max(group, other)] = min(group, other)
    if joined:
        logger.warning(
            "%s an image with another group and %s merged with it: %s",
            "1 group shares" if len(joined) == 1 else f"{len(joined)} groups share",
            "is" if len(joined) == 1 else "are",
            join_truncated(joined, MAX_LISTED),
        )
    return {sample.id: root(sample.group) for sample in samples}, joined


def _check_leaks(samples: Sequence[EncodedSample], config: PrepConfig) -> bool:
    """Returns whether the ready-made splits leak; raises unless `config` allows leaks."""
    images = {s.image_id: s for s in samples}.values()
    leaks = find_leaks(
        (s.image_id, str(s.split), s.group, None if s.is_blank else s.image_sha256) for s in images
    )
    if leaks and not config.allow_leaks:
        more = f"; and {len(leaks) - MAX_LISTED} more" if len(leaks) > MAX_LISTED else ""
        raise ContentError(
            f"the ready-made splits leak: {'; '.join(leaks[:MAX_LISTED])}{more}; fix them, or "
            "accept the leaks with --allow-leaks"
        )
    for leak in leaks[:MAX_LISTED]:
        logger.warning("leak: %s", leak)
    return bool(leaks)
