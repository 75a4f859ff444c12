"""Both stores against one set of expectations; the bucket is a real server (see conftest)."""

import gc
import os
import pickle
import re
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexunet.errors import ContentError, StorageError, UsageError, kind_of
from flexunet.storage import (
    Forbidden,
    GcsStore,
    LocalStore,
    NotFound,
    PreconditionFailed,
    Store,
    Unavailable,
    checked_name,
    crc32c_of,
    crc32c_of_file,
    gcs,
    gcs_transfer,
    join_url,
    local,
    local_path,
    open_source,
    open_store,
    probe_preconditions,
    probe_writable,
    put_if_other,
)
from flexunet.storage.gcs_errors import describe_cloud_error, is_transient
from tests.conftest import FaultyBucket
from tests.faults.proxy import Action, Fault

# RFC 3720 appendix B.4: the CRC-32C of "123456789" is e3069283 (hex).
CHECK_CRC32C = 0xE3069283


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return open_store(str(tmp_path / "store"))
    return open_store(request.getfixturevalue("bucket_url"))


def names(store: Store, prefix: str = "") -> list[str]:
    return [stat.name for stat in store.list(prefix)]


def test_crc32c_matches_the_published_check_value(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"123456789")
    assert crc32c_of(b"123456789") == CHECK_CRC32C
    assert crc32c_of(b"6789", crc32c_of(b"12345")) == CHECK_CRC32C
    assert crc32c_of_file(str(tmp_path / "f")) == CHECK_CRC32C


def test_put_then_get_returns_the_bytes_and_ranges(store: Store) -> None:
    data = bytes(range(256)) + b"\r\n\0\n\r"
    stat = store.put("a/b.bin", data)
    assert (stat.name, stat.size) == ("a/b.bin", 261)
    assert store.stat("a/b.bin") == stat
    assert store.get("a/b.bin") == data
    assert store.get("a/b.bin", 5, 3) == b"\x05\x06\x07"
    assert store.get("a/b.bin", 259) == b"\n\r"
    assert store.get("a/b.bin", 259, 100) == b"\n\r"
    assert store.get("a/b.bin", 261, 4) == b""
    assert store.get("a/b.bin", 3, 0) == b""


def test_put_file_and_get_file_keep_nine_mebibytes(store: Store, tmp_path: Path) -> None:
    # Over 8 MiB the client library uploads in another way (resumable).
    data = os.urandom(9 << 20)
    (tmp_path / "source").write_bytes(data)
    stat = store.put_file("big", str(tmp_path / "source"))
    assert stat.size == 9 << 20
    assert store.get_file("big", str(tmp_path / "copies" / "copy")) == crc32c_of(data)
    assert (tmp_path / "copies" / "copy").read_bytes() == data
    assert os.listdir(tmp_path / "copies") == ["copy"]


def test_empty_object_is_kept(store: Store) -> None:
    assert store.put("empty", b"").size == 0
    assert store.get("empty") == b""


def test_missing_object_is_not_found(store: Store, tmp_path: Path) -> None:
    assert store.stat("none") is None
    with pytest.raises(NotFound, match="none does not exist"):
        store.get("none")
    with pytest.raises(NotFound, match="none does not exist"):
        store.get_file("none", str(tmp_path / "copy"))
    store.delete("none")
    assert not (tmp_path / "copy").exists()


def test_list_is_recursive_sorted_and_by_prefix(store: Store) -> None:
    assert names(store) == []
    for name in ("b/2", "a/x/1", "a-1", "b/10"):
        store.put(name, b"")
    assert names(store) == ["a-1", "a/x/1", "b/10", "b/2"]
    assert names(store, "a") == ["a-1", "a/x/1"]
    assert names(store, "b/1") == ["b/10"]
    assert names(store, "c/") == []


