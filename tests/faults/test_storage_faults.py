"""Uploads whose answer is lost: none is stored twice, and none fails because of its own success."""

import os
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flexunet.storage import GcsStore, PreconditionFailed, gcs, gcs_transfer
from tests.conftest import FaultyBucket
from tests.faults.proxy import Fault

Record = Callable[[str, int, int, str], None]


def upload_blindly(bucket: FaultyBucket, folder: Path, num_uploads: int) -> int:
    """Uploads objects whose first answers are all lost; returns how many are correct."""
    proxy = bucket.proxy
    store = GcsStore(bucket.url)
    (folder / "large").write_bytes(os.urandom(3 << 18))

    def upload(i: int) -> bool:
        name = f"object-{i}"
        proxy.add(Fault("lose-answer", kinds=("put", "part"), name=f"/{name}$", count=1))
        if i % 10 == 0:  # in parts
            stat = store.put_file(name, str(folder / "large"), if_generation=0)
            data = (folder / "large").read_bytes()
        else:
            data = f"content {i}".encode()
            stat = store.put(name, data, if_generation=0)
        if i % 2:  # an object that is replaced, as a lease is
            proxy.add(Fault("lose-answer", kinds=("put",), name=f"/{name}$", count=1))
            data = f"again {i}".encode()
            stat = store.put(name, data, if_generation=stat.generation)
        return store.stat(name) == stat and store.get(name) == data

    before = proxy.num_changes
    with ThreadPoolExecutor(8) as pool:
        num_right = sum(pool.map(upload, range(num_uploads)))
    assert len(store.list()) == num_uploads
    assert proxy.num_changes - before == num_uploads + num_uploads // 2  # each stored once
    return num_right


@pytest.fixture
def _parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gcs, "_SINGLE_BYTES", 1 << 18)
    monkeypatch.setattr(gcs_transfer, "_PART_BYTES", 1 << 18)


@pytest.mark.usefixtures("_parts")
def test_uploads_whose_answer_is_lost_are_stored_once(
    faulty_bucket: FaultyBucket, tmp_path: Path
) -> None:
    assert upload_blindly(faulty_bucket, tmp_path, 60) == 60


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("_parts")
def test_a_thousand_uploads_whose_answer_is_lost_are_stored_once(
    faulty_bucket: FaultyBucket, tmp_path: Path, record_fault: Record
) -> None:
    num_right = upload_blindly(faulty_bucket, tmp_path, 1000)
    record_fault("R9", 1000, 1000 - num_right, "first answers lost: no duplicate, no false error")
    assert num_right == 1000


@pytest.mark.parametrize("is_new", [True, False])
def test_put_that_another_writer_overtook_is_refused(
    is_new: bool, faulty_bucket: FaultyBucket, storage_server: str
) -> None:
    """Our answer is lost, and another process replaces the object before the retry."""
    store = GcsStore(faulty_bucket.url)
    folder = faulty_bucket.url.removeprefix("gs://test-bucket/")
    upload = f"{storage_server}/upload/storage/v1/b/test-bucket/o?uploadType=media&name={folder}"
    for i in range(10):
        name = f"object-{i}"
        generation = 0 if is_new else store.put(name, b"old").generation
        faulty_bucket.proxy.stop_after(1)
        with ThreadPoolExecutor(1) as pool:
            put = pool.submit(store.put, name, b"mine", if_generation=generation)
            while not faulty_bucket.proxy.down:
                time.sleep(0.001)
            request = urllib.request.Request(f"{upload}%2F{name}", b"other")  # noqa: S310
            urllib.request.urlopen(request).close()  # noqa: S310
            faulty_bucket.proxy.down = False
            with pytest.raises(PreconditionFailed):
                put.result()
        assert store.get(name) == b"other"
