"""The fence around a run: whatever a run ever writes is refused once its owner has lost it."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf

from flexunet.errors import LockedError
from flexunet.storage import LocalStore, ObjectMeta, ObjectStore, open_store
from flexunet.storage.names import TEMPORARY
from job.config import TrainConfig
from job.runs.lease import LeaseTiming
from job.runs.run import Run
from job.training.loop import train_and_evaluate
from job.training.setup import Callbacks
from tests.conftest import FaultyBucket
from tests.faults.proxy import Fault
from tests.job.discs import prepare_discs
from tests.job.setups import one_process_setup

QUICK = LeaseTiming(renew_s=0.05, expire_s=0.2)
Change = tuple[str, tuple[Any, ...], dict[str, Any]]  # method, arguments, options


class RecordingStore(LocalStore):
    """A folder that keeps in mind how it was changed, and below which folder."""

    def __init__(self, path: str, changes: list[Change], prefix: str = "", **options: Any) -> None:
        super().__init__(path, **options)
        object.__setattr__(self, "_changes", changes)
        object.__setattr__(self, "_prefix", prefix)

    def _note(self, method: str, name: str, *rest: Any, **options: Any) -> None:
        self._changes.append((method, (f"{self._prefix}{name}", *rest), options))

    def put(self, name: str, data: bytes, **options: Any) -> ObjectMeta:
        self._note("put", name, data, **options)
        return super().put(name, data, **options)

    def put_file(self, name: str, path: str, **options: Any) -> ObjectMeta:
        self._note("put_file", name, path, **options)
        return super().put_file(name, path, **options)

    def delete(self, name: str) -> None:
        self._note("delete", name)
        super().delete(name)

    def subpath(self, prefix: str) -> "RecordingStore":
        return RecordingStore(
            super().subpath(prefix).url,
            self._changes,
            f"{self._prefix}{prefix}/",
            moved=self._moved,
            check=self._check,
        )


def digest_of(folder: Path) -> str:
    """Returns a digest of all names and bytes but the lease's, which is renewed meanwhile."""
    value = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        is_of_lease = path.name in ("lease.json", ".flexunet-lock") or (
            path.parent == folder and path.name.startswith(TEMPORARY)
        )
        if path.is_file() and not is_of_lease:
            value.update(str(path).encode() + path.read_bytes())
    return value.hexdigest()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Change]]:
    """Returns the folder of a run that resumed and finished, and every change that it made."""
    folder = tmp_path_factory.mktemp("fence")
    config = TrainConfig(
        data=prepare_discs(folder), output=str(folder / "runs"), name="run", epochs=2,
        global_batch_size=4, precision="float32", prediction_images=1, keep_checkpoints=1,
        model={"num_layers": 2, "base_filters": 2, "base_kernels": (3, 3)},
    )  # fmt: skip
    changes: list[Change] = []
    store = RecordingStore(str(folder / "runs" / "run"), changes)
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    for epochs in (1, 2):  # the second call opens the finished run again
        longer = config.model_copy(update={"epochs": epochs})
        with Run.acquire(store, by_lease=True, timing=LeaseTiming(0.5, 60)) as run:
            train_and_evaluate(
                one_process_setup(longer, run, strategy),
                Callbacks(lambda event: None, lambda: False),
            )
    return folder / "runs" / "run", changes


def test_a_run_writes_nothing_beside_its_own_store(recorded: tuple[Path, list[Change]]) -> None:
    folder, changes = recorded
    written = {arguments[0] for method, arguments, _ in changes if method != "delete"}
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {name for name in found - written if not name.startswith(".flexunet-")} == set()
    # What it may write, so that a new writer is looked at here.
    kinds = {name.split("/")[0] for name in written if not name.startswith("flexunet-probe")}
    assert kinds == {
        "checkpoints", "config.yaml", "dataset.json", "environment.json", "epoch_change_infer",
        "evaluation", "identity.json", "lease.json", "metrics", "outcome.json", "report.html",
        "tensorboard",
    }  # fmt: skip


def test_nothing_of_a_run_is_changed_by_a_process_that_lost_it(
    recorded: tuple[Path, list[Change]], tmp_path: Path
) -> None:
    _, changes = recorded
    assert len(changes) > 60
    store = LocalStore(str(tmp_path / "run"))
    timing = LeaseTiming(renew_s=1e3, expire_s=0.2)  # paused: it renews nothing
    late = Run.acquire(store, by_lease=True, timing=timing)
    late.check_identity({"x": 1}, "0" * 64)
    (tmp_path / "member").write_bytes(b"late")
    with Run.acquire(store, by_lease=True, timing=QUICK) as run:
        for name in {arguments[0] for _, arguments, _ in changes} - {"lease.json"}:
            run.store.put(name, b"of the new owner")
        before = digest_of(tmp_path / "run")
        for method, arguments, options in changes:
            name, rest = arguments[0], list(arguments[1:])
            if method == "put_file":
                rest = [str(tmp_path / "member")]
            folder, _, last = name.rpartition("/")
            stores: list[ObjectStore] = [late.store, late.store.watched(lambda: None)]
            stores += [late.store.subpath(folder)] if folder else []
            for each in stores:
                target = last if each is stores[-1] and folder else name
                with pytest.raises(LockedError, match="has taken the run over"):
                    getattr(each, method)(target, *rest, **options)
        for call in WRITERS:
            with pytest.raises(LockedError, match="has taken the run over"):
                call(late, str(tmp_path / "member"))
        assert digest_of(tmp_path / "run") == before
        assert not run.lost
    late.close()