def test_below_sees_the_same_objects(store: Store) -> None:
    store.put("a/b/c", b"1")
    assert names(store.below("a/b")) == ["c"]
    assert store.below("a").get("b/c") == b"1"
    assert store.below("a").url == join_url(store.url, "a")


def test_generation_changes_with_every_put(store: Store) -> None:
    generations = [store.put("a", b"same").generation for _ in range(20)]
    assert generations == sorted(set(generations))


def test_put_returns_its_own_generation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another writer comes between a put's replacement and its return."""
    store = LocalStore(str(tmp_path))
    before = store.put("a", b"0").generation
    sync_folder = local._sync_folder
    others: list[int] = []

    def overtaken(folder: str) -> None:
        sync_folder(folder)
        if not others:
            others.append(0)
            stat = store.stat("a")
            assert stat is not None
            others[0] = store.put("a", b"other", if_generation=stat.generation).generation

    monkeypatch.setattr(local, "_sync_folder", overtaken)
    own = store.put("a", b"own", if_generation=before)
    assert before < own.generation < others[0]
    with pytest.raises(PreconditionFailed):
        store.put("a", b"next", if_generation=own.generation)
    assert store.get("a") == b"other"


def test_delete_removes_the_object_and_nothing_else(store: Store) -> None:
    store.put("a/b/c", b"")
    store.put("a/d", b"")
    store.delete("a/b/c")
    assert names(store) == ["a/d"]
    if store.local_root:
        assert os.listdir(os.path.join(store.local_root, "a")) == ["d"]


@pytest.mark.parametrize("moment", ["made", "looked at"])
def test_put_makes_a_folder_again_that_another_process_deletes(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its delete removes folders that are empty, as the put's is before its file is in it."""
    make, left = os.makedirs, [3]

    def make_and_lose(folder: str, exist_ok: bool = False) -> None:
        make(folder, exist_ok=exist_ok)
        if left[0]:
            left[0] -= 1
            os.rmdir(folder)
            if moment == "looked at":  # gone between mkdir's refusal and the look at what is there
                raise FileExistsError(17, "File exists", folder)

    (tmp_path / "file").write_bytes(b"1")
    monkeypatch.setattr(os, "makedirs", make_and_lose)
    store = LocalStore(str(tmp_path / "store"))
    store.put("a/b", b"1")
    left[0] = 3
    store.delete("a/b")
    store.put_file("a/b", str(tmp_path / "file"), if_generation=0)
    left[0] = 3
    store.get_file("a/b", str(tmp_path / "copy" / "b"))
    assert (tmp_path / "copy" / "b").read_bytes() == b"1"
    left[0] = -1
    with pytest.raises(StorageError, match=r"cannot write .*a/c/d"):
        store.put("a/c/d", b"")


def test_put_that_is_deleted_at_once_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(str(tmp_path))
    replace = os.replace

    def replace_and_lose(source: str, target: str) -> None:
        replace(source, target)
        store.delete("a/b")

    monkeypatch.setattr(os, "replace", replace_and_lose)
    assert store.put("a/b", b"1").size == 1
    assert not list(tmp_path.iterdir())


def test_store_pickles(store: Store) -> None:
    store.put("a", b"1")
    assert pickle.loads(pickle.dumps(store)).get("a") == b"1"  # noqa: S301


def test_probe_writable_leaves_nothing(store: Store) -> None:
    probe_writable(store)
    assert names(store) == []


def test_account_that_only_creates_leaves_the_probe_where_it_may(
    faulty_bucket: FaultyBucket,
) -> None:
    store = GcsStore(faulty_bucket.url)
    faulty_bucket.proxy.creates_only = True
    with pytest.raises(Forbidden, match=r"cannot delete .*permission denied; grant"):
        probe_writable(store.below("a"))
    probe_writable(store.below("b"), may_stay=True)
    assert [name[:17] for name in names(store)] == ["a/flexunet-probe-", "b/flexunet-probe-"]


def test_put_if_other_replaces_nothing_that_is_the_same(faulty_bucket: FaultyBucket) -> None:
    store = GcsStore(faulty_bucket.url)
    faulty_bucket.proxy.creates_only = True
    put_if_other(store, "a", b"1")
    put_if_other(store, "a", b"1")
    with pytest.raises(Forbidden):
        put_if_other(store, "a", b"2")
    faulty_bucket.proxy.creates_only = False
    put_if_other(store, "a", b"2")
    assert store.get("a") == b"2"


def test_conditional_puts_of_a_folder(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    first = store.put("a", b"1", if_generation=0)
    with pytest.raises(PreconditionFailed, match="exists already"):
        store.put("a", b"2", if_generation=0)
    with pytest.raises(PreconditionFailed, match=f"is in generation {first.generation}, not 5"):
        store.put("a", b"2", if_generation=5)
    second = store.put("a", b"2", if_generation=first.generation)
    with pytest.raises(PreconditionFailed, match="another process wrote it"):
        store.put("a", b"3", if_generation=first.generation)
    assert (store.get("a"), store.stat("a")) == (b"2", second)
    probe_preconditions(store)
    assert names(store) == ["a"]


def test_conditional_puts_on_a_file_system_without_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: str, target: str) -> None:
        raise PermissionError(1, "Operation not permitted")  # what FAT and some FUSE mounts say

    monkeypatch.setattr(os, "link", refuse)
    probe_preconditions(LocalStore(str(tmp_path)))


def test_one_of_many_threads_wins_each_generation(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))

    def attempt(task: tuple[int, int]) -> bool:
        try:
            store.put("a", str(task).encode(), if_generation=task[1])
        except PreconditionFailed:
            return False
        return True

    generation = 0
    with ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            wins = list(pool.map(attempt, [(i, generation) for i in range(8)]))
            assert wins.count(True) == 1
            found = store.stat("a")
            assert found is not None
            generation = found.generation
    assert os.listdir(tmp_path) == ["a"]  # no lock file


