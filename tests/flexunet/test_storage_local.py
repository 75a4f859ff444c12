"""Folders: conditional puts and their locks, symbolic links, full disks and killed puts."""

import os
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flexunet.errors import ContentError, StorageError, UsageError, kind_of
from flexunet.storage import (
    LocalStore,
    PreconditionFailed,
    local,
    open_source,
    probe_preconditions,
)
from tests.flexunet.listing import names


def test_put_returns_its_own_generation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another writer comes between a put's replacement and its return."""
    store = LocalStore(str(tmp_path))
    before = store.put("a", b"0").generation
    sync_folder = local.sync
    others: list[int] = []

    def overtaken(folder: str) -> None:
        sync_folder(folder)
        if not others:
            others.append(0)
            stat = store.stat("a")
            assert stat is not None
            others[0] = store.put("a", b"other", if_generation=stat.generation).generation

    monkeypatch.setattr(local, "sync", overtaken)
    own = store.put("a", b"own", if_generation=before)
    assert before < own.generation < others[0]
    with pytest.raises(PreconditionFailed):
        store.put("a", b"next", if_generation=own.generation)
    assert store.get("a") == b"other"


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


def test_conditional_puts_of_a_folder(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    first = store.put("a", b"1", if_generation=0)
    with pytest.raises(PreconditionFailed, match="exists already"):
        store.put("a", b"2", if_generation=0)
    with pytest.raises(PreconditionFailed, match=f"has generation {first.generation}, not 5"):
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


def test_a_watched_folder_reports_bytes_on_their_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(3 << 20))
    moves: list[int] = []
    store = LocalStore(str(tmp_path / "store")).watched(lambda: moves.append(1)).subpath("a")
    store.put_file("b", str(tmp_path / "file"))
    assert len(moves) == 3
    store.get_file("b", str(tmp_path / "back"))
    assert len(moves) == 6


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
    assert "skipped 2 symbolic links to folders or out of this folder (copy" in caplog.text
    for name in ("file", "folder/secret", "folder/new"):
        with pytest.raises(ContentError, match="points outside"):
            store.get(name)
        with pytest.raises(ContentError, match="points outside"):
            store.put(name, b"")
    with pytest.raises(ContentError, match="points outside"):
        store.subpath("folder")
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
    assert store.subpath("folder").get("deep/a", 1, 1) == b"b"
    for change in (lambda: store.put("folder/deep/a", b""), lambda: store.delete("again/a")):
        with pytest.raises(ContentError, match="points outside"):
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
    assert caplog.text.count("skipped 3 symbolic links to a folder above") == 1
    for stat in store.list()[1:]:
        assert (stat.size, store.stat(stat.name)) == (0, None)
        with pytest.raises(ContentError, match=f"{stat.name}: is a broken symbolic link"):
            store.get(stat.name)
        with pytest.raises(ContentError, match="is a broken symbolic link"):
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