WRITERS: list[Callable[[Run, str], Any]] = [
    lambda run, path: run.commit(10, 1, {"member": path}, {}),
    lambda run, path: run.put_text("table.csv", ""),
    lambda run, path: run.put_bytes("picture.png", b""),
    lambda run, path: run.write_outcome("finished", 0),
    lambda run, path: run.clear_outcome(),
    lambda run, path: run.note_end("stopped"),
    lambda run, path: run.store.remove_unfinished(),
    lambda run, path: run.store.with_limits(retry_s=1, timeout_s=1).put("a", b""),
]


class NotAllowedError(Exception):
    pass


def refuse() -> None:
    raise NotAllowedError


@pytest.mark.parametrize("kind", ["bucket", "folder"])
def test_every_change_of_a_guarded_store_asks_first(
    kind: str, bucket_url: str, tmp_path: Path
) -> None:
    """A new method of `ObjectStore` is either known here as one that reads, or guarded."""
    reading = {"stat", "list", "folders", "get", "get_file", "url", "local_root", "retry_s"}
    making = {"subpath", "with_limits", "watched", "guarded"}  # give a store that is guarded too
    (tmp_path / "member").write_bytes(b"late")
    changing: dict[str, tuple[Any, ...]] = {
        "put": ("a", b"1"), "put_file": ("a", str(tmp_path / "member")), "delete": ("a",),
        "remove_unfinished": (),
    }  # fmt: skip
    methods = {name for name in dir(ObjectStore) if not name.startswith("_")}
    assert methods == reading | making | set(changing)
    inner = open_store(bucket_url if kind == "bucket" else str(tmp_path / "store"))
    inner.put("a", b"0")
    inner.put("b/a", b"0")
    guarded = inner.guarded(refuse)
    for store in (
        guarded, guarded.subpath("b"), guarded.watched(lambda: None),
        guarded.with_limits(retry_s=1, timeout_s=1),
    ):  # fmt: skip
        for name, arguments in changing.items():
            if (kind, name) == ("bucket", "remove_unfinished"):
                continue  # there is nothing that it could remove
            with pytest.raises(NotAllowedError):
                getattr(store, name)(*arguments)
        assert store.get("a") == b"0"


@pytest.mark.parametrize("call", ["put", "put_file", "put_parts", "delete"])
def test_a_change_that_is_repeated_asks_again_before_every_try(
    call: str, faulty_bucket: FaultyBucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An outage of this machine alone: another one takes the run over meanwhile."""
    store = open_store(faulty_bucket.url)
    store.put("a", b"of the new owner")
    path = tmp_path / "member"
    path.write_bytes(bytes(3 << 18))
    if call == "put_parts":
        monkeypatch.setattr("flexunet.storage.gcs._SINGLE_BYTES", 1 << 18)
        monkeypatch.setattr("flexunet.storage.gcs_transfer._PART_BYTES", 1 << 18)
    tries: list[int] = []

    def check() -> None:
        tries.append(1)
        if len(tries) > 2:
            raise NotAllowedError

    faulty_bucket.proxy.add(Fault("status", kinds=("put", "session", "delete"), count=2))
    late = store.guarded(check)
    with pytest.raises(NotAllowedError):
        {
            "put": lambda: late.put("a", b"late"),
            "put_file": lambda: late.put_file("a", str(path)),
            "put_parts": lambda: late.put_file("a", str(path)),
            "delete": lambda: late.delete("a"),
        }[call]()
    assert len(tries) == 3
    assert store.get("a") == b"of the new owner"


def test_a_run_that_was_given_back_is_not_written_any_more(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path / "run"))
    for by_lease in (True, False):
        run = Run.acquire(store, by_lease=by_lease, timing=LeaseTiming(1, 30))
        run.put_text("table.csv", "before")
        run.close()
        for call in WRITERS:
            with pytest.raises(LockedError, match="has released the run"):
                run.check_identity({"x": 1}, "0" * 64) if run.read_identity() is None else None
                call(run, str(tmp_path / "run" / "table.csv"))
        assert store.get("table.csv") == b"before"


def test_a_run_whose_folder_was_removed_and_made_anew_is_left_alone(tmp_path: Path) -> None:
    import shutil

    late = Run.acquire(LocalStore(str(tmp_path / "run")))
    shutil.rmtree(tmp_path / "run")
    with Run.acquire(LocalStore(str(tmp_path / "run"))) as run:
        run.put_text("metrics/history.csv", "new")
        with pytest.raises(LockedError, match="was deleted"):
            late.store.subpath("metrics").put("history.csv", b"old")
        assert json.loads(run.store.get("lease.json"))["attempt"] == 1
        assert run.store.get("metrics/history.csv") == b"new"
    late.close()