def test_lock_of_a_folder_is_held_by_one_at_a_time_though_its_file_goes(tmp_path: Path) -> None:
    """Those who wait have opened a file that the holder deletes."""
    holders, num_turns = 0, 0

    def take_turns(_: int) -> None:
        nonlocal holders, num_turns
        for _ in range(50):
            with local._folder_lock(str(tmp_path)):
                assert holders == 0
                holders += 1
                time.sleep(1e-4)
                num_turns += 1
                holders -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(take_turns, range(8)))
    assert num_turns == 400
    assert os.listdir(tmp_path) == []


def test_folder_of_conditional_puts_goes_with_its_last_object(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    first = store.put("a/b", b"1", if_generation=0)
    store.put("a/b", b"2", if_generation=first.generation)
    store.delete("a/b")
    assert os.listdir(tmp_path) == []
    # A process that was killed while it held the lock leaves its file.
    store.put("a/b", b"1")
    (tmp_path / "a" / ".flexunet-lock").write_bytes(b"")
    assert store.remove_unfinished() == 0
    assert os.listdir(tmp_path / "a") == ["b"]


def test_server_that_ignores_preconditions_is_refused(lax_bucket_url: str) -> None:
    with pytest.raises(StorageError, match="does not enforce preconditions"):
        probe_preconditions(open_store(lax_bucket_url))
    assert names(open_store(lax_bucket_url)) == []


def test_conditional_puts_of_a_bucket(bucket_url: str) -> None:
    store = GcsStore(bucket_url)
    probe_preconditions(store)
    first = store.put("a", b"1", if_generation=0)
    with pytest.raises(PreconditionFailed, match="exists already"):
        store.put("a", b"1", if_generation=0)
    second = store.put("a", b"2", if_generation=first.generation)
    with pytest.raises(PreconditionFailed, match="another process wrote it"):
        store.put("a", b"3", if_generation=first.generation)
    assert (store.get("a"), store.stat("a")) == (b"2", second)


def test_server_address_may_lack_the_scheme(
    faulty_bucket: FaultyBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = faulty_bucket.proxy.address.removeprefix("http://")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
    GcsStore(faulty_bucket.url).put("a", b"1")
    assert faulty_bucket.proxy.count("put", status=200) == 1


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
    # Every broken request costs a question of where the server stands, and, where the part had
    # not arrived, another try.
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
def test_a_watched_store_tells_of_bytes_on_their_way(
    in_parts: bool, faulty_bucket: FaultyBucket, tmp_path: Path, parts: int
) -> None:
    """Both ways, and many times for each large object."""
    data = os.urandom(5 * parts if in_parts else parts)
    (tmp_path / "file").write_bytes(data)
    moves: list[int] = []
    store = GcsStore(faulty_bucket.url).watched(lambda: moves.append(1)).below("a")
    store.put_file("b", str(tmp_path / "file"))
    assert len(moves) >= (5 * parts / 2**14 if in_parts else 1)
    moves.clear()
    store.with_limits(retry_s=5, timeout_s=2).get_file("b", str(tmp_path / "back"))
    assert len(moves) >= 4
    assert (tmp_path / "back").read_bytes() == data


def test_a_watched_folder_tells_of_bytes_on_their_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(3 << 20))
    moves: list[int] = []
    store = LocalStore(str(tmp_path / "store")).watched(lambda: moves.append(1)).below("a")
    store.put_file("b", str(tmp_path / "file"))
    assert len(moves) == 3
    store.get_file("b", str(tmp_path / "back"))
    assert len(moves) == 6


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
    with pytest.raises(Unavailable, match="nothing came for"):
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


def every_request(store: Store, path: str) -> list[Callable[[], object]]:
    return [
        lambda: store.put("new", b"1", if_generation=0),
        lambda: store.put_file("new", path),
        lambda: store.get("a"),
        lambda: store.get_file("a", path + "-copy"),
        lambda: store.stat("a"),
        lambda: store.list(),
        lambda: store.delete("a"),
    ]


@pytest.mark.parametrize("failure", [429, 500, 503, "reset", "stall"])
def test_failure_that_outlasts_the_retries_is_unavailable(
    failure: int | str, faulty_bucket: FaultyBucket, tmp_path: Path
) -> None:
    store = open_store(faulty_bucket.url, retry_s=0.3)
    store.put("a", b"1")
    (tmp_path / "file").write_bytes(b"1")
    if failure == "stall":
        faulty_bucket.proxy.add(Fault("stall", seconds=60))
    elif failure == "reset":
        faulty_bucket.proxy.down = True
    else:
        faulty_bucket.proxy.add(Fault("status", status=int(failure)))
    for request in every_request(store, str(tmp_path / "file")):
        start = time.monotonic()
        with pytest.raises(Unavailable, match="check the network and the server") as caught:
            request()
        assert caught.value.exit_code == 5
        assert "\n" not in str(caught.value)
        assert time.monotonic() - start < 20  # as shipped, requests are repeated for 120 s


# google-auth leaves the connection of a download open when it was answered with 401.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("status", [400, 401, 403])
def test_refusal_is_an_error_at_once(
    status: int, faulty_bucket: FaultyBucket, tmp_path: Path
) -> None:
    store = GcsStore(faulty_bucket.url)
    (tmp_path / "file").write_bytes(b"1")
    faulty_bucket.proxy.add(Fault("status", status=status))
    for request in every_request(store, str(tmp_path / "file")):
        start = time.monotonic()
        with pytest.raises(StorageError) as caught:
            request()
        assert not isinstance(caught.value, Unavailable)
        assert time.monotonic() - start < 20  # as shipped, requests are repeated for 120 s
    del caught
    gc.collect()


# A certificate for localhost that signs itself, and its key: openssl req -x509 -newkey ec
# -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 36500 -subj /CN=localhost
SELF_SIGNED = """
-----BEGIN CERTIFICATE-----
MIIBgDCCASWgAwIBAgIUGFOmXfKvNBdm6g/N4ndpQVOaELAwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyODE4MzE1N1oYDzIxMjYxMTA0
MTgzMTU3WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAATFYfOzgLhKms7NyRPC1e1/+QUfSBkjpAYnSBNJtOIum/Np/gpGEPgB
g/2b0Pv0AqPihe37zyUbc7aV8LbIDTYwo1MwUTAdBgNVHQ4EFgQU38Lmjc7rjiqR
vAhKMbPSibEJI68wHwYDVR0jBBgwFoAU38Lmjc7rjiqRvAhKMbPSibEJI68wDwYD
VR0TAQH/BAUwAwEB/zAKBggqhkjOPQQDAgNJADBGAiEA+IziIBQAI+1KNHSASTEv
CklI9124nBSR5nOi90GLxr0CIQDabaKqWwOqMhzfxB2vO92YnD7N48YAiBac9X2A
ljpsBA==
-----END CERTIFICATE-----
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgv1sgUrZgVU5SHkWU
NRixNTf/fLzR0MVk5tKwWqaH9UShRANCAATFYfOzgLhKms7NyRPC1e1/+QUfSBkj
pAYnSBNJtOIum/Np/gpGEPgBg/2b0Pv0AqPihe37zyUbc7aV8LbIDTYw
-----END PRIVATE KEY-----
"""


@pytest.mark.parametrize(
    ("is_tls", "authority", "message"),
    [
        (True, None, r"the certificate of 127\.0\.0\.1:\d+ is refused: self-signed certificate"),
        (
            False,
            None,
            r"127\.0\.0\.1:\d+ and this machine agree on no TLS \(WRONG_VERSION_NUMBER\)",
        ),
        (True, "/nowhere", "invalid path: /nowhere; check REQUESTS_CA_BUNDLE"),
    ],
)
def test_tls_that_cannot_work_is_told_at_once(
    is_tls: bool,
    authority: str | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_bytes(b"1")
    server, _ = _serve_status(404)
    if is_tls:
        (tmp_path / "pem").write_text(SELF_SIGNED)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "pem")
        server.socket = context.wrap_socket(server.socket, server_side=True)
    if authority:
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", authority)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"https://127.0.0.1:{server.server_port}")
    store = open_store("gs://bucket/x")
    try:
        for request in every_request(store, str(tmp_path / "file")):
            start = time.monotonic()
            with pytest.raises(StorageError, match=message) as caught:
                request()
            assert not isinstance(caught.value, Unavailable)
            assert time.monotonic() - start < 20  # as shipped, requests are repeated for 120 s
    finally:
        server.shutdown()
        server.server_close()


def test_broken_line_and_refused_token_are_told_apart_from_refused_tls() -> None:
    import requests
    import urllib3
    from google.auth.exceptions import TransportError

    broken = ssl.SSLEOFError(8, "[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred")
    broken.reason = "UNEXPECTED_EOF_WHILE_READING"
    refused = ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] expired")
    refused.reason = "CERTIFICATE_VERIFY_FAILED"
    for inner, may_heal in ((broken, True), (refused, False)):
        pool = urllib3.HTTPSConnectionPool("host")
        wrapped = urllib3.exceptions.MaxRetryError(pool, "/", urllib3.exceptions.SSLError(inner))
        error = requests.exceptions.SSLError(wrapped)
        assert is_transient(error) == may_heal
        assert is_transient(TransportError(error)) == may_heal


