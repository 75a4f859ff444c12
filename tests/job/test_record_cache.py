"""The bounded cache of a remote dataset: the same records, few requests, never too many bytes."""

import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.shards.records import frame_record
from flexunet.errors import StorageError
from flexunet.storage import ObjectStore, open_store
from flexunet.storage.names import TEMPORARY
from job.data import record_cache
from job.data.dataset import Dataset, open_dataset
from job.data.pipeline import EpochPlan, distributed_batches
from job.data.reader import RecordReader
from job.data.record_cache import (
    NUM_AHEAD,
    ReadAhead,
    RecordFolder,
    RecordKey,
    RemoteRecords,
)
from job.data.sampling import epoch_order, global_batches
from job.data.shard_cache import CacheOptions, open_readers
from tests.conftest import FaultyBucket
from tests.faults.proxy import Fault
from tests.job.batches import assert_same, flip
from tests.job.test_shard_cache import small_disk

__all__ = ["small_disk"]

GIB = 2**30


def files_of(cache_dir: Path) -> list[Path]:
    return sorted(cache_dir.glob("*/records/*.tfrecord/*"))


def num_bytes(cache_dir: Path) -> int:
    return sum(path.stat().st_size for path in files_of(cache_dir))


def half_of(dataset: Dataset) -> int:
    """Returns half of the bytes of the training split."""
    return int(dataset.split("train").lengths.sum()) // 2


def readers_of(dataset: Dataset, cache_dir: Path, max_bytes: int) -> dict[str, RecordReader]:
    options = CacheOptions("full", str(cache_dir), max_bytes / GIB)
    return open_readers(dataset, dataset.splits, options)


def epoch_of(
    strategy: Any, dataset: Dataset, reader: RecordReader, epoch: int
) -> Iterator[list[dict[str, np.ndarray]]]:
    """Yields the batches of an epoch in which samples repeat, as training makes them."""
    has_foreground = np.arange(len(dataset.split("train"))) < 2
    order = epoch_order(has_foreground, 0.5, seed=3, epoch=epoch, version=2)
    assert len(set(order.tolist())) < len(order)
    plan = EpochPlan(global_batches(order, 4), 3, epoch, first_step=epoch)
    for batch in distributed_batches(strategy, dataset, reader, plan):
        names = batch.keys()
        parts = {name: strategy.experimental_local_results(batch[name]) for name in names}
        yield [
            {name: parts[name][i].numpy() for name in names}
            for i in range(strategy.num_replicas_in_sync)
        ]


def test_epochs_are_the_same_and_half_of_the_records_are_kept(
    discs: str, remote: str, faulty_bucket: FaultyBucket, two_cpus: Any, tmp_path: Path
) -> None:
    local, dataset = open_dataset(discs), open_dataset(remote)
    limit = half_of(dataset)
    expected = open_readers(local, local.splits, CacheOptions("full", None))["train"]
    reader = readers_of(dataset, tmp_path, limit)["train"]
    counts = []
    for epoch in range(3):
        faulty_bucket.proxy.log.clear()
        for a, b in zip(
            epoch_of(two_cpus, local, expected, epoch),
            epoch_of(two_cpus, dataset, reader, epoch),
            strict=True,
        ):
            assert_same(a, b)
        counts.append(faulty_bucket.proxy.count("get", "train-"))
        assert 0.6 * limit < num_bytes(tmp_path) <= limit
    assert counts[1] < counts[0]
    # Another process finds the records, and asks the network for the others only.
    again = readers_of(dataset, tmp_path, limit)["train"]
    kept = {path.name for path in files_of(tmp_path)}
    faulty_bucket.proxy.log.clear()
    for index, offset in enumerate(dataset.split("train").offsets):
        before = faulty_bucket.proxy.count("get")
        assert again.read(index) == expected.read(index)
        assert faulty_bucket.proxy.count("get") - before == (str(offset) not in kept)


