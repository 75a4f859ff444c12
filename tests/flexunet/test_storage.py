"""Both stores against one set of expectations; the bucket is a real server (see conftest)."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from flexunet.errors import UsageError
from flexunet.storage import (
    NotFound,
    ObjectStore,
    crc32c_of,
    crc32c_of_file,
    join_url,
    open_store,
    probe_writable,
)
from tests.flexunet.listing import names

# RFC 3720 appendix B.4: the CRC-32C of "123456789" is e3069283 (hex).
CHECK_CRC32C = 0xE3069283


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "folder":
        return open_store(str(tmp_path / "store"))
    return open_store(request.getfixturevalue("bucket_url"))


def test_crc32c_matches_the_published_check_value(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"123456789")
    assert crc32c_of(b"123456789") == CHECK_CRC32C
    assert crc32c_of(b"6789", crc32c_of(b"12345")) == CHECK_CRC32C
    assert crc32c_of_file(str(tmp_path / "f")) == CHECK_CRC32C


def test_put_then_get_returns_the_bytes_and_ranges(store: ObjectStore) -> None:
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


def test_put_file_and_get_file_keep_nine_mebibytes(store: ObjectStore, tmp_path: Path) -> None:
    # Over 8 MiB the client library uploads in another way (resumable).
    data = os.urandom(9 << 20)
    (tmp_path / "source").write_bytes(data)
    stat = store.put_file("big", str(tmp_path / "source"))
    assert stat.size == 9 << 20
    assert store.get_file("big", str(tmp_path / "copies" / "copy")) == crc32c_of(data)
    assert (tmp_path / "copies" / "copy").read_bytes() == data
    assert os.listdir(tmp_path / "copies") == ["copy"]


def test_empty_object_is_kept(store: ObjectStore) -> None:
    assert store.put("empty", b"").size == 0
    assert store.get("empty") == b""


def test_missing_object_is_not_found(store: ObjectStore, tmp_path: Path) -> None:
    assert store.stat("none") is None
    with pytest.raises(NotFound, match="none does not exist"):
        store.get("none")
    with pytest.raises(NotFound, match="none does not exist"):
        store.get_file("none", str(tmp_path / "copy"))
    store.delete("none")
    assert not (tmp_path / "copy").exists()


def test_list_is_recursive_sorted_and_by_prefix(store: ObjectStore) -> None:
    assert names(store) == []
    for name in ("b/2", "a/x/1", "a-1", "b/10"):
        store.put(name, b"")
    assert names(store) == ["a-1", "a/x/1", "b/10", "b/2"]
    assert names(store, "a") == ["a-1", "a/x/1"]
    assert names(store, "b/1") == ["b/10"]
    assert names(store, "c/") == []
    assert len(store.list(most=2)) == 2
    assert store.list(most=100) == store.list()


def test_below_sees_the_same_objects(store: ObjectStore) -> None:
    store.put("a/b/c", b"1")
    assert names(store.subpath("a/b")) == ["c"]
    assert store.subpath("a").get("b/c") == b"1"
    assert store.subpath("a").url == join_url(store.url, "a")


def test_generation_changes_with_every_put(store: ObjectStore) -> None:
    generations = [store.put("a", b"same").generation for _ in range(20)]
    assert generations == sorted(set(generations))


def test_delete_removes_the_object_and_nothing_else(store: ObjectStore) -> None:
    store.put("a/b/c", b"")
    store.put("a/d", b"")
    store.delete("a/b/c")
    assert names(store) == ["a/d"]
    if store.local_root:
        assert os.listdir(os.path.join(store.local_root, "a")) == ["d"]


def test_store_pickles(store: ObjectStore) -> None:
    store.put("a", b"1")
    assert pickle.loads(pickle.dumps(store)).get("a") == b"1"  # noqa: S301


def test_probe_writable_leaves_nothing(store: ObjectStore) -> None:
    probe_writable(store)
    assert names(store) == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://bucket/x", "not supported; use gs://bucket/folder"),
        ("gs:/bucket/x", "lacks a slash"),
        ("gs://", "not a bucket name"),
        ("gs://Bad_Bucket", "not a bucket name"),
        ("gs://bucket/a/../b", r"contains '\.\.'"),
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