def test_outage_shorter_than_the_retries_is_waited_out(faulty_bucket: FaultyBucket) -> None:
    faulty_bucket.proxy.down = True
    timer = threading.Timer(1.5, lambda: setattr(faulty_bucket.proxy, "down", False))
    timer.start()
    store = open_store(faulty_bucket.url, retry_s=0.01).with_limits(retry_s=30, timeout_s=1)
    assert store.put("a", b"1", if_generation=0).size == 1
    timer.join()
    assert faulty_bucket.proxy.count("put", status=0) > 1


def test_retries_wait_for_random_times(
    faulty_bucket: FaultyBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many workers that fail together must not come back together."""
    faulty_bucket.proxy.add(Fault("status", kinds=("stat",), count=12))
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    GcsStore(faulty_bucket.url).stat("a")
    assert len(set(pauses)) == len(pauses) == 12
    assert all(0 <= pause <= min(0.2 * 2**i, 10) for i, pause in enumerate(pauses))


def test_only_objects_are_asked_for(faulty_bucket: FaultyBucket) -> None:
    """The bucket itself takes another right (storage.buckets.get), which few accounts have."""
    script = """
import sys, threading
from flexunet.storage import open_store
open_store(sys.argv[1]).put("a", b"1")
for thread in threading.enumerate()[1:]:  # what still runs may ask for more
    thread.join()
"""
    subprocess.run([sys.executable, "-c", script, faulty_bucket.url], check=True)
    assert [entry.kind for entry in faulty_bucket.proxy.log] == ["put"]


def test_missing_bucket_is_named_at_once(bucket_url: str) -> None:
    store = open_store("gs://no-such-bucket/x")
    with pytest.raises(StorageError, match="bucket 'no-such-bucket' does not exist"):
        store.put("a", b"")
    with pytest.raises(StorageError, match="bucket 'no-such-bucket' does not exist"):
        store.list()


def _serve_status(status: int) -> tuple[ThreadingHTTPServer, list[str]]:
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            requests.append(self.path)
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_error(status)

        def do_GET(self) -> None:  # after a refusal the library asks about the bucket
            self.send_error(status)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server, requests


@pytest.mark.parametrize(
    ("status", "message", "is_retried"),
    [
        (401, "cannot write gs://bucket/x/a: no Google Cloud credentials; run", False),
        (403, "cannot write gs://bucket/x/a: permission denied; grant", False),
        (503, "cannot write gs://bucket/x/a: Timeout of 0.5s exceeded", True),
    ],
)
def test_server_error_is_one_line(
    status: int, message: str, is_retried: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, requests = _serve_status(status)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_address[1]}")
    try:
        with pytest.raises(StorageError, match=message) as caught:
            GcsStore("gs://bucket/x", retry_s=0.5).put("a", b"1")
    finally:
        server.shutdown()
        server.server_close()
    assert "\n" not in str(caught.value)
    assert (len(requests) > 1) == is_retried


@pytest.mark.parametrize(
    "name",
    [
        "", "/a", "a/", "a//b", "..", "a/../b", "a/..", ".", "./a", "a\\b", "C:a", "a\0b", "a\nb",
        "a\x7f", "e\u0301", "a\u202eb", "a\u200bb", "a\u2066b", "\ufeffa",
        "a\u2028b", "\udc80", "x" * 256, "/".join(["x" * 200] * 6),
        ".flexunet-tmp-1",
    ],
)  # fmt: skip
def test_unsafe_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ContentError, match="is refused") as caught:
        LocalStore(str(tmp_path)).put(name, b"")
    assert str(caught.value).isprintable()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a", "a/b.c", "..a", "a..", ".a", "a b", "é", "x" * 255, "ab:c"])
def test_safe_name_is_kept(name: str) -> None:
    assert checked_name(name) == name


PARTS = st.sampled_from(["..", ".", "", "a", "é", "\\", "\0", "C:", "~", "...", " ", "/"])


@given(st.lists(PARTS | st.text("./\\a\u0301é~:\n", max_size=5), max_size=6).map("/".join))
def test_no_name_leaves_the_folder(name: str) -> None:
    root = "/nonexistent/root"
    try:
        path = local_path(root, name)
    except ContentError:
        return
    assert os.path.normpath(path) == path
    assert path.startswith(root + "/")


def test_symbolic_links_do_not_lead_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(b"s")
    root = tmp_path / "root"
    root.mkdir()
    (root / "real").write_bytes(b"r")
    (root / "inner").symlink_to(root / "real")
    (root / "folder").symlink_to(tmp_path / "outside")
    (root / "file").symlink_to(tmp_path / "outside" / "secret")
    store = LocalStore(str(root))
    assert names(store) == ["inner", "real"]
    assert "2 symbolic links" in caplog.text
    for name in ("file", "folder/secret", "folder/new"):
        with pytest.raises(ContentError, match="leads out of"):
            store.get(name)
        with pytest.raises(ContentError, match="leads out of"):
            store.put(name, b"")
    with pytest.raises(ContentError, match="leads out of"):
        store.below("folder")
    assert os.listdir(tmp_path / "outside") == ["secret"]


def test_a_source_follows_links_to_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    (outside / "deep").mkdir(parents=True)
    (outside / "deep" / "a").write_bytes(b"abc")
    (outside / ".flexunet-tmp-1").write_bytes(b"")
    root.mkdir()
    (root / "file").symlink_to(outside / "deep" / "a")
    (root / "folder").symlink_to(outside)
    (root / "again").symlink_to(outside / "deep")  # another way to the same files is no loop
    store = pickle.loads(pickle.dumps(open_source(str(root))))  # noqa: S301
    store = store.watched(lambda: None)
    assert names(store) == ["again/a", "file", "folder/deep/a"]
    assert names(store, "folder/d") == ["folder/deep/a"]
    for stat in store.list():
        assert store.stat(stat.name) == stat
        assert store.get(stat.name) == b"abc"
        store.get_file(stat.name, str(tmp_path / "copy"))
    assert store.below("folder").get("deep/a", 1, 1) == b"b"
    for change in (lambda: store.put("folder/deep/a", b""), lambda: store.delete("again/a")):
        with pytest.raises(ContentError, match="leads out of"):
            change()
    assert (outside / "deep" / "a").read_bytes() == b"abc"
    assert not caplog.text


def test_links_of_a_source_that_lead_nowhere_or_in_circles(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "root"
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "b" / "file").write_bytes(b"1")
    for name, target in {
        "gone": tmp_path / "nothing",
        "itself": root / "itself",
        "device": Path(os.devnull),
        "a/b/up": root / "a",
        "a/b/root": root,
        "a/b/top": tmp_path,
    }.items():
        (root / name).symlink_to(target)
    store = open_source(str(root))
    broken = ["device", "gone", "itself"]
    for _ in range(3):
        assert names(store) == ["a/b/file", *broken]
    assert caplog.text.count("3 symbolic links to a folder above are left out") == 1
    for stat in store.list()[1:]:
        assert (stat.size, store.stat(stat.name)) == (0, None)
        with pytest.raises(ContentError, match=f"{stat.name}: is a symbolic link that leads to no"):
            store.get(stat.name)
        with pytest.raises(ContentError, match="leads to no file"):
            store.get_file(stat.name, str(tmp_path / "copy"))
    assert names(LocalStore(str(root))) == ["a/b/file"]  # nor does a dataset's or a run's fail


def test_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for place in ("file", "file/x", "file/x/y"):
        with pytest.raises(UsageError) as refused:
            LocalStore(str(tmp_path / place)).put("a", b"")
        assert str(refused.value) == f"{tmp_path}/file is a file, not a folder; give a folder"
        assert (refused.value.exit_code, kind_of(refused.value)) == (2, "UsageError")
        # Whoever keeps work that cannot be stored keeps it here too.
        assert isinstance(refused.value, StorageError)
    with pytest.raises(StorageError, match="cannot write /proc/flexunet/a"):
        LocalStore("/proc/flexunet").put("a", b"")


FULL_DISK = """
import os, sys
sys.path.insert(0, sys.argv[2])
from flexunet.errors import StorageError
from flexunet.storage import LocalStore
store = LocalStore(sys.argv[1])
store.put("old", b"1")
try:
    store.put("new", bytes(1 << 20))
except StorageError as error:
    print(error)
print([stat.name for stat in store.list()], os.listdir(sys.argv[1]))
"""


def test_full_disk_is_named_and_leaves_no_part(tmp_path: Path) -> None:
    project = str(Path(__file__).resolve().parents[2])
    mount = f"mount -t tmpfs -o size=64k tmpfs {tmp_path}"
    # A file system of its own in a mount namespace of its own.
    space = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*space, mount], capture_output=True).returncode:
        pytest.skip("this machine allows no private mounts")
    script = f'{mount} && exec "$@"'
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), project]
    result = subprocess.run([*space, script, "sh", *command], capture_output=True, text=True)
    lines = result.stdout.splitlines()
    assert "No space left on device; free some space" in lines[0], result.stderr
    assert lines[1] == "['old'] ['old']"


KILLED = """
import os, sys
sys.path.insert(0, sys.argv[2])
from flexunet.storage import LocalStore
os.fsync = lambda descriptor: os._exit(9)
LocalStore(sys.argv[1]).put("a/new", b"half")
"""


def test_killed_put_leaves_nothing_listed(tmp_path: Path) -> None:
    project = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", KILLED, str(tmp_path), project]
    assert subprocess.run(command).returncode == 9
    assert len(os.listdir(tmp_path / "a")) == 1
    store = LocalStore(str(tmp_path))
    assert store.list() == []
    assert store.remove_unfinished() == 1
    assert os.listdir(tmp_path / "a") == []


def test_changed_download_is_refused(bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(bucket_url)
    store.put("a", b"1")
    # Bytes that change on the way are the library's to find; what it handed over is checked again.
    monkeypatch.setattr(gcs, "crc32c_of", lambda data, value=0: 7)
    with pytest.raises(StorageError, match="do not match the server's crc32c"):
        store.get("a")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://bucket/x", "not supported; use gs://bucket/folder"),
        ("gs:/bucket/x", "lacks a slash"),
        ("gs://", "not a bucket name"),
        ("gs://Bad_Bucket", "not a bucket name"),
        ("gs://bucket/a/../b", r"holds '\.\.'"),
        ("file://host/x", "not supported"),
        ("", "not a folder or storage URL"),
    ],
)
def test_open_store_refuses(url: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_store(url)


def test_open_store_understands_the_three_forms(tmp_path: Path) -> None:
    assert open_store("gs://bucket/a/b/").url == "gs://bucket/a/b"
    assert open_store(f"file://{tmp_path}/a%20b").url == f"{tmp_path}/a b"
    assert open_store(f"{tmp_path}/a/").local_root == f"{tmp_path}/a"


def test_storage_is_imported_without_the_cloud_client() -> None:
    project = Path(__file__).resolve().parents[2]
    code = "import sys, flexunet.storage; print('google.cloud.storage' in sys.modules)"
    command = [sys.executable, "-c", code]
    assert subprocess.check_output(command, cwd=project, text=True) == "False\n"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (None, "was not found"),
        ('{"type":"service_account"', "not a valid json file"),
        ('{"type":"service_account","project_id":"x"}', "missing fields .*client_email"),
    ],
)
def test_a_wrong_key_file_is_named_with_its_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None, fault: str
) -> None:
    import google.auth

    path = tmp_path / "key.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
    with pytest.raises(google.auth.exceptions.DefaultCredentialsError) as caught:
        google.auth.default()
    found = describe_cloud_error(caught.value, "read", "gs://b/x", "b", "object")
    assert re.search(f"GOOGLE_APPLICATION_CREDENTIALS={path} holds .*{fault}", str(found))
