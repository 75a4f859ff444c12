"""Damaged shards and records are found when they are read."""

import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from data_prep.config import PrepConfig
from data_prep.pipeline import prepare
from data_prep.sources.pairs import find_sources
from flexunet.errors import ContentError
from job.data.dataset import open_dataset
from job.data.shard_cache import open_reader
from tests.job.batches import batches_of, shards_of


def test_every_flipped_byte_of_a_record_is_found(copy: Path) -> None:
    dataset = open_dataset(str(copy))
    split = dataset.split("train")
    index = int(np.argmin(split.lengths))
    reader = open_reader(dataset, split, cache="full", cache_dir=None)
    path = copy / split.shards[index]
    offset, length = int(split.offsets[index]), int(split.lengths[index])
    clean = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for position in range(offset, offset + length):
            os.pwrite(file.fileno(), bytes([clean[position] ^ 1]), position)
            with pytest.raises(ContentError, match=f"{path.name}, sample '{split.ids[index]}'"):
                reader.read(index)
            os.pwrite(file.fileno(), clean[position : position + 1], position)
    reader.read(index)


def test_truncated_shard_is_refused_at_once(copy: Path) -> None:
    path = shards_of(copy)[0]
    os.truncate(path, path.stat().st_size - 1)
    dataset = open_dataset(str(copy))
    with pytest.raises(ContentError, match=f"{path.name}: .* bytes, but .* in the manifest"):
        open_reader(dataset, dataset.split("train"), cache="full", cache_dir=None)


def test_missing_shard_is_refused_at_once(copy: Path) -> None:
    path = shards_of(copy)[0]
    path.unlink()
    dataset = open_dataset(str(copy))
    with pytest.raises(ContentError, match=f"{path.name}: missing"):
        open_reader(dataset, dataset.split("train"), cache="full", cache_dir=None)


def test_shard_that_is_truncated_or_gone_later_is_found(copy: Path) -> None:
    dataset = open_dataset(str(copy))
    split = dataset.split("train")
    last = int(np.argmax(split.offsets))
    path = copy / split.shards[last]
    reader = open_reader(dataset, split, cache="full", cache_dir=None)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ContentError, match=f"sample '{split.ids[last]}': damaged record header"):
        reader.read(last)
    path.unlink()
    with pytest.raises(ContentError, match=f"{path.name}: the shard is missing"):
        reader.read(last)


def test_swapped_records_of_equal_size_are_found(tmp_path: Path) -> None:
    # Small differences in one pixel leave the PNG's size as it is. Every checksum stays right.
    source = tmp_path / "source"
    for kind, value in (("images", 90), ("masks", 255)):
        (source / kind).mkdir(parents=True)
        for i in range(8):
            pixels = np.zeros((32, 32), np.uint8)
            pixels[8 + i % 2, 8] = value + (i if kind == "images" else 0)
            assert cv2.imwrite(str(source / kind / f"p{i}.png"), pixels)
    config = PrepConfig(image_size=32, fractions=(0.5, 0.25, 0.25), num_processes=1)
    prepare(find_sources(str(source)), str(tmp_path / "out"), config, progress=False)
    dataset = open_dataset(str(tmp_path / "out"))
    split = dataset.split("train")
    first, second = equal_places(split)
    path = tmp_path / "out" / split.shards[first]
    data = bytearray(path.read_bytes())
    places = [slice(int(split.offsets[i]), int(split.offsets[i] + split.lengths[i]))
              for i in (first, second)]  # fmt: skip
    data[places[0]], data[places[1]] = data[places[1]], data[places[0]]
    path.write_bytes(data)
    with pytest.raises(
        ContentError, match=f"'{split.ids[first]}': the record belongs to another sample"
    ):
        batches_of(dataset, np.array([[first]]))


def equal_places(split: Any) -> tuple[int, int]:
    """Returns two samples of one shard whose records have the same length."""
    lengths = split.lengths.tolist()
    for i, length in enumerate(lengths):
        for j in range(i):
            if lengths[j] == length and split.shards[i] == split.shards[j]:
                return j, i
    raise AssertionError(f"no two records of the same length: {lengths}")
