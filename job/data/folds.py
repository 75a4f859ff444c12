"""The splits of a run: those of its dataset, or, where it trains a fold, those of the fold.

Fold k is evaluated, fold k + 1 validates (it chooses the epoch), the others train; the dataset's
test split is not touched.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from data_prep.splits.split import assign_folds
from job.config import TrainConfig, checked_run_name
from job.data.dataset import Dataset, Split, open_dataset


def is_cross_validation(config: TrainConfig) -> bool:
    """Returns whether `config` is of all folds, and not of a run that trains one of them."""
    return config.folds is not None and config.fold is None


def fold_configs(config: TrainConfig) -> list[TrainConfig]:
    """Returns the config of every fold's run.

    Raises:
        UsageError: the names would be too long.
    """
    return [
        config.model_copy(update={"fold": k, "name": checked_run_name(f"{config.name}-fold-{k}")})
        for k in range(config.folds or 0)
    ]


def open_folded(config: TrainConfig, url: str | None = None) -> Dataset:
    """Returns the dataset of `config`, its splits those of the fold where one is named.

    Args:
        url: where the dataset is now; None: as the config says.
    """
    dataset = open_dataset(url or str(config.data))
    if config.folds is None or config.fold is None:
        return dataset
    return fold_of(dataset, config.folds, config.fold)


def fold_of(dataset: Dataset, num_folds: int, fold: int) -> Dataset:
    """Returns `dataset` with `fold` as its test split, the next as valid, the others as train.

    Folds are those of `prep --num-folds`, by the dataset's own seed; groups stay whole.

    Raises:
        UsageError: fewer groups than folds.
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
    """Returns what people are told of split `name`; `fold` as in `Dataset`."""
    if fold is None:
        return f"the {name} split"
    if name == "train":
        return f"what trains {fold_words(fold)}"
    if name == "valid":
        return f"what validates {fold_words(fold)}"
    return fold_words(fold)


def evaluated_words(config: TrainConfig) -> str:
    """Returns what people are told of the cases on which a run is evaluated."""
    if config.folds is None or config.fold is None:
        return split_words("test", None)
    return split_words("test", (config.fold, config.folds))


def fold_words(fold: Sequence[int]) -> str:
    """Returns (k, of how many) in words."""
    index, num_folds = fold
    return f"fold {index} (of 0 to {num_folds - 1})"


def _joined(name: str, parts: Sequence[Split], chosen: np.ndarray) -> Split:
    """Returns the `chosen` samples of the parts one after the other."""

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
