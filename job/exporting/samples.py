"""Chooses the images on which an export is checked: samples of the dataset, or generated ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.shards.manifest import Manifest
from flexunet.errors import FlexUNetError
from job.data.dataset import Dataset, open_dataset
from job.data.reader import read_sample
from job.data.shard_cache import open_reader
from job.runs.loading import TrainedRun, check_dataset

_NUM_SAMPLES = 4
_SPLITS = ("test", "valid", "train")  # in this order; an image that training has seen would do
_BLOCK = 8  # pixels; sides of the areas of generated images


@dataclass(frozen=True)
class Samples:
    """The images of a check.

    Attributes:
        images: (N, H, W, C) uint8 or uint16, as the dataset stores them.
        split: their split; None: they were generated.
        indices: their positions in the split, from 0.
        ids: their names in the dataset; empty for generated ones.
        reason: why they were generated; empty for samples.
    """

    images: np.ndarray
    split: str | None
    indices: tuple[int, ...]
    ids: tuple[str, ...]
    reason: str = ""


def choose_samples(run: TrainedRun, data: str | None) -> Samples:
    """Returns samples of the dataset of `run`, or generated images if it cannot be read.

    Args:
        data: present folder or URL of the dataset; None: as in training.

    Raises:
        UsageError: `data` is not the dataset of the run.
        FlexUNetError: `data` cannot be read.
    """
    try:
        dataset = open_dataset(data or str(run.config.data))
        check_dataset(run, dataset, "give --data the dataset of the run, or leave it out")
        return _read_samples(dataset)
    except FlexUNetError as error:
        if data is not None:
            raise
        return _generated(run.manifest, str(error))


def _read_samples(dataset: Dataset) -> Samples:
    name = next(name for name in _SPLITS if len(dataset.splits.get(name, ())))
    split = dataset.split(name)
    count = min(_NUM_SAMPLES, len(split))
    indices = tuple(int(each) for each in np.linspace(0, len(split) - 1, count).round())
    reader = open_reader(dataset, split, cache="ranges", cache_dir=None)
    images = np.stack([read_sample(reader, index)[0] for index in indices])
    return Samples(images, name, indices, tuple(split.ids[index] for index in indices))


def _generated(manifest: Manifest, reason: str) -> Samples:
    """Returns images of noisy areas, the same for each manifest of this size."""
    random = np.random.default_rng(0)
    height, width, full = manifest.image_height, manifest.image_width, manifest.value_max
    shape = (_NUM_SAMPLES, -(-height // _BLOCK), -(-width // _BLOCK), manifest.channels)
    areas = random.uniform(0, full, shape).repeat(_BLOCK, axis=1).repeat(_BLOCK, axis=2)
    noise = random.normal(0, full / 20, (_NUM_SAMPLES, height, width, manifest.channels))
    images = np.clip(areas[:, :height, :width] + noise, 0, full)
    return Samples(images.astype(f"uint{manifest.bit_depth}"), None, (), (), reason)


def check_batches(samples: Samples, side_multiple: int) -> Sequence[np.ndarray]:
    """Returns the batches (B, H, W, C) of a check: several images, one, and one of another size."""
    images = samples.images
    pairs = [images[start : start + 2] for start in range(0, len(images), 2)]
    larger = np.pad(
        images[:1], ((0, 0), (0, side_multiple), (0, 2 * side_multiple), (0, 0)), "wrap"
    )
    return [*pairs, images[:1], larger]
