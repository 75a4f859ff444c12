"""The cache of remote datasets: filled once, healed, locked, and of one dataset."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexunet.errors import ContentError, StorageError
from flexunet.storage import open_store
from job.data.dataset import open_dataset
from job.data.shard_cache import open_reader
from tests.job.batches import assert_same, batches_of, flip, plan_of, shards_of
from tests.job.discs import prepare_discs


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
options["heartbeat"] = lambda: print("alive", flush=True)
open_reader(dataset, dataset.split("train"), **options)
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
    assert warnings == [f"{path}: the cached copy is damaged; copying it again"]


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