def test_a_dataset_that_fits_is_copied_whole(remote: str, tmp_path: Path) -> None:
    dataset = open_dataset(remote)
    total = sum(shard.num_bytes for shard in dataset.manifest.shards)
    readers_of(dataset, tmp_path, total)
    assert len(list(tmp_path.glob("*/*.tfrecord"))) == len(dataset.manifest.shards)
    assert not files_of(tmp_path)
    readers_of(dataset, tmp_path / "less", total - 1)
    assert not list(tmp_path.glob("less/*/*.tfrecord"))


class Records:
    """Remote records of made-up samples, of which some are local; counts what it is asked for."""

    def __init__(self, local: frozenset[int]) -> None:
        self.local = local
        self.requested: list[int] = []

    def is_local(self, key: RecordKey) -> bool:
        return key.offset in self.local

    def read(self, key: RecordKey) -> bytes:
        if key.offset not in self.local:
            self.requested.append(key.offset)
        return str(key.offset).encode()

    def submit(self, key: RecordKey) -> Any:
        future: Any = record_cache.Future()
        future.set_result(self.read(key))
        return future


_ORDERS = st.lists(st.integers(0, 60), max_size=150)


@given(_ORDERS, st.frozensets(st.integers(0, 60)), st.integers(1, 20), st.randoms())
def test_each_sample_is_requested_once_whatever_the_order_of_reads(
    order: list[int], local: frozenset[int], disorder: int, random: Any
) -> None:
    records = Records(local)
    ahead = ReadAhead(records, lambda index: RecordKey("shard", index, 1))  # type: ignore[arg-type]
    # Threads read samples at the same time in any order, also before they are requested.
    waiting, rest = [], list(order)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_cache, "NUM_AHEAD", 4)
        ahead.expect(order)
        while waiting or rest:
            while rest and len(waiting) < disorder:
                waiting.append(rest.pop(0))
            index = waiting.pop(random.randrange(len(waiting)))
            assert ahead.read(index) == str(index).encode()
            assert sum(map(len, ahead._pending.values())) <= 4
    assert Counter(records.requested) == Counter(each for each in order if each not in local)


