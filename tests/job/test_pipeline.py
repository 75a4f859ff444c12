"""Batches over replicas: which samples, whose pixels, and what fails on the way."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import keras
import numpy as np
import pytest
import tensorflow as tf

from data_prep.config import PrepConfig
from data_prep.pipeline import prepare
from data_prep.sources.pairs import find_sources
from flexunet.errors import ContentError
from job.config import AugmentationConfig
from job.data.augmentation.augment import augment
from job.data.dataset import open_dataset
from job.data.pipeline import (
    EpochPlan,
    distributed_batches,
    one_ahead,
)
from job.data.random_streams import SampleKey
from job.data.reader import read_sample
from job.data.sampling import (
    PADDING,
    copy_numbers,
    dropout_keys,
)
from job.data.shard_cache import open_reader
from job.models.ensemble import prepared
from tests.job.batches import BATCH_SIZE, assert_same, batches_of, flip, plan_of


@pytest.mark.parametrize("num_replicas", [1, 2, 4])
def test_every_sample_comes_once_whatever_the_number_of_replicas(
    discs: str, num_replicas: int
) -> None:
    dataset = open_dataset(discs)
    split = dataset.split("train")
    assert len(split) % BATCH_SIZE  # so that there is padding
    plan = plan_of(dataset)
    one = batches_of(dataset, plan)
    many = batches_of(dataset, plan, total=num_replicas, local=num_replicas)
    steps = [many[i : i + num_replicas] for i in range(0, len(many), num_replicas)]
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]} for step in steps
    ]
    assert_same(joined, one)
    keys = [key for each in one for key in each["key"][each["weight"] == 1]]
    expected = dropout_keys(np.arange(len(split)), seed=5, epoch=0)
    assert sorted(keys) == sorted(expected.tolist())


def test_processes_share_the_global_batch(discs: str) -> None:
    dataset = open_dataset(discs)
    plan = plan_of(dataset)
    options: dict[str, Any] = {"total": 4, "local": 2}
    first = batches_of(dataset, plan, first=0, **options)
    second = batches_of(dataset, plan, first=2, **options)
    # Step s of two local replicas: elements 2 s and 2 s + 1 of each process.
    order = [each for s in range(len(plan)) for part in (first, second)
             for each in part[2 * s : 2 * s + 2]]  # fmt: skip
    assert_same(order, batches_of(dataset, plan, total=4, local=4))


def test_replicas_take_their_batches_in_order(discs: str, two_cpus: Any) -> None:
    dataset = open_dataset(discs)
    plan = plan_of(dataset)
    reader = open_reader(dataset, dataset.split("train"), cache="full", cache_dir=None)
    distributed = distributed_batches(two_cpus, dataset, reader, EpochPlan(plan, 5, 0))
    steps = [two_cpus.experimental_local_results(each["key"]) for each in distributed]
    assert [np.concatenate([part.numpy() for part in step]).tolist() for step in steps] == [
        each["key"].tolist() for each in batches_of(dataset, plan)
    ]


def test_batches_lie_on_the_devices_of_their_replicas(discs: str, two_cpus: Any) -> None:
    dataset = open_dataset(discs)
    reader = open_reader(dataset, dataset.split("train"), cache="full", cache_dir=None)
    distributed = distributed_batches(two_cpus, dataset, reader, EpochPlan(plan_of(dataset), 5, 0))
    for name, value in next(distributed).items():
        parts = two_cpus.experimental_local_results(value)
        # Keys go to random generators, which read them on the host.
        expected = ["CPU:0", "CPU:0"] if name == "key" else ["CPU:0", "CPU:1"]
        assert [part.device[-5:] for part in parts] == expected, name


def test_the_next_batch_is_taken_while_a_step_is_at_work() -> None:
    taken = [threading.Event() for _ in range(3)]

    def batches() -> Iterator[int]:
        for number, event in enumerate(taken):
            event.set()
            yield number

    seen = []
    for number in one_ahead(batches()):
        # The step: it would wait in vain for a batch that is taken only after it.
        assert all(event.wait(10) for event in taken[: number + 2])
        seen.append(number)
    assert seen == [0, 1, 2]
    assert list(one_ahead(iter([]))) == []


def test_what_fails_in_a_batch_is_reported_after_the_step_before() -> None:
    def batches() -> Iterator[int]:
        yield 0
        raise ContentError("broken")

    ahead = one_ahead(batches())
    assert next(ahead) == 0
    with pytest.raises(ContentError, match="broken"):
        next(ahead)


def test_padding_has_weight_0_and_real_pixels(discs: str) -> None:
    dataset = open_dataset(discs)
    last = batches_of(dataset, plan_of(dataset))[-1]
    num_real = len(dataset.split("train")) % BATCH_SIZE
    assert last["weight"].tolist() == [1.0] * num_real + [0.0] * (BATCH_SIZE - num_real)
    np.testing.assert_array_equal(last["image"][-1], last["image"][0])


def test_a_restart_inside_an_epoch_continues_bitwise(discs: str) -> None:
    dataset = open_dataset(discs)
    plan = plan_of(dataset, epoch=3)
    augmentation = AugmentationConfig(enabled=True, deformation_probability=0.5)
    control = batches_of(dataset, plan, epoch=3, augmentation=augmentation)
    for step in range(1, len(plan)):
        rest = batches_of(dataset, plan[step:], epoch=3, augmentation=augmentation)
        assert_same(rest, control[step:])


@pytest.mark.parametrize(("channels", "dtype"), [(1, np.uint8), (3, np.uint8), (1, np.uint16)])
def test_pixels_are_those_that_were_prepared(tmp_path: Path, channels: int, dtype: type) -> None:
    source, side, count = tmp_path / "source", 32, 6
    random = np.random.default_rng(1)
    images, masks = {}, {}
    for i in range(count):
        # The largest value is in each picture, so that 16 bits are in use.
        pixels = random.integers(0, np.iinfo(dtype).max + 1, (side, side, channels), dtype)
        pixels[0, 0] = np.iinfo(dtype).max
        images[f"p{i}"], masks[f"p{i}"] = pixels, random.integers(0, 2, (side, side), np.uint8)
        for kind, values in (("images", pixels[..., ::-1]), ("masks", 255 * masks[f"p{i}"])):
            (source / kind).mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(source / kind / f"p{i}.png"), values)
    config = PrepConfig(image_size=side, fractions=(0.6, 0.2, 0.2), num_processes=1)
    prepare(find_sources(str(source)), str(tmp_path / "out"), config, progress=False)
    dataset = open_dataset(str(tmp_path / "out"))
    split = dataset.split("train")
    (batch,) = batches_of(dataset, np.arange(len(split))[np.newaxis])
    reader = open_reader(dataset, split, cache="full", cache_dir=None)
    for i, sample_id in enumerate(split.ids):
        assert batch["image"][i].dtype == dtype
        np.testing.assert_array_equal(batch["image"][i], images[sample_id])
        np.testing.assert_array_equal(batch["mask"][i], masks[sample_id])
        image, mask = read_sample(reader, i)
        np.testing.assert_array_equal(image, images[sample_id])
        np.testing.assert_array_equal(mask, masks[sample_id])


def test_grey_batch_becomes_three_equal_channels_of_the_model(discs: str) -> None:
    dataset = open_dataset(discs)
    image = batches_of(dataset, plan_of(dataset))[0]["image"]
    inputs = keras.Input((32, 32, 3))
    wide = prepared(keras.Model(inputs, inputs), tf.constant(image)).numpy()
    assert wide.dtype == np.float32
    np.testing.assert_array_equal(wide, np.concatenate([image] * 3, axis=-1))


def test_augmentation_equals_the_eager_call(discs: str) -> None:
    dataset = open_dataset(discs)
    split, manifest = dataset.split("train"), dataset.manifest
    config = AugmentationConfig(enabled=True, deformation_probability=1.0)
    plan = plan_of(dataset, epoch=2)
    batches = batches_of(dataset, plan, epoch=2, augmentation=config)
    plain = batches_of(dataset, plan, epoch=2)
    order = plan[plan != PADDING]
    images, masks = (np.concatenate([each[name] for each in batches]) for name in ("image", "mask"))
    reader = open_reader(dataset, split, cache="full", cache_dir=None)
    for position, index in enumerate(order):
        image, mask = augment(
            *read_sample(reader, int(index)),
            SampleKey(5, 2, int(index)),
            config=config,
            value_max=manifest.value_max,
        )
        np.testing.assert_array_equal(images[position], image)
        np.testing.assert_array_equal(masks[position], mask)
    assert not np.array_equal(batches[0]["image"], plain[0]["image"])


def test_copies_of_a_sample_in_one_epoch_are_treated_differently(discs: str) -> None:
    dataset = open_dataset(discs)
    config = AugmentationConfig(enabled=True, deformation_probability=1.0)
    plan = np.array([[0, 1, 0, 2], [3, 0, 4, PADDING]])
    assert copy_numbers(plan).tolist() == [[0, 0, 1, 0], [0, 2, 0, 0]]
    batches = batches_of(dataset, plan, augmentation=config)
    places = ((0, 0), (0, 2), (1, 1))
    keys, images = (
        [batches[step][name][place] for step, place in places] for name in ("key", "image")
    )
    assert len(set(keys)) == len({image.tobytes() for image in images}) == 3
    # The first is what it would be alone, and an epoch may be entered at any step.
    assert keys[0] == dropout_keys(np.array([0]), seed=5, epoch=0)[0]
    np.testing.assert_array_equal(
        images[0], batches_of(dataset, plan[:, :2], augmentation=config)[0]["image"][0]
    )
    (later,) = batches_of(dataset, plan, augmentation=config, first_step=1)
    for name, values in later.items():
        np.testing.assert_array_equal(values, batches[1][name])


def test_damage_comes_out_of_the_pipeline_as_itself(copy: Path) -> None:
    dataset = open_dataset(str(copy))
    split = dataset.split("train")
    index = int(plan_of(dataset)[1, 2])
    shard = split.shards[index]
    flip(copy / shard, int(split.offsets[index]) + 40)
    with pytest.raises(ContentError, match=f"{shard}, sample '{split.ids[index]}': record check"):
        batches_of(dataset, plan_of(dataset))
