"""Owns a run: stores its checkpoints, restores them, and records how it ended.

Manages `lease.json`, `.lock`, `identity.json`, `outcome.json` and `checkpoints/` in the folder of
the run. Does not import TensorFlow and does not read the content of checkpoints.

One process at a time owns a run. Each opening is an attempt with its own number, see
`job/runs/lease.py`. All other files of the run are written through `Run.store`, which refuses every
change after the run is lost.
"""

import json
import threading
from collections.abc import Collection, Mapping
from types import TracebackType
from typing import Any

from flexunet.progress import Heartbeat, no_heartbeat
from flexunet.storage import NotFound, ObjectStore, open_store
from job.config import checked_run_name
from job.runs.checkpoints import (
    Checkpoint,
    CheckpointRecord,
    GarbageCollector,
    check_member_names,
    checkpoint_of,
    delete_folder,
    describe_members,
    download_newest,
    record_bytes,
    record_state,
)
from job.runs.identity import read_identity, settle_identity
from job.runs.layout import COMMIT_NAME, ENDS_FOLDER, OUTCOME_NAME, CheckpointRef, checkpoint_prefix
from job.runs.lease import LeaseTiming
from job.runs.ownership import Ownership, acquire
from job.runs.status import End, read_outcome


class Run:
    """Represents a run that this process owns until `close`; a context manager.

    Several threads may call its methods.

    Attributes:
        store: the folder of the run. Writing raises LockedError after the run is lost.
    """

    def __init__(
        self, store: ObjectStore, ownership: Ownership, candidates: list[CheckpointRef]
    ) -> None:
        self.store = store.guarded(ownership.check)
        self.attempt = ownership.lease.attempt
        self._ownership = ownership
        self._candidates = candidates
        self._newest: Checkpoint | None = None
        self._digests: tuple[str, str] | None = None
        self._garbage = GarbageCollector(self.store)
        self._mutex = threading.RLock()

    @classmethod
    def open(
        cls,
        output_url: str,
        name: str,
        *,
        timing: LeaseTiming | None = None,
        launch: str | None = None,
    ) -> "Run":
        """Acquires the run `name` below `output_url`, new or existing.

        Args:
            launch: name of the launcher of this process. The next process of the same launcher does
                not wait until the lease expires: the launcher knows that the process before is
                gone, and if it were not, it could no longer store checkpoints.

        Raises:
            UsageError: the name is not allowed.
            LockedError: another process owns the run; nothing was written.
            StorageError: storage fails, or the server does not enforce preconditions.
        """
        store = open_store(output_url).subpath(checked_run_name(name))
        return cls.acquire(store, timing=timing, launch=launch)

    @classmethod
    def acquire(
        cls,
        store: ObjectStore,
        *,
        timing: LeaseTiming | None = None,
        by_lease: bool | None = None,
        launch: str | None = None,
    ) -> "Run":
        """Acquires the run in the folder `store`; otherwise as `open`.

        Args:
            by_lease: use a renewed lease (the default for remote folders) instead of a file lock of
                the operating system.
        """
        ownership, candidates = acquire(store, timing=timing, by_lease=by_lease, launch=launch)
        return cls(store, ownership, candidates)

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def url(self) -> str:
        """The URL of the run's folder."""
        return self.store.url

    @property
    def lost(self) -> bool:
        """Whether another process has taken the run over; the caller should stop."""
        return self._ownership.is_lost

    def check_owned(self) -> None:
        """Raises LockedError if this process knows that it has lost the run."""
        if self.lost:
            self._ownership.confirm()

    def close(self) -> None:
        """Releases the run; a second call does nothing."""
        self._ownership.release()

    def check_identity(self, identity: Mapping[str, Any], dataset_digest: str) -> None:
        """Checks that the run has this identity; the first attempt stores it.

        Args:
            identity: nested JSON values of the config fields that identify a run.
            dataset_digest: sha256 of the dataset's manifest, hex.

        Raises:
            UsageError: values differ; names each with the stored and the new value.
        """
        self._digests = settle_identity(self.store, identity, dataset_digest)

    def read_identity(self) -> dict[str, Any] | None:
        """Returns `config` and `dataset_digest` of the first attempt; None before it."""
        return read_identity(self.store)

    def commit(
        self,
        step: int,
        epoch: int,
        members: Mapping[str, str],
        state: Mapping[str, Any],
        *,
        keep: Collection[str] = (),
        moved: Heartbeat = no_heartbeat,
    ) -> Checkpoint:
        """Stores a checkpoint of the local files `members` (name: path) and `state` atomically.

        If this attempt has stored this step already, returns the earlier checkpoint. Call
        `check_identity` first.

        Args:
            state: JSON values; NaN and infinity are kept.
            keep: folders of other checkpoints that must exist as long as this one.
            moved: called while bytes move, see `ObjectStore.watched`.

        Raises:
            LockedError: this process has lost the run; nothing is stored.
            StorageError: storage failed; nothing is stored, and a later call may succeed.
        """
        if self._digests is None:
            raise RuntimeError("call check_identity before commit")
        check_member_names(members)
        with self._mutex:
            newest = self._newest
            if newest and (newest.attempt, newest.step) == (self.attempt, step):
                return newest
            record = self._record(step, epoch, members, record_state(state, keep))
            prefix, data = checkpoint_prefix(step, self.attempt), record_bytes(record)
            # Confirm before any change: the next owner may rest on this very checkpoint.
            self._ownership.confirm()
            if not self._is_stored(f"{prefix}/{COMMIT_NAME}", data):
                self._put_members(step, members, moved)
                self._ownership.confirm()
                self.store.put(f"{prefix}/{COMMIT_NAME}", data, if_generation=0)
            self._ownership.check()  # the process may have been paused since `confirm`
            self._newest = checkpoint_of(record, prefix, data)
            return self._newest

    def restore(
        self, staging_dir: str, *, moved: Heartbeat = no_heartbeat
    ) -> tuple[Checkpoint, dict[str, str]] | None:
        """Downloads the newest checkpoint; returns it and local paths by name. None for a new run.

        Checks size, crc32c and sha256 of every file while copying it to `staging_dir`. Skips a
        damaged checkpoint with a warning and uses the next older one.

        Args:
            moved: called while bytes move, see `ObjectStore.watched`.

        Raises:
            ContentError: there are checkpoints, but all are damaged.
        """
        with self._mutex:
            refs = list(self._candidates)
            if self._newest and self._newest.attempt == self.attempt:
                refs.append(CheckpointRef(self.attempt, self._newest.step, self._newest.prefix))
            store = self.store.watched(moved)
            restored = download_newest(store, refs, staging_dir, self._digests)
            if restored is None:
                return None
            commit = restored[0]
            if commit.attempt != self.attempt and commit.prefix != self._ownership.base:
                self._ownership.rebase(commit.prefix)
            self._newest = commit
            return restored

    def collect_garbage(self, keep_last: int, keep: Collection[str] = ()) -> None:
        """Deletes checkpoints except the newest `keep_last` (at least 1) and those they need.

        A checkpoint needs the folders in its `keep`. Incomplete checkpoints of older attempts are
        deleted, too. COMMIT.json is deleted first, so an interrupted deletion leaves an incomplete
        checkpoint.

        Args:
            keep: more folders that the newest checkpoint needs.
        """
        with self._mutex:
            if self._newest is None:
                return
            self._ownership.confirm()
            newest = CheckpointRef(self._newest.attempt, self._newest.step, self._newest.prefix)
            self._garbage.collect(self._ownership.lease, newest, keep_last, keep)

    def put_text(self, name: str, text: str) -> None:
        """Writes or replaces a text file of the run (a table, the config)."""
        self.put_bytes(name, text.encode())

    def put_bytes(self, name: str, data: bytes) -> None:
        """Writes or replaces a file of the run.

        Raises:
            LockedError: the run is lost.
        """
        self.store.put(name, data)

    def read_outcome(self) -> dict[str, Any] | None:
        """Returns the outcome of the run (`status`, `exit_code` and more); None before its end."""
        return read_outcome(self.store)

    def write_outcome(self, status: str, exit_code: int, **details: Any) -> None:
        """Ends the run; later attempts find the outcome and do not train.

        Args:
            status: "finished" or "diverged".
        """
        self._ownership.confirm()
        outcome = {"status": status, "exit_code": exit_code, "attempt": self.attempt, **details}
        self.put_text(OUTCOME_NAME, json.dumps(outcome, indent=1) + "\n")

    def clear_outcome(self) -> None:
        """Reopens an ended run, for example to train more epochs."""
        self._ownership.confirm()
        self.store.delete(OUTCOME_NAME)

    def note_end(self, how: End, **details: Any) -> None:
        """Records how this attempt ends without ending the run; a killed one records nothing."""
        text = json.dumps({"end": how, **details}) + "\n"
        self.put_text(f"{ENDS_FOLDER}/{self.attempt}.json", text)

    def _record(
        self, step: int, epoch: int, members: Mapping[str, str], state: dict[str, Any]
    ) -> CheckpointRecord:
        dataset_digest, config_digest = self._digests or ("", "")
        return CheckpointRecord(
            step=step,
            attempt=self.attempt,
            epoch=epoch,
            members=describe_members(members),
            dataset_digest=dataset_digest,
            config_digest=config_digest,
            state=state,
        )

    def _put_members(self, step: int, members: Mapping[str, str], moved: Heartbeat) -> None:
        prefix, store = checkpoint_prefix(step, self.attempt), self.store.watched(moved)
        delete_folder(
            self.store, store.list(f"{prefix}/")
        )  # left by an interrupted attempt to store it
        for name, path in members.items():
            store.put_file(f"{prefix}/{name}", path, if_generation=0)

    def _is_stored(self, name: str, data: bytes) -> bool:
        """Returns whether an earlier request, whose answer was lost, has stored `data`."""
        try:
            return self.store.get(name) == data
        except NotFound:
            return False
