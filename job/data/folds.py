"""Selects the splits of a run: those of its dataset, or those of the fold that it trains.

The run of fold k is evaluated on fold k, validates on fold k + 1 (which selects the best epoch) and
trains on the others. The test split of the dataset is not used.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from data_prep.splits.split import assign_folds
from job.config import TrainConfig, checked_run_name
from job.data.dataset import Dataset, Split, open_dataset


def is_cross_validation(config: TrainConfig) -> bool:
    """Returns whether `config` trains all folds, not only one of them."""
    return config.folds is not None and config.fold is None


def fold_configs(config: TrainConfig) -> list[TrainConfig]:
    """Returns the configs of the runs of all folds.

    Raises:
        UsageError: the name of a run is too long.
    """
    return [
        config.model_copy(update={"fold": k, "name": checked_run_name(f"{config.name}-fold-{k}")})
        for k in range(config.folds or 0)
    ]


def open_folded(config: TrainConfig, url: str | None = None) -> Dataset:
    """Returns the dataset of `config`, divided into the splits of its fold if it has one.

    Args:
        url: current URL of the dataset; None: the URL in the config.
    """
    dataset = open_dataset(url or str(config.data))
    if config.folds is None or config.fold is None:
        return dataset
    return fold_of(dataset, config.folds, config.fold)


def fold_of(dataset: Dataset, num_folds: int, fold: int) -> Dataset:
    """Returns `dataset` with `fold` as its test split, the next as valid, the others as train.

    The folds equal those of `prep --num-folds` with the seed of the dataset; groups stay whole.

    Raises:
        UsageError: there are fewer groups than folds.
    """
    parts = [dataset.splits[name] for name in ("train", "valid") if name in dataset.splits]
    ids = [sample for part in parts for sample in part.ids]
    groups = [group for part in parts for group in part.groups]
    members = dict(zip(ids, groups, strict=True))
    folds = assign_folds(members, num_folds=num_folds, seed=dataset.manifest.seed)
    role = {fold: "test", (fold + 1) % num_folds: "valid"}
    names = np.array([role.get(folds[sample], "train") for sample in ids])
    splits = {name: _joined(name, parts, names == name) for name in ("train", "valid", "test")}
    return replace(dataset, splits=splits, fold=(fold, num_folds))


def split_words(name: str, fold: Sequence[int] | None) -> str:
    """Returns the words for split `name` in reports; `fold` as in `Dataset`."""
    if fold is None:
        return f"the {name} split"
    if name == "train":
        return f"the train split of the run of {fold_words(fold)}"
    if name == "valid":
        return f"the valid split of the run of {fold_words(fold)}"
    return fold_words(fold)


def evaluated_words(config: TrainConfig) -> str:
    """Returns the words for the cases on which a run is evaluated."""
    if config.folds is None or config.fold is None:
        return split_words("test", None)
    return split_words("test", (config.fold, config.folds))


def fold_words(fold: Sequence[int]) -> str:
    """Returns the words for fold (k, number of folds).

    People count folds from 1; options and names on disk count from 0.
    """
    index, num_folds = fold
    return f"fold {index + 1} of {num_folds} (--fold {index})"


def _joined(name: str, parts: Sequence[Split], chosen: np.ndarray) -> Split:
    """Returns the `chosen` samples of all parts, in order, as one split."""

    def pick(field: str) -> tuple[Any, ...]:
        values = [value for part in parts for value in getattr(part, field)]
        return tuple(value for value, is_in in zip(values, chosen, strict=True) if is_in)

    return Split(
        name=name,
        ids=pick("ids"),
        filenames=pick("filenames"),
        groups=pick("groups"),
        shards=pick("shards"),
        offsets=np.array(pick("offsets"), np.int64),
        lengths=np.array(pick("lengths"), np.int64),
        geometries=pick("geometries"),
        spacings=pick("spacings"),
        source_images=pick("source_images"),
        has_foreground=np.array(pick("has_foreground"), bool),
    )
