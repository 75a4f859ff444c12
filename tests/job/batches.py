"""Batches of the train split as the tests of `job.data` compare them, and damage to shards."""

from pathlib import Path
from typing import Any

import numpy as np

from job.data.dataset import Dataset
from job.data.pipeline import (
    EpochPlan,
    Replicas,
    iterate,
    make_batches,
)
from job.data.sampling import (
    global_batches,
    sample_order,
)
from job.data.shard_cache import open_reader

BATCH_SIZE = 4


def batches_of(
    dataset: Dataset, plan: np.ndarray, *, cache: str = "full", cache_dir: Path | None = None,
    **options: Any,
) -> list[dict[str, np.ndarray]]:  # fmt: skip
    """Returns every batch of the train split that `plan` asks for."""
    directory = None if cache_dir is None else str(cache_dir)
    reader = open_reader(dataset, dataset.split("train"), cache=cache, cache_dir=directory)
    names = ("first", "total", "local")
    replicas = Replicas(**{name: options.pop(name) for name in names if name in options})
    epoch_plan = EpochPlan(plan, **({"seed": 5, "epoch": 0} | options))
    batches = make_batches(dataset, reader, epoch_plan, replicas)
    elements = iterate(batches, reader)
    return [{name: value.numpy() for name, value in each.items()} for each in elements]


def plan_of(dataset: Dataset, *, epoch: int = 0) -> np.ndarray:
    order = sample_order(len(dataset.split("train")), seed=5, epoch=epoch, version=2)
    return global_batches(order, BATCH_SIZE)


def assert_same(first: list[dict[str, np.ndarray]], second: list[dict[str, np.ndarray]]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def shards_of(folder: Path, split: str = "train") -> list[Path]:
    return sorted(folder.glob(f"{split}-*.tfrecord"))
