"""Large or interrupted uploads and downloads of a bucket: nothing twice, nothing half."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flexunet.errors import StorageError
from flexunet.storage import (
    GcsStore,
    NotFound,
    PreconditionFailed,
    Unavailable,
    crc32c_of,
    gcs,
    gcs_transfer,
    open_store,
)
from tests.conftest import FaultyBucket
from tests.faults.proxy import Action, Fault


def test_conditional_put_of_a_large_file(bucket_url: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(9 << 20))  # over 8 MiB it is uploaded in another way (resumable)
    store = GcsStore(bucket_url)
    assert store.put_file("a", str(path), if_generation=0).size == 9 << 20
    with pytest.raises(PreconditionFailed, match="exists already"):
        store.put_file("a", str(path), if_generation=0)


def test_put_whose_answer_was_lost_is_known_as_ours(faulty_bucket: FaultyBucket) -> None:
    store = GcsStore(faulty_bucket.url)
    faulty_bucket.proxy.add(Fault("lose-answer", kinds=("put",), count=1))
    stat = store.put("a", b"1", if_generation=0)
    assert faulty_bucket.proxy.count("put") == 2
    assert store.stat("a") == stat


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> int:
    """Makes files over 1 MiB go up in parts of 256 KiB, the smallest that a server takes."""
    monkeypatch.setattr(gcs, "_SINGLE_BYTES", 1 << 20)
    monkeypatch.setattr(gcs_transfer, "_PART_BYTES", 1 << 18)
    return 1 << 18


@pytest.mark.parametrize("of_bytes", [False, True])
@pytest.mark.parametrize("action", ["status", "reset-early", "reset", "lose-answer"])
@pytest.mark.parametrize("broken", [0, 1, 2])
def test_upload_in_parts_sends_each_part_once(
    action: Action,
    broken: int,
    of_bytes: bool,
    faulty_bucket: FaultyBucket,
    tmp_path: Path,
    parts: int,
) -> None:
    data = os.urandom(4 * parts + 1)  # five parts
    (tmp_path / "file").write_bytes(data)
    proxy = faulty_bucket.proxy
    proxy.add(Fault(action, kinds=("part",), count=broken, probability=0.5))
    store = GcsStore(faulty_bucket.url)
    if of_bytes:
        stat = store.put("a", data, if_generation=0)
    else:
        stat = store.put_file("a", str(tmp_path / "file"), if_generation=0)
    assert (stat.size, stat.crc32c, store.get("a")) == (len(data), crc32c_of(data), data)
    # After every broken request the client asks how much has arrived, and sends the part again if
    # it has not.
    again = 1 if action == "lose-answer" else 2
    asked = proxy.count("part")
    assert 5 + broken <= asked <= 5 + again * broken
    assert (proxy.count("session"), proxy.count(status=412)) == (1, 0)
    with pytest.raises(PreconditionFailed, match="exists already"):
        store.put_file("a", str(tmp_path / "file"), if_generation=0)


def test_upload_in_parts_whose_session_is_lost_starts_again(
    faulty_bucket: FaultyBucket, tmp_path: Path, parts: int
) -> None:
    (tmp_path / "file").write_bytes(bytes(5 * parts))
    lost = Fault("status", status=410, kinds=("part",), count=2)
    faulty_bucket.proxy.add(lost)
    store = GcsStore(faulty_bucket.url)
    assert store.put_file("a", str(tmp_path / "file")).size == 5 * parts
    assert faulty_bucket.proxy.count("session") == 3
    faulty_bucket.proxy.add(lost, lost)
    with pytest.raises(StorageError, match="the server has lost the upload"):
        store.put_file("a", str(tmp_path / "file"))


def test_upload_in_parts_is_refused_at_its_end(
    faulty_bucket: FaultyBucket, tmp_path: Path, parts: int
) -> None:
    """Another process stores the object while the parts are on their way."""
    (tmp_path / "file").write_bytes(bytes(5 * parts))
    store = GcsStore(faulty_bucket.url)
    faulty_bucket.proxy.add(Fault("stall", kinds=("part",), seconds=60, count=1))
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(store.put_file, "a", str(tmp_path / "file"), if_generation=0)
        faulty_bucket.proxy.wait_for_stall()
        store.put("a", b"other", if_generation=0)
        faulty_bucket.proxy.resume()
        with pytest.raises(PreconditionFailed, match="exists already"):
            late.result()
    assert store.get("a") == b"other"


@pytest.mark.parametrize("in_parts", [True, False])
def test_a_watched_store_reports_bytes_on_their_way(
    in_parts: bool, faulty_bucket: FaultyBucket, tmp_path: Path, parts: int
) -> None:
    """Both ways, and many times for each large object."""
    data = os.urandom(5 * parts if in_parts else parts)
    (tmp_path / "file").write_bytes(data)
    moves: list[int] = []
    store = GcsStore(faulty_bucket.url).watched(lambda: moves.append(1)).subpath("a")
    store.put_file("b", str(tmp_path / "file"))
    assert len(moves) >= (5 * parts / 2**14 if in_parts else 1)
    moves.clear()
    store.with_limits(retry_s=5, timeout_s=2).get_file("b", str(tmp_path / "back"))
    assert len(moves) >= 4
    assert (tmp_path / "back").read_bytes() == data


def test_upload_over_a_line_that_breaks_every_part_goes_on_while_something_arrives(
    faulty_bucket: FaultyBucket, tmp_path: Path, parts: int
) -> None:
    """Every part takes longer than requests are repeated, and its answer is lost."""
    data = os.urandom(4 * parts + 1)
    (tmp_path / "file").write_bytes(data)
    proxy = faulty_bucket.proxy
    for _ in range(4):
        proxy.add(Fault("lose-answer", kinds=("part",), delay_s=0.6, count=1))
        proxy.add(Fault("slow", kinds=("part",), bytes_per_s=1e9, count=1))  # the question
    store = GcsStore(faulty_bucket.url, retry_s=0.5)
    assert store.put_file("a", str(tmp_path / "file")).size == len(data)
    assert store.get("a") == data
    proxy.add(Fault("status", kinds=("part",)))
    with pytest.raises(Unavailable):
        store.put_file("b", str(tmp_path / "file"))


@pytest.mark.parametrize("action", ["flip", "truncate", "reset"])
def test_download_is_repeated_until_it_is_whole(
    action: Action, faulty_bucket: FaultyBucket, tmp_path: Path
) -> None:
    data = os.urandom(100_000)
    store = GcsStore(faulty_bucket.url)
    store.put("a", data)
    faulty_bucket.proxy.add(Fault(action, kinds=("get",), count=2))
    assert store.get("a") == data
    assert faulty_bucket.proxy.count("get") == 3
    faulty_bucket.proxy.add(Fault(action, kinds=("get",), count=2))
    assert store.get_file("a", str(tmp_path / "a")) == crc32c_of(data)
    assert (tmp_path / "a").read_bytes() == data
    assert os.listdir(tmp_path) == ["a"]


def test_download_over_a_line_that_breaks_goes_on_while_bytes_come(
    faulty_bucket: FaultyBucket, tmp_path: Path
) -> None:
    """All in all it takes longer than requests are repeated."""
    data = os.urandom(1 << 20)
    store = GcsStore(faulty_bucket.url, retry_s=0.6)
    store.put("a", data)
    faulty_bucket.proxy.add(Fault("truncate", kinds=("get",), delay_s=0.3, count=5))
    assert store.get_file("a", str(tmp_path / "a")) == crc32c_of(data)
    assert faulty_bucket.proxy.count("get") == 6
    faulty_bucket.proxy.add(Fault("status", kinds=("get",)))
    with pytest.raises(Unavailable, match="no data for"):
        store.get_file("a", str(tmp_path / "b"))


@pytest.mark.parametrize("in_file", [False, True])
def test_download_broken_off_and_overtaken_by_a_put_begins_anew(
    in_file: bool, faulty_bucket: FaultyBucket, tmp_path: Path
) -> None:
    """The client library asks for the rest of what it had begun, which is there no longer."""
    store = GcsStore(faulty_bucket.url)
    store.put("a", os.urandom(100_000))  # so that some of it has been kept
    faulty_bucket.proxy.add(
        Fault("truncate", kinds=("get",), count=1),
        Fault("stall", kinds=("get",), seconds=60, count=1),
    )
    with ThreadPoolExecutor(1) as pool:
        if in_file:
            read = pool.submit(store.get_file, "a", str(tmp_path / "a"))
        else:
            read = pool.submit(store.get, "a")
        faulty_bucket.proxy.wait_for_stall()
        store.put("a", b"after")
        faulty_bucket.proxy.resume()
        assert read.result() == (crc32c_of(b"after") if in_file else b"after")
    assert faulty_bucket.proxy.count("get", status=404) == 1
    faulty_bucket.proxy.clear()
    store.delete("a")
    with pytest.raises(NotFound):
        store.get("a")
    assert faulty_bucket.proxy.count("get") == 1


def test_download_that_stays_changed_is_an_error(
    faulty_bucket: FaultyBucket, tmp_path: Path
) -> None:
    store = GcsStore(faulty_bucket.url)
    store.put("a", b"1234")
    faulty_bucket.proxy.add(Fault("flip", kinds=("get",)))
    with pytest.raises(StorageError, match=r"cannot read gs://.*Checksum mismatch"):
        store.get("a")
    with pytest.raises(StorageError, match="Checksum mismatch") as caught:
        store.get_file("a", str(tmp_path / "a"))
    assert not isinstance(caught.value, Unavailable)
    assert not list(tmp_path.iterdir())


def test_changed_download_is_refused(bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(bucket_url)
    store.put("a", b"1")
    # Bytes that change on the way are the library's to find; what it handed over is checked again.
    monkeypatch.setattr(gcs, "crc32c_of", lambda data, value=0: 7)
    with pytest.raises(StorageError, match="do not match the server's crc32c"):
        store.get("a")
