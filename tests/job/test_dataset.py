"""Sample order, batches over replicas, damaged shards, and the cache of remote datasets."""

import fcntl
import os
import shutil
import subprocess
import sys
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
from data_prep.imaging.breast import frame
from data_prep.imaging.codecs import read_image
from data_prep.phantoms.images import write_phantoms
from data_prep.pipeline import prepare
from data_prep.sources.pairs import find_sources
from flexunet.errors import ContentError, StorageError, UsageError
from flexunet.storage import open_store
from job.config import AugmentationConfig
from job.data.augment import augment
from job.data.dataset import Dataset, open_dataset
from job.data.pipeline import (
    EpochPlan,
    Replicas,
    distributed_batches,
    iterate,
    make_batches,
    one_ahead,
)
from job.data.random_streams import SampleKey
from job.data.reader import read_sample
from job.data.sampling import (
    PADDING,
    copy_numbers,
    dropout_keys,
    epoch_order,
    global_batches,
    sample_order,
)
from job.data.shard_cache import open_reader
from job.inference.network import prepared
from tests.job.discs import prepare_discs

BATCH_SIZE = 4


@pytest.fixture(scope="module")
def discs(tmp_path_factory: pytest.TempPathFactory) -> str:
    return prepare_discs(tmp_path_factory.mktemp("discs"), num_images=16)


@pytest.fixture
def copy(discs: str, tmp_path: Path) -> Path:
    """Returns a dataset that the test may damage."""
    return Path(shutil.copytree(discs, tmp_path / "copy"))


@pytest.fixture
def remote(discs: str, bucket_url: str) -> str:
    """Returns the dataset in a bucket."""
    source, target = open_store(discs), open_store(bucket_url)
    for stat in source.list():
        target.put(stat.name, source.get(stat.name))
    return bucket_url


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


# Order


def test_sample_order_is_a_permutation_by_seed_and_epoch() -> None:
    orders = {
        (seed, epoch): tuple(sample_order(50, seed=seed, epoch=epoch, version=2))
        for seed in (0, 1) for epoch in (0, 1)
    }  # fmt: skip
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len(set(orders.values())) == 4
    assert orders[0, 1] == tuple(sample_order(50, seed=0, epoch=1, version=2))


def test_sample_order_is_the_same_on_every_machine() -> None:
    # A restart elsewhere must continue this very order.
    assert sample_order(8, seed=3, epoch=2, version=2).tolist() == [3, 6, 5, 2, 1, 0, 4, 7]


def test_epoch_order_draws_foreground_as_often_as_told() -> None:
    has_foreground = np.arange(20) % 10 == 3  # two of 20
    order = epoch_order(has_foreground, 0.5, seed=1, epoch=0, version=2)
    counts = np.bincount(order, minlength=20)
    assert len(order) == 20
    # Ten places for two samples: five each. The other ten are all different.
    assert counts[has_foreground].tolist() == [5, 5]
    assert sorted(counts[~has_foreground]) == [0] * 8 + [1] * 10
    assert order.tolist() == epoch_order(has_foreground, 0.5, seed=1, epoch=0, version=2).tolist()
    others = [
        epoch_order(has_foreground, 0.5, seed=1, epoch=epoch, version=2) for epoch in range(1, 9)
    ]
    assert {tuple(each) for each in others} != {tuple(order)}
    assert set(np.concatenate([order, *others])) == set(range(20))  # each has its turn


def test_epoch_order_is_every_sample_once_where_there_is_foreground_enough() -> None:
    plain = sample_order(20, seed=1, epoch=2, version=2).tolist()
    half = np.arange(20) < 10
    for has_foreground, share in ((half, 0.5), (half, None), (np.zeros(20, bool), 0.5)):
        assert epoch_order(has_foreground, share, seed=1, epoch=2, version=2).tolist() == plain


def test_split_knows_which_samples_have_foreground(tmp_path: Path) -> None:
    data = prepare_discs(tmp_path, num_images=10, side=64, tile=16)
    dataset = open_dataset(data)
    split = dataset.split("train")
    reader = open_reader(dataset, split, cache="full", cache_dir=None)
    found = [bool(read_sample(reader, index)[1].any()) for index in range(len(split))]
    assert split.has_foreground.tolist() == found
    assert len(set(found)) == 2