class Meeting:
    """A store whose reads wait until `NUM_AHEAD` of them run, for the first of them."""

    url = "gs://meeting"

    def __init__(self) -> None:
        self.barrier = threading.Barrier(NUM_AHEAD)
        self.num_calls = 0
        self.mutex = threading.Lock()

    def get(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        with self.mutex:
            self.num_calls += 1
            waits = self.num_calls <= NUM_AHEAD
        if waits:
            self.barrier.wait(30)
        return str(start).encode()


def test_so_many_requests_run_at_the_same_time() -> None:
    store: Any = Meeting()
    ahead = ReadAhead(RemoteRecords(store, None), lambda index: RecordKey("shard", index, 1))
    ahead.expect(range(100))
    assert [ahead.read(index) for index in range(100)] == [str(i).encode() for i in range(100)]
    assert store.num_calls == 100
    # A new order drops what was requested and not read.
    for _ in range(NUM_AHEAD):
        ahead.expect([1, 2, 3])
    ahead.expect([7])
    assert list(ahead._pending) == [7]
    assert ahead.read(7) == b"7"
    assert ahead.read(2) == b"2"


def test_a_damaged_record_is_read_again_with_a_warning(
    remote: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = open_dataset(remote)
    reader = readers_of(dataset, tmp_path, half_of(dataset))["train"]
    records = [reader.read(index) for index in range(len(dataset.split("train")))]
    path, truncated = files_of(tmp_path)[:2]
    flip(path, 50)
    truncated.write_bytes(truncated.read_bytes()[:20])
    caplog.clear()
    assert [reader.read(index) for index in range(len(records))] == records
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    end = "the cached record is damaged; reading it again"
    assert sorted(warnings) == sorted(f"{each}: {end}" for each in (path, truncated))


READ = """
import sys
from job.data.dataset import open_dataset
from job.data.shard_cache import CacheOptions, open_readers
dataset = open_dataset(sys.argv[1])
options = CacheOptions("full", sys.argv[2], float(sys.argv[3]) / 2**30)
readers = open_readers(dataset, dataset.splits, options)
print("opened", flush=True)
for name, split in dataset.splits.items():
    readers[name].expect(__import__("numpy").arange(len(split)))
    for index in range(len(split)):
        readers[name].read(index)
"""


@pytest.mark.cluster
def test_two_processes_of_a_node_share_the_folder_and_its_limit(
    remote: str, tmp_path: Path
) -> None:
    dataset = open_dataset(remote)
    limit = half_of(dataset)
    command = [sys.executable, "-c", READ, remote, str(tmp_path), str(limit)]
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    (used,) = tmp_path.glob("*/records/.used")
    assert int(used.read_text()) == num_bytes(tmp_path)
    assert 0.6 * limit < num_bytes(tmp_path) <= limit


@pytest.mark.cluster
def test_what_a_killed_process_left_is_counted_again(
    remote: str, faulty_bucket: FaultyBucket, tmp_path: Path
) -> None:
    dataset = open_dataset(remote)
    limit = half_of(dataset)
    faulty_bucket.proxy.add(Fault("stall", kinds=("get",), name="train-", seconds=60))
    command = [sys.executable, "-c", READ, remote, str(tmp_path), str(limit)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        faulty_bucket.proxy.wait_for_stall()
        process.kill()
    faulty_bucket.proxy.clear()
    (used,) = tmp_path.glob("*/records/.used")
    # As after a kill between the count and the record, and during the record.
    used.write_text(str(limit))
    (used.parent / "train-00000-of-00001.tfrecord").mkdir(exist_ok=True)
    part = used.parent / "train-00000-of-00001.tfrecord" / f"{TEMPORARY}part"
    part.write_bytes(bytes(100))
    reader = readers_of(dataset, tmp_path, limit)["train"]
    assert not part.exists()
    for index in range(len(dataset.split("train"))):
        reader.read(index)
    assert int(used.read_text()) == num_bytes(tmp_path) > 0.6 * limit


def test_a_smaller_limit_deletes_records(remote: str, tmp_path: Path) -> None:
    dataset = open_dataset(remote)
    limit = half_of(dataset)
    for index in range(len(dataset.split("train"))):
        readers_of(dataset, tmp_path, limit)["train"].read(index)
    number = len(files_of(tmp_path))
    readers_of(dataset, tmp_path, limit // 2)
    assert 0 < num_bytes(tmp_path) <= limit // 2
    assert len(files_of(tmp_path)) < number


def test_a_disk_that_fills_up_keeps_no_more_and_says_so(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = frame_record(bytes(9000))
    folder = RecordFolder(str(small_disk / "records"), 20000)
    (small_disk / "other").write_bytes(bytes(16000))
    for offset in range(4):
        folder.keep(RecordKey("shard", offset, len(record)), record)
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1
    assert warnings[0].startswith("the cache keeps no more records: cannot write")
    assert "No space left on device" in warnings[0]
    assert not list(small_disk.rglob(f"{TEMPORARY}*"))
    assert folder.read(RecordKey("shard", 0, len(record))) == record
    assert folder.read(RecordKey("shard", 3, len(record))) is None


def test_a_limit_above_the_disk_is_refused(small_disk: Path) -> None:
    with pytest.raises(StorageError, match=r"--cache-size of .* GiB free; give a smaller"):
        RecordFolder(str(small_disk / "records"), 1 << 20)


def test_a_lost_network_ends_the_epoch_with_its_error(
    remote: str, faulty_bucket: FaultyBucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(remote)
    short: ObjectStore = open_store(remote, retry_s=0.5)
    records = RemoteRecords(short, RecordFolder(str(tmp_path), half_of(dataset)))
    reader = RecordReader(short, dataset.split("train"), records, channels=1)
    faulty_bucket.proxy.down = True
    strategy = _one_cpu()
    plan = EpochPlan(np.arange(8).reshape(2, 4), 0, 0)
    begin = time.monotonic()
    with pytest.raises(StorageError, match="check the network"):
        list(distributed_batches(strategy, dataset, reader, plan))
    assert time.monotonic() - begin < 30
    faulty_bucket.proxy.down = False
    assert len(list(distributed_batches(strategy, dataset, reader, plan))) == 2


def _one_cpu() -> Any:
    import tensorflow as tf

    return tf.distribute.OneDeviceStrategy("CPU:0")
