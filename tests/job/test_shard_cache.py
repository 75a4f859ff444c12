"""The cache of remote datasets: filled once, healed, locked, and of one dataset."""

import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.config import PrepConfig
from data_prep.pipeline import prepare
from data_prep.sources.pairs import find_sources
from flexunet.errors import ContentError, StorageError
from flexunet.progress import Heartbeat, Progress
from flexunet.storage import GcsStore, ObjectStore, crc32c_of_file, open_store
from job.data import downloads, shard_cache
from job.data.dataset import Dataset, open_dataset
from job.data.downloads import ShardCopies
from job.data.reader import Record
from job.data.shard_cache import CacheOptions, open_reader, open_readers
from tests.conftest import FaultyBucket
from tests.faults.proxy import Fault
from tests.job.batches import assert_same, batches_of, flip, plan_of, shards_of
from tests.job.discs import prepare_discs, write_discs


def test_cache_is_filled_once(
    discs: str, remote: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "job.data.shard_cache")
    dataset, plan = open_dataset(remote), plan_of(open_dataset(remote))
    first = batches_of(dataset, plan, cache_dir=tmp_path / "cache")
    assert f"caching {remote}: " in caplog.text
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
from job.data.shard_cache import CacheOptions, open_readers
logging.basicConfig(level=logging.INFO, format="%(message)s")
dataset = open_dataset(sys.argv[1])
options = CacheOptions("full", sys.argv[2])
open_readers(dataset, dataset.splits, options, heartbeat=lambda: print("alive", flush=True))
"""
NUM_SHARDS = 12  # of the train split of `many_shards`; more than streams


@pytest.mark.cluster
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
        for shard in dataset.manifest.shards:
            open_store(remote).get_file(shard.name, str(folder / shard.name))
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
    assert warnings == [f"{path}: the cached copy is damaged; copying it again"]


def test_cached_shards_are_checked_at_the_same_time(
    many_shards: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    read_all(many_shards, tmp_path / "cache")
    barrier, lock, checked = threading.Barrier(8), threading.Lock(), list[str]()

    def together(path: str) -> int:
        with lock:
            checked.append(path)
            is_first = len(checked) <= 8
        if is_first:
            barrier.wait(30)  # raises if fewer than 8 threads come
        return crc32c_of_file(path)

    monkeypatch.setattr(shard_cache, "crc32c_of_file", together)
    monkeypatch.setattr(shard_cache, "_SHOWN_CHECK_BYTES", 0)
    folder = tmp_path / "cache" / many_shards.digest
    damaged = shards_of(folder)[3:5]
    for path in damaged:
        flip(path, 100)
    damaged[0].unlink()
    caplog.set_level("INFO")
    read_all(many_shards, tmp_path / "cache")
    assert len(checked) == len(many_shards.manifest.shards) - 1
    assert f"{damaged[1]}: the cached copy is damaged; copying it again" in caplog.messages
    assert "check cache: 1/1 MiB" in caplog.messages
    assert any("caching" in each and ": 2 shards, " in each for each in caplog.messages)


def test_damaged_source_is_a_content_error(remote: str, copy: Path, tmp_path: Path) -> None:
    path = shards_of(copy)[0]
    flip(path, 100)
    open_store(remote).put(path.name, path.read_bytes())
    dataset = open_dataset(remote)
    with pytest.raises(ContentError, match=f"{path.name}: CRC32C differs from the manifest"):
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
    with pytest.raises(
        StorageError, match=r"the shards need .* MiB, but this disk has .* give another"
    ):
        open_reader(dataset, dataset.split("train"), cache="full", cache_dir=str(small_disk))
    assert not list(small_disk.rglob("*.tfrecord"))


@pytest.fixture
def many_shards(tmp_path: Path, bucket_url: str) -> Dataset:
    """Returns a dataset in a bucket, with `NUM_SHARDS` shards for training."""
    write_discs(tmp_path / "source", num_images=NUM_SHARDS + 2, side=64)
    share = 1 / (NUM_SHARDS + 2)
    config = PrepConfig(
        image_size=64,
        fractions=(1 - 2 * share, share, share),
        num_processes=1,
        shard_size=0.001,  # MB: each sample has its own shard
    )
    prepare(find_sources(str(tmp_path / "source")), bucket_url, config, progress=False)
    dataset = open_dataset(bucket_url)
    assert len(set(dataset.split("train").shards)) == NUM_SHARDS
    return dataset


def copying_threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("shard-copy")]


def test_eight_shards_are_copied_at_the_same_time(
    many_shards: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    barrier, get_file = threading.Barrier(8), GcsStore.get_file
    names = []

    def together(self: GcsStore, name: str, path: str) -> int:
        names.append(name)
        if len(names) <= 8:
            barrier.wait(30)  # raises if fewer than 8 streams come
        return get_file(self, name, path)

    monkeypatch.setattr(GcsStore, "get_file", together)
    read_all(many_shards, tmp_path / "cache")
    assert sorted(names) == sorted(shard.name for shard in many_shards.manifest.shards)
    assert not copying_threads()


def read_all(dataset: Dataset, cache_dir: Path) -> list[Record]:
    """Returns all records of `dataset` through the cache, after comparing them with the bucket."""
    readers = open_readers(dataset, dataset.splits, CacheOptions("full", str(cache_dir)))
    found = []
    for name, split in dataset.splits.items():
        direct = open_reader(dataset, split, cache="ranges", cache_dir=None)
        for index in range(len(split)):
            found.append(readers[name].read(index))
            assert found[-1] == direct.read(index)
    return found


@pytest.mark.cluster
def test_a_killed_copy_is_continued_and_leaves_no_parts(
    many_shards: Dataset, faulty_bucket: FaultyBucket, tmp_path: Path
) -> None:
    folder = tmp_path / "cache" / many_shards.digest
    # Three shards arrive, the next ones only in part.
    faulty_bucket.proxy.add(Fault("slow", kinds=("get",), name="train-0000[3-9]", bytes_per_s=500))
    command = [sys.executable, "-c", FILL, many_shards.url, str(tmp_path / "cache")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not (len(shards_of(folder)) >= 3 and list(folder.glob(".flexunet-tmp-*"))):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
    arrived = {path: path.stat().st_mtime_ns for path in shards_of(folder)}
    faulty_bucket.proxy.clear()
    read_all(many_shards, tmp_path / "cache")
    assert not list(folder.glob(".flexunet-tmp-*"))
    assert {path: path.stat().st_mtime_ns for path in arrived} == arrived
    assert faulty_bucket.proxy.count("get", min(arrived).name, 200) == 0


def test_a_disk_that_fills_up_ends_all_copies(
    many_shards: Dataset, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another process takes the space after the check.
    free = shutil.disk_usage(small_disk)._replace(free=1 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    with pytest.raises(StorageError, match=r"cannot write .*: No space left on device; free"):
        read_all(many_shards, small_disk)
    assert not copying_threads()
    assert not list(small_disk.rglob(".flexunet-tmp-*"))


@pytest.mark.cluster
def test_two_processes_of_a_node_copy_each_shard_once(
    many_shards: Dataset, faulty_bucket: FaultyBucket, tmp_path: Path
) -> None:
    faulty_bucket.proxy.clear()
    command = [sys.executable, "-c", FILL, many_shards.url, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    for shard in many_shards.manifest.shards:
        assert faulty_bucket.proxy.count("get", shard.name) == 1


class SlowStore:
    """A store whose copies wait for `resumed`; it has the one method that copies need."""

    url = "gs://slow"

    def __init__(self, source: ObjectStore) -> None:
        self.source = source
        self.resumed = threading.Event()

    def watched(self, moved: Heartbeat) -> "SlowStore":
        self.moved = moved
        return self

    def get_file(self, name: str, path: str) -> int:
        self.resumed.wait()
        return self.source.watched(self.moved).get_file(name, path)


def test_a_stalled_copy_gives_no_heartbeat(discs: str, tmp_path: Path) -> None:
    store = SlowStore(open_store(discs))
    signs: list[int] = []
    copies = ShardCopies(store, open_dataset(discs).manifest.shards, str(tmp_path))  # type: ignore[arg-type]
    with Progress("cache", 1, shown=False) as bar:
        thread = threading.Thread(target=lambda: copies.run(lambda: signs.append(1), bar))
        thread.start()
        time.sleep(4 * downloads._TICK_S)
        assert not signs
        store.resumed.set()
        thread.join()
    assert signs


def test_cache_that_is_not_writable_is_named(remote: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    dataset = open_dataset(remote)
    with pytest.raises(StorageError, match="cannot write the cache: Not a directory"):
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