def test_global_batches_pads_the_tail() -> None:
    batches = global_batches(np.array([4, 2, 0, 1, 3]), 2)
    assert batches.tolist() == [[4, 2], [0, 1], [3, PADDING]]
    assert global_batches(np.arange(4), 2).tolist() == [[0, 1], [2, 3]]


def test_dropout_keys_are_unique_and_stable() -> None:
    keys = {
        int(key)
        for seed in (0, 1, 2**40) for epoch in range(20)
        for key in dropout_keys(np.arange(500), seed=seed, epoch=epoch)
    }  # fmt: skip
    assert len(keys) == 3 * 20 * 500
    # A checkpoint continues with the masks of the run before it, so these numbers stay.
    keys_now = dropout_keys(np.array([0, 7]), seed=1, epoch=2)
    assert keys_now.tolist() == [1685891443961195628, -7692980538755587081]


# Batches


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


def test_what_fails_in_a_batch_is_told_after_the_step_before() -> None:
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


def test_split_without_samples_is_refused(discs: str) -> None:
    dataset = open_dataset(discs)
    with pytest.raises(UsageError, match="split 'holdout' has no samples; it has"):
        dataset.split("holdout")


# Damage


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


def test_damage_comes_out_of_the_pipeline_as_itself(copy: Path) -> None:
    dataset = open_dataset(str(copy))
    split = dataset.split("train")
    index = int(plan_of(dataset)[1, 2])
    shard = split.shards[index]
    flip(copy / shard, int(split.offsets[index]) + 40)
    with pytest.raises(ContentError, match=f"{shard}, sample '{split.ids[index]}': record check"):
        batches_of(dataset, plan_of(dataset))


def test_truncated_shard_is_refused_at_once(copy: Path) -> None:
    path = shards_of(copy)[0]
    os.truncate(path, path.stat().st_size - 1)
    dataset = open_dataset(str(copy))
    with pytest.raises(ContentError, match=f"{path.name}: .* bytes, the manifest says"):
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
    with pytest.raises(ContentError, match=f"'{split.ids[first]}': the record is another sample's"):
        batches_of(dataset, np.array([[first]]))


def equal_places(split: Any) -> tuple[int, int]:
    """Returns two samples of one shard whose records have the same length."""
    lengths = split.lengths.tolist()
    for i, length in enumerate(lengths):
        for j in range(i):
            if lengths[j] == length and split.shards[i] == split.shards[j]:
                return j, i
    raise AssertionError(f"no two records of the same length: {lengths}")


# The cache


def test_cache_is_filled_once(
    discs: str, remote: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "job.data.shard_cache")
    dataset, plan = open_dataset(remote), plan_of(open_dataset(remote))
    first = batches_of(dataset, plan, cache_dir=tmp_path / "cache")
    assert f"caching {remote}/train-" in caplog.text
    caplog.clear()
    second = batches_of(dataset, plan, cache_dir=tmp_path / "cache")
    assert not caplog.records
    assert_same(first, second)
    assert_same(first, batches_of(open_dataset(discs), plan))


def test_cache_is_one_folder_per_dataset(remote: str, tmp_path: Path) -> None:
    dataset = open_dataset(remote)
    batches_of(dataset, plan_of(dataset), cache_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [dataset.digest]
    names = {path.name for path in (tmp_path / dataset.digest).glob("*.tfrecord")}
    assert names == {shard.name for shard in dataset.manifest.shards if shard.split == "train"}


FILL = """
import logging, sys
from job.data.dataset import open_dataset
from job.data.shard_cache import open_reader
logging.basicConfig(level=logging.INFO, format="%(message)s")
dataset = open_dataset(sys.argv[1])
options = {"cache": "full", "cache_dir": sys.argv[2]}
open_reader(dataset, dataset.split("train"), alive=lambda: print("alive", flush=True), **options)
"""


def test_second_process_waits_for_the_first_and_downloads_nothing(
    remote: str, tmp_path: Path
) -> None:
    dataset = open_dataset(remote)
    folder = tmp_path / dataset.digest
    folder.mkdir()
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)  # as the first process holds it
    command = [sys.executable, "-c", FILL, remote, str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as second:
        assert second.stdout is not None
        # It waits, and says that it does: whoever watches must not take it for hung.
        assert [second.stdout.readline() for _ in range(2)] == ["alive\n", "alive\n"]
        assert not shards_of(folder)
        for stat in open_store(remote).list("train-"):
            open_store(remote).get_file(stat.name, str(folder / stat.name))
        os.close(lock)
        log = second.communicate(timeout=60)[1]
    assert second.returncode == 0, log
    assert "caching" not in log


def test_damaged_cache_copy_heals_with_one_warning(
    remote: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = open_dataset(remote)
    plan = plan_of(dataset)
    control = batches_of(dataset, plan, cache_dir=tmp_path)
    path = shards_of(tmp_path / dataset.digest)[0]
    flip(path, 100)
    caplog.clear()
    assert_same(batches_of(dataset, plan, cache_dir=tmp_path), control)
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert warnings == [f"{path}: damaged cache copy; fetching it again"]


def test_damaged_source_is_a_content_error(remote: str, copy: Path, tmp_path: Path) -> None:
    path = shards_of(copy)[0]
    flip(path, 100)
    open_store(remote).put(path.name, path.read_bytes())
    dataset = open_dataset(remote)
    with pytest.raises(ContentError, match=f"{path.name}: its CRC32C is not the manifest's"):
        batches_of(dataset, plan_of(dataset), cache_dir=tmp_path / "cache")
    assert ContentError.exit_code == 3
    assert not shards_of(tmp_path / "cache" / dataset.digest)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Returns a folder on a file system of 32 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip("only root may mount the small disk of this test")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_cache_that_does_not_fit_is_refused_before_a_download(
    bucket_url: str, tmp_path: Path, small_disk: Path
) -> None:
    # 10 pictures of noise, 64 x 64: 4 kB each at least, 40 kB.
    prepared = open_store(prepare_discs(tmp_path / "noise", side=64))
    for stat in prepared.list():
        open_store(bucket_url).put(stat.name, prepared.get(stat.name))
    dataset = open_dataset(bucket_url)
    with pytest.raises(StorageError, match=r"MiB of shards do not fit the .* give another"):
        open_reader(dataset, dataset.split("train"), cache="full", cache_dir=str(small_disk))
    assert not list(small_disk.rglob("*.tfrecord"))


def test_cache_that_is_not_writable_is_named(remote: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    dataset = open_dataset(remote)
    with pytest.raises(StorageError, match="cache is not writable: Not a directory"):
        open_reader(dataset, dataset.split("train"), cache="full", cache_dir=str(tmp_path / "file"))


def test_ranges_read_without_a_cache(discs: str, remote: str, tmp_path: Path) -> None:
    dataset = open_dataset(remote)
    plan = plan_of(dataset)
    read = batches_of(dataset, plan, cache="ranges", cache_dir=tmp_path / "cache")
    assert_same(read, batches_of(open_dataset(discs), plan))
    assert not (tmp_path / "cache").exists()


def test_damage_is_found_in_ranges_too(remote: str, copy: Path) -> None:
    dataset = open_dataset(remote)
    split = dataset.split("train")
    index = int(plan_of(dataset)[0, 0])
    path = copy / split.shards[index]
    flip(path, int(split.offsets[index]) + 50)
    open_store(remote).put(path.name, path.read_bytes())
    with pytest.raises(ContentError, match=f"{path.name}, sample '{split.ids[index]}'"):
        batches_of(dataset, plan_of(dataset), cache="ranges")


def test_open_dataset_knows_the_part_of_each_picture_that_is_stored(tmp_path: Path) -> None:
    write_phantoms(str(tmp_path / "source"), 6, 64, 1)
    config = PrepConfig(
        image_size=32, crop="breast", flip="left", fractions=(0.5, 0.25, 0.25), num_processes=1
    )
    prepare(find_sources(str(tmp_path / "source")), str(tmp_path / "out"), config, progress=False)
    dataset = open_dataset(str(tmp_path / "out"))
    found = []
    for split in dataset.splits.values():
        for name, geometry in zip(split.filenames, split.geometries, strict=True):
            data = (tmp_path / "source" / "images" / name).read_bytes()
            pixels = read_image(data, name=name)
            expected = frame(
                pixels, height=32, width=32, kind="stretch", crop="breast", flip="left"
            )
            assert geometry == expected
            assert geometry.crop is not None
            found.append(geometry.is_flipped)
    assert True in found
    assert False in found
