"""The run protocol: who owns a run, what it committed, what to resume from, what may be deleted.

It owns `lease.json`, `.lock`, `identity.json`, `outcome.json` and `checkpoints/` of a run's folder.
It must not know TensorFlow, nor what the members of a commit hold.

A run is owned by one process at a time. Each opening is an attempt with a number of its own, and
writes into `lease.json` the commit that it resumes from. So the lease names a chain of attempts,
and only commits on that chain count: one that a process wrote after it had lost the run is never
picked. A commit is a folder whose `COMMIT.json` was put last. Whatever else a run stores goes
through `Run.store`, which refuses every change once the run is lost.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Any, Literal, Protocol, TypeVar

from pydantic import ValidationError

from flexunet.errors import ContentError, LockedError, StorageError, UsageError
from flexunet.json_files import read_json
from flexunet.settings import Settings, flag_of, option
from flexunet.storage import (
    NotFound,
    PreconditionFailed,
    Stat,
    Store,
    Unavailable,
    crc32c_of_file,
    open_store,
    probe_preconditions,
    refuse_file_above,
)
from job.config import RUN_NAME, RUN_NAME_RULE

logger = logging.getLogger(__name__)

LEASE_NAME = "lease.json"
LOCK_NAME = ".lock"
IDENTITY_NAME = "identity.json"
OUTCOME_NAME = "outcome.json"
COMMIT_NAME = "COMMIT.json"
ORIGIN_NAME = "origin.json"
CROSS_VALIDATION_NAME = "cross_validation.json"  # of all folds, in the folder of their common name
ENDS_FOLDER = "attempts"  # how an attempt ended that did not end the run
RESTORE = "restore the file, or train a run of another name"  # where one of these is damaged
MAX_RECORD_BYTES = 1 << 20
_MAX_LEASE_BYTES = 64 << 20  # version 0.1.0 added 40 bytes at every attempt
MAX_MEMBERS = 64
_NUM_SHOWN = 100  # attempts of which the lease says what they rested on
_KEEP = "keep"  # in the state of a COMMIT.json: folders of other commits that this one needs
_MEMBER_NAME = re.compile(r"[A-Za-z0-9][-A-Za-z0-9._]{0,127}")
_FOLDER = re.compile(r"(checkpoints/step-(\d{8,18})/a(\d{1,9}))/([^/]+)")

R = TypeVar("R", bound=Settings)

End = Literal["stopped", "looked"]  # a stop that saved; a launcher that saw what there is to do
Standing = Literal["finished", "diverged", "stopped", "open"]


@dataclass(frozen=True)
class LeaseTiming:
    """Seconds between two renewals, and without one until a newcomer takes over."""

    renew_s: float = 2.0
    expire_s: float = 15.0


@dataclass(frozen=True, order=True)
class Place:
    """Where a commit lies; ordered by attempt, then step."""

    attempt: int
    step: int
    prefix: str = field(compare=False)


@dataclass(frozen=True)
class Commit:
    """A commit as its COMMIT.json tells it.

    Attributes:
        state: what the caller gave, through JSON.
        sha256: of the COMMIT.json, hex.
        keep: folders of other commits that it needs; None where version 0.1.0 did not write it.
    """

    step: int
    attempt: int
    epoch: int
    prefix: str
    state: dict[str, Any]
    sha256: str
    keep: tuple[str, ...] | None


class Member(Settings):
    """One file of a commit."""

    name: str = option(..., "File name inside the commit's folder.", pattern=r"^[A-Za-z0-9]")
    size: int = option(..., "Size, bytes.", ge=0)
    crc32c: int = option(..., "CRC-32C of the bytes.", ge=0)
    sha256: str = option(..., "SHA-256 of the bytes, hex.", pattern="^[0-9a-f]{64}$")


class CommitRecord(Settings):
    """The content of COMMIT.json."""

    version: Literal[1] = option(1, "Version of this format.")
    step: int = option(..., "Training steps done.", ge=0)
    attempt: int = option(..., "The attempt that wrote it.", ge=1)
    epoch: int = option(..., "Epochs done.", ge=0)
    members: tuple[Member, ...] = option(..., "Every file of the commit.", max_length=MAX_MEMBERS)
    dataset_digest: str = option(..., "SHA-256 of the dataset's manifest, hex.")
    config_digest: str = option(..., "SHA-256 of the run's identity, hex.")
    state: dict[str, Any] = option(..., "What the caller wants back.")


class Lease(Settings):
    """The content of lease.json."""

    version: Literal[1] = option(1, "Version of this format.")
    attempt: int = option(..., "The attempt that owns the run.", ge=1)
    owner: str = option(..., "Host, process id and a random part of the owner.")
    beat: int = option(0, "Renewals so far.")
    released: bool = option(False, "The owner has closed the run.")
    launch: str | None = option(None, "The launcher that started the owner, if one did.")
    bases: dict[int, str | None] = option(
        ..., "Of every attempt, the folder of the commit it resumes from."
    )


class _Ownership(Protocol):
    """Proof that this process owns a run."""

    lease: Lease

    @property
    def base(self) -> str | None: ...

    @property
    def is_lost(self) -> bool: ...

    def confirm(self) -> None:
        """Raises LockedError when the run is no longer ours; asks storage."""
        ...

    def check(self) -> None:
        """Raises LockedError when the run is no longer ours; asks storage where that can be."""
        ...

    def rebase(self, base: str | None) -> None:
        """Writes into the lease that this attempt resumes from another commit."""
        ...

    def release(self) -> None: ...


class Run:
    """A run that this process owns until `close`; a context manager.

    Methods may be called from several threads.

    Attributes:
        store: the run's folder. A change by a process that has lost the run is a LockedError.
    """

    def __init__(self, store: Store, ownership: _Ownership, candidates: list[Place]) -> None:
        self.store = store.guarded(ownership.check)
        self.attempt = ownership.lease.attempt
        self._ownership = ownership
        self._candidates = candidates
        self._newest: Commit | None = None
        self._digests: tuple[str, str] | None = None
        self._kept_by: dict[str, tuple[str, ...] | None] = {}  # see `_needed_by`
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
        """Takes ownership of the run `name` below `output_url`, new or not.

        Args:
            launch: names the launcher of this process. The next process of the same launcher does
                not wait for the lease of the one before to expire: its launcher knows that it is
                gone, and if it were not, it could not commit any more.

        Raises:
            UsageError: the name is not allowed.
            LockedError: another process owns the run; nothing was written.
            StorageError: storage fails, or is a server that does not enforce preconditions.
        """
        store = open_store(output_url).below(checked_run_name(name))
        return cls.own(store, timing=timing, launch=launch)

    @classmethod
    def own(
        cls,
        store: Store,
        *,
        timing: LeaseTiming | None = None,
        by_lease: bool | None = None,
        launch: str | None = None,
    ) -> "Run":
        """Takes ownership of the run whose folder is `store`; otherwise as `open`.

        Args:
            by_lease: hold the run by a renewed lease (the default where there is no local folder)
                instead of a lock of the operating system.
        """
        if by_lease is None:
            by_lease = store.local_root is None
        if not by_lease and store.local_root is not None:
            file = _lock_file(store.local_root)
            try:
                lease, generation, candidates = _next_lease(store, _read_lease(store), launch)
                stat = _put_lease(store, lease, generation)
                store.remove_unfinished()
            except BaseException:
                _close_lock(file)
                raise
            return cls(store, _FileLock(store, file, lease, stat.generation), candidates)
        if store.local_root is None:
            probe_preconditions(store)
        timing = timing or LeaseTiming()
        lease, generation, candidates = _take_lease(store, timing, launch)
        return cls(store, _Heartbeat(store, lease, generation, timing), candidates)

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
        """Raises LockedError where the run is known to be lost."""
        if self.lost:
            self._ownership.confirm()

    def close(self) -> None:
        """Gives the run back; a second call does nothing."""
        self._ownership.release()

    def check_identity(self, identity: Mapping[str, Any], dataset_digest: str) -> None:
        """Checks that this is the run that the first attempt began, and remembers it at first.

        Args:
            identity: nested JSON values of the config fields that identify a run.
            dataset_digest: sha256 of the dataset's manifest, hex.

        Raises:
            UsageError: some differ; names each with the stored and the new value.
        """
        given = _through_json({"config": identity, "dataset_digest": dataset_digest})
        stored = self.read_identity()
        if stored is None:
            self.put_text(IDENTITY_NAME, json.dumps(given, indent=1, sort_keys=True) + "\n")
        elif stored != given:
            remedy = "give the old values or another name"
            if not find_commits(self.store):
                remedy += ", or delete the folder: it has no checkpoint yet"
            raise UsageError(
                f"run {self.url} was begun with other settings: "
                f"{'; '.join(differences(stored, given))}; {remedy}"
            )
        digest = hashlib.sha256(json.dumps(given["config"], sort_keys=True).encode()).hexdigest()
        self._digests = dataset_digest, digest

    def read_identity(self) -> dict[str, Any] | None:
        """Returns `config` and `dataset_digest` of the first attempt, None before it."""
        return read_json(self.store, IDENTITY_NAME, RESTORE)

    def commit(
        self,
        step: int,
        epoch: int,
        members: Mapping[str, str],
        state: Mapping[str, Any],
        *,
        keep: Collection[str] = (),
        moved: Callable[[], None] | None = None,
    ) -> Commit:
        """Stores the local files `members` (name: path) and `state`, all of it or nothing.

        A step that this attempt has committed already is not stored again: the earlier commit is
        returned. Call `check_identity` first.

        Args:
            state: JSON values; NaN and infinity are kept.
            keep: folders of other commits that must stay as long as this one.
            moved: called while bytes move, see `Store.watched`.

        Raises:
            LockedError: the run is no longer ours; there is no commit.
            StorageError: storage failed; there is no commit, and a later one may succeed.
        """
        if self._digests is None:
            raise RuntimeError("check_identity comes before commit")
        for name in members:
            if not _MEMBER_NAME.fullmatch(name) or name == COMMIT_NAME:
                raise ValueError(f"{name!r} is not a member name")
        with self._mutex:
            newest = self._newest
            if newest and (newest.attempt, newest.step) == (self.attempt, step):
                return newest
            state = {**state, _KEEP: list(keep)}
            record = self._record(step, epoch, members, state)
            prefix = commit_prefix(step, self.attempt)
            # Not pydantic's own JSON: it turns NaN and infinity into null.
            data = json.dumps(record.model_dump()).encode()
            if len(data) > MAX_RECORD_BYTES:
                raise ValueError(f"{COMMIT_NAME} would have {len(data)} bytes: state is too large")
            # Before anything is touched: a commit of ours may be what the next owner rests on.
            self._ownership.confirm()
            if not self._is_stored(f"{prefix}/{COMMIT_NAME}", data):
                self._put_members(step, members, moved)
                self._ownership.confirm()
                self.store.put(f"{prefix}/{COMMIT_NAME}", data, if_generation=0)
            self._ownership.check()  # the process may have been paused since `confirm`
            self._newest = _commit_of(record, prefix, data)
            return self._newest

    def restore(
        self, staging_dir: str, *, moved: Callable[[], None] | None = None
    ) -> tuple[Commit, dict[str, str]] | None:
        """Returns the newest commit and its members' local paths by name; None for a new run.

        Every member is checked in size, crc32c and sha256 while it is copied to `staging_dir`. A
        damaged commit is passed over with a warning, for the next older one.

        Args:
            moved: called while bytes move, see `Store.watched`.

        Raises:
            ContentError: there are commits, but all of them are damaged.
        """
        with self._mutex:
            places = list(self._candidates)
            if self._newest and self._newest.attempt == self.attempt:
                places.append(Place(self.attempt, self._newest.step, self._newest.prefix))
            store = _watched(self.store, moved)
            restored = fetch_newest(store, places, staging_dir, self._digests)
            if restored is None:
                return None
            commit = restored[0]
            if commit.attempt != self.attempt and commit.prefix != self._ownership.base:
                self._ownership.rebase(commit.prefix)
            self._newest = commit
            return restored

    def collect_garbage(self, keep_last: int, keep: Collection[str] = ()) -> None:
        """Deletes commits, except the newest, the newest `keep_last`, and what these need.

        A commit needs the folders that it was committed with as `keep`. What older attempts left
        unfinished goes too. A commit's COMMIT.json is deleted first, so a kill in between leaves an
        unfinished one.

        Args:
            keep: more folders that the newest commit needs.
        """
        with self._mutex:
            if self._newest is None:
                return
            self._ownership.confirm()
            newest = Place(self._newest.attempt, self._newest.step, self._newest.prefix)
            folders = _list_folders(self.store)
            committed = [place for place in folders if _is_committed(folders[place])]
            valid = sorted(p for p in committed if _is_on_chain(self._ownership.lease, p))
            kept = {newest.prefix, *(p.prefix for p in valid[-max(keep_last, 1) :])}
            needed = {prefix: self._needed_by(prefix) for prefix in kept}
            own = needed[newest.prefix]
            if own is not None:
                needed[newest.prefix] = (*own, *keep)
            self._kept_by = needed
            if None in needed.values():
                kept |= {place.prefix for place in committed}
            kept |= {*keep, *(prefix for each in needed.values() for prefix in each or ())}
            for place, stats in folders.items():
                if place.prefix not in kept and place < newest:
                    self._delete_folder(stats)

    def _needed_by(self, prefix: str) -> tuple[str, ...] | None:
        """Returns the folders that the commit in `prefix` needs; None where it does not say.

        A commit that is damaged needs nothing any more.
        """
        if prefix not in self._kept_by:
            try:
                self._kept_by[prefix] = read_commit(self.store, prefix).keep
            except (ContentError, NotFound):
                self._kept_by[prefix] = ()
        return self._kept_by[prefix]

    def put_text(self, name: str, text: str) -> None:
        """Writes a whole text file of the run (a table, the config), replacing the one before."""
        self.put_bytes(name, text.encode())

    def put_bytes(self, name: str, data: bytes) -> None:
        """Writes a whole file of the run, replacing the one before.

        Raises:
            LockedError: the run is lost.
        """
        self.store.put(name, data)

    def read_outcome(self) -> dict[str, Any] | None:
        """Returns how the run ended (`status`, `exit_code` and more), None while it has not."""
        return read_json(self.store, OUTCOME_NAME, RESTORE)

    def write_outcome(self, status: str, exit_code: int, **details: Any) -> None:
        """Ends the run: a later attempt finds this and does not start.

        Args:
            status: "finished" or "diverged".
        """
        self._ownership.confirm()
        outcome = {"status": status, "exit_code": exit_code, "attempt": self.attempt, **details}
        self.put_text(OUTCOME_NAME, json.dumps(outcome, indent=1) + "\n")

    def clear_outcome(self) -> None:
        """Opens an ended run again, for example because it may now train longer."""
        self._ownership.confirm()
        self.store.delete(OUTCOME_NAME)

    def note_end(self, how: End, **details: Any) -> None:
        """Writes down how this attempt ends where the run does not; a killed one leaves nothing."""
        text = json.dumps({"end": how, **details}) + "\n"
        self.put_text(f"{ENDS_FOLDER}/{self.attempt}.json", text)

    def _record(
        self, step: int, epoch: int, members: Mapping[str, str], state: Mapping[str, Any]
    ) -> CommitRecord:
        dataset_digest, config_digest = self._digests or ("", "")
        return CommitRecord(
            step=step,
            attempt=self.attempt,
            epoch=epoch,
            members=tuple(_describe_member(name, path) for name, path in members.items()),
            dataset_digest=dataset_digest,
            config_digest=config_digest,
            state=_through_json(state),
        )

    def _put_members(
        self, step: int, members: Mapping[str, str], moved: Callable[[], None] | None
    ) -> None:
        prefix, store = commit_prefix(step, self.attempt), _watched(self.store, moved)
        self._delete_folder(store.list(f"{prefix}/"))  # of an earlier try that was cut short
        for name, path in members.items():
            store.put_file(f"{prefix}/{name}", path, if_generation=0)

    def _is_stored(self, name: str, data: bytes) -> bool:
        """Returns whether an earlier try, whose answer was lost, has stored `data` already."""
        try:
            return self.store.get(name) == data
        except NotFound:
            return False

    def _delete_folder(self, stats: list[Stat]) -> None:
        for stat in sorted(stats, key=lambda stat: not stat.name.endswith(f"/{COMMIT_NAME}")):
            self.store.delete(stat.name)


def _watched(store: Store, moved: Callable[[], None] | None) -> Store:
    return store if moved is None else store.watched(moved)


def checked_run_name(name: str) -> str:
    """Returns `name` when a run may have it.

    Raises:
        UsageError: it is not of the form that every storage and cluster takes.
    """
    if not RUN_NAME.fullmatch(name):
        raise UsageError(f"run name {name!r} is not allowed; use {RUN_NAME_RULE}")
    return name


def read_ends(store: Store) -> dict[int, dict[str, Any]]:
    """Returns what `Run.note_end` wrote, by attempt."""
    ends = {}
    for stat in store.list(f"{ENDS_FOLDER}/"):
        stem = stat.name.removeprefix(f"{ENDS_FOLDER}/").removesuffix(".json")
        if stem.isdecimal():
            ends[int(stem)] = read_json(store, stat.name, RESTORE) or {}
    return ends


def standing(store: Store) -> Standing:
    """Returns where the run in `store` stands, without owning it.

    "open" is one that is being trained, or whose process was killed: from outside they look alike.
    """
    outcome = read_json(store, OUTCOME_NAME, RESTORE)
    if outcome is not None:
        status: Standing = outcome["status"]
        return status
    found = _read_lease(store)
    attempt = found[0].attempt if found else 0
    ends = {n: each.get("end") for n, each in read_ends(store).items()}
    while ends.get(attempt) == "looked":
        attempt -= 1
    return "stopped" if ends.get(attempt) == "stopped" else "open"


def read_commit(store: Store, prefix: str) -> Commit:
    """Returns the commit in the folder `prefix`.

    Raises:
        ContentError, NotFound: its record is damaged or missing.
    """
    return _read_commit(store, prefix)[1]


def commit_prefix(step: int, attempt: int) -> str:
    """Returns the folder of a commit."""
    return f"checkpoints/step-{step:08d}/a{attempt}"


def find_commits(store: Store) -> list[Place]:
    """Returns the commits of a run that count, oldest first; needs no ownership."""
    found = _read_lease(store)
    return _commits_on_chain(store, found[0]) if found else []


def fetch_newest(
    store: Store,
    places: Collection[Place],
    staging_dir: str,
    digests: tuple[str, str] | None = None,
    names: Collection[str] | None = None,
) -> tuple[Commit, dict[str, str]] | None:
    """Returns the newest undamaged commit of `places` and its members' local paths by name.

    Args:
        staging_dir: local folder for the members, in a folder of its own per commit.
        digests: of dataset and config that the commit must have been made with.
        names: members to fetch; None: all.

    Raises:
        ContentError: all of them are damaged.
    """
    problems: list[str] = []
    for place in sorted(places, reverse=True):
        try:
            restored = fetch_commit(store, place, staging_dir, digests, names)
        except (ContentError, NotFound) as error:
            problems.append(str(error))
            continue
        if problems:
            logger.warning("%s; resuming from %s instead", "; ".join(problems), place.prefix)
        return restored
    if problems:
        raise ContentError(
            f"run {store.url} has no undamaged commit: {'; '.join(problems)}; restore the objects "
            "or choose another run name"
        )
    return None


def fetch_commit(
    store: Store,
    place: Place,
    staging_dir: str,
    digests: tuple[str, str] | None = None,
    names: Collection[str] | None = None,
) -> tuple[Commit, dict[str, str]]:
    """Returns one commit and its members' local paths by name; of `names` only, where given.

    Raises:
        ContentError, NotFound: an object is damaged or missing; the message names it.
    """
    record, commit = _read_commit(store, place.prefix)
    where = f"{store.url}/{place.prefix}/{COMMIT_NAME}"
    if (record.attempt, record.step) != (place.attempt, place.step):
        raise ContentError(f"{where}: it is of attempt {record.attempt}, step {record.step}")
    if digests and (record.dataset_digest, record.config_digest) != digests:
        raise ContentError(f"{where}: it was made with another dataset or config")
    paths: dict[str, str] = {}
    for member in record.members:
        if not _MEMBER_NAME.fullmatch(member.name):
            raise ContentError(f"{where}: member name {member.name!a} is not allowed")
        if names is not None and member.name not in names:
            continue
        path = os.path.join(staging_dir, place.prefix.replace("/", "-"), member.name)
        _fetch_member(store, f"{place.prefix}/{member.name}", member, path)
        paths[member.name] = path
    return commit, paths


def _read_commit(store: Store, prefix: str) -> tuple[CommitRecord, Commit]:
    name = f"{prefix}/{COMMIT_NAME}"
    data = _read_small(store, name)
    record = _parsed(data, CommitRecord, f"{store.url}/{name}")
    return record, _commit_of(record, prefix, data)


class _FileLock:
    """Ownership by `flock`, which the kernel ends with the process."""

    def __init__(self, store: Store, file: int, lease: Lease, generation: int) -> None:
        self.lease = lease
        self._store = store
        self._file = file
        self._generation = generation
        self._is_released = False

    @property
    def base(self) -> str | None:
        return self.lease.bases[self.lease.attempt]

    @property
    def is_lost(self) -> bool:
        return False

    def confirm(self) -> None:
        """Also notices that the lock file, and with it the run, was removed by hand."""
        if self._is_released:
            raise _given_back(self._store)
        path = os.path.join(self._store.local_root or "", LOCK_NAME)
        try:
            is_same = os.path.samestat(os.stat(path), os.fstat(self._file))
        except OSError:
            is_same = False
        if not is_same:
            raise LockedError(
                f"{path}, or the whole folder, was removed while the run was going on; this "
                "process stops, and the same command begins anew"
            )

    def check(self) -> None:
        """The same: it asks no other machine."""
        self.confirm()

    def rebase(self, base: str | None) -> None:
        bases = {**self.lease.bases, self.lease.attempt: base}
        lease = self.lease.model_copy(update={"bases": bases})
        self._generation = _put_lease(self._store, lease, self._generation).generation
        self.lease = lease

    def release(self) -> None:
        self._is_released = True
        _close_lock(self._file)


class _Heartbeat:
    """Ownership by a lease that a thread renews.

    Only a lease of another owner tells that the run is lost, never the time or an outage: nobody
    can take the run over without storage either. A lease that something else has damaged is written
    again as long as it cannot have expired; later, nobody knows whose it was, and the run is lost.
    """

    def __init__(self, store: Store, lease: Lease, generation: int, timing: LeaseTiming) -> None:
        self.lease = lease
        # A request that hangs must not let the lease expire.
        self._store = store.with_limits(
            retry_s=min(store.retry_s, max(timing.expire_s / 3, 1.0)),
            timeout_s=max(timing.expire_s / 5, 1.0),
        )
        self._patience_s = store.retry_s
        self._generation = generation
        self._timing = timing
        self._renewed_at = _now()
        self._mutex = threading.Lock()
        self._is_lost = False
        self._why_lost: str | None = None
        self._is_released = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    @property
    def base(self) -> str | None:
        return self.lease.bases[self.lease.attempt]

    @property
    def is_lost(self) -> bool:
        return self._is_lost

    def confirm(self) -> None:
        if self._is_released:
            raise _given_back(self._store)
        self._write_patiently({})

    def check(self) -> None:
        if self._is_lost or self._is_released or self._may_have_expired:
            self.confirm()

    @property
    def _may_have_expired(self) -> bool:
        return _now() - self._renewed_at > self._timing.expire_s

    def rebase(self, base: str | None) -> None:
        self._write_patiently({"bases": {**self.lease.bases, self.lease.attempt: base}})

    def release(self) -> None:
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()
        self._is_released = True
        try:
            self._write({"released": True})
        except LockedError:
            pass
        except StorageError as error:
            logger.warning("%s is not given back, so that the next start has to wait: %s",
                           self._store.url, error)  # fmt: skip

    def _renew(self) -> None:
        is_failing = False
        while not self._stop.wait(self._timing.renew_s):
            try:
                self._write({})
                is_failing = False
            except LockedError:
                return
            except StorageError as error:
                if not is_failing:
                    logger.warning("the lease of %s is not renewed: %s", self._store.url, error)
                is_failing = True
            except Exception as error:
                # Nobody renews the lease any more, and the owner must hear of it.
                self._lose(f"the lease is not renewed any more, because of a bug ({error!r})")
                raise

    def _write_patiently(self, update: dict[str, Any]) -> None:
        """Writes the lease as `_write`, as long as the run's other requests are repeated."""
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                return self._write(update)
            except Unavailable:
                if self._stop.is_set() or time.monotonic() >= deadline:
                    raise

    def _write(self, update: dict[str, Any]) -> None:
        with self._mutex:
            if self._is_lost:
                raise _lost(self._store, self._why_lost)
            lease = self.lease.model_copy(update={"beat": self.lease.beat + 1, **update})
            start = _now()
            generation = self._generation
            while True:
                try:
                    stat = _put_lease(self._store, lease, generation)
                    break
                except PreconditionFailed as error:
                    # It may be our own: a renewal that timed out can have reached the server.
                    found = self._generation_of(lease.owner)
                    if found is None:
                        raise _lost(self._store, self._why_lost) from error
                    generation = found
            self.lease, self._generation, self._renewed_at = lease, stat.generation, start

    def _generation_of(self, owner: str) -> int | None:
        """Returns the generation of the stored lease where `owner` may replace it.

        None: the run is lost, which this process knows from now on.
        """
        before = self._store.stat(LEASE_NAME)
        try:
            found = _read_lease(self._store)
        except ContentError as error:
            if before is not None and not self._may_have_expired:
                logger.warning("%s; this process owns the run and writes it again", error)
                return before.generation
            self._lose(f"the lease may have expired, and is damaged ({error})")
            return None
        if found is None:
            self._lose(f"{LEASE_NAME} was deleted, so nobody knows who owns the run")
            return None
        if found[0].owner != owner:
            self._lose(None)
            return None
        return found[1]

    def _lose(self, why: str | None) -> None:
        """Remembers that the run is lost; None: to another process."""
        self._is_lost, self._why_lost = True, why


def _now() -> float:
    """Returns seconds by a clock that goes on while a machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _lost(store: Store, why: str | None = None) -> LockedError:
    why = why or "another process has taken the run over"
    return LockedError(f"{store.url}: {why}; this process stops")


def _given_back(store: Store) -> LockedError:
    return LockedError(f"{store.url}: this process has given the run back and writes nothing more")


def _put_lease(store: Store, lease: Lease, generation: int) -> Stat:
    return store.put(LEASE_NAME, lease.model_dump_json().encode(), if_generation=generation)


def _read_lease(store: Store) -> tuple[Lease, int] | None:
    """Returns the lease and its generation, None for a new run."""
    while True:
        before = store.stat(LEASE_NAME)
        if before is None:
            return None
        data = _read_small(store, LEASE_NAME, _MAX_LEASE_BYTES)
        lease = _parsed(data, Lease, f"{store.url}/{LEASE_NAME}")
        if store.stat(LEASE_NAME) == before:
            return lease, before.generation


def _take_lease(
    store: Store, timing: LeaseTiming, launch: str | None
) -> tuple[Lease, int, list[Place]]:
    """Returns the lease of a new attempt, which is stored, its generation, what it may restore.

    Raises:
        LockedError: another process has the run, or was quicker.
    """
    found = _wait_for_lease(store, timing, launch)
    while True:
        lease, generation, candidates = _next_lease(store, found, launch)
        try:
            return lease, _put_lease(store, lease, generation).generation, candidates
        except PreconditionFailed as error:
            before, found = found, _read_lease(store)
            is_renewed = before and found and before[0].owner == found[0].owner
            if launch is None or not is_renewed or found is None or found[0].launch != launch:
                raise LockedError(f"{store.url}: another process took the run just now") from error


def _wait_for_lease(
    store: Store, timing: LeaseTiming, launch: str | None
) -> tuple[Lease, int] | None:
    """Returns the lease as soon as it may be taken: released, or unchanged for long enough.

    The time is this process's own; the clocks of two machines are never compared.

    Raises:
        LockedError: the owner renewed it meanwhile.
    """
    first = _read_lease(store)
    if first is None or first[0].released or (launch is not None and first[0].launch == launch):
        return first
    start = time.monotonic()
    while time.monotonic() - start < timing.expire_s:
        time.sleep(timing.renew_s / 4)
        asked_at = time.monotonic()
        stat = store.stat(LEASE_NAME)
        if stat is None or stat.generation != first[1]:
            found = _read_lease(store)
            if found is None or found[0].released:
                return found
            raise LockedError(
                f"{store.url}: the run is owned by {found[0].owner}; wait for it, stop it or "
                "choose another name"
            )
        if time.monotonic() - asked_at > timing.expire_s / 3:
            start = time.monotonic()  # storage was out of reach, so for the owner too
    return first


def _next_lease(
    store: Store, found: tuple[Lease, int] | None, launch: str | None
) -> tuple[Lease, int, list[Place]]:
    """Returns the lease of a new attempt, the generation it replaces, and what it may restore."""
    owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
    if found is None:
        return Lease(attempt=1, owner=owner, launch=launch, bases={1: None}), 0, []
    previous, generation = found
    candidates = _commits_on_chain(store, previous)
    attempt = previous.attempt + 1
    bases = _bases_of(attempt, previous, candidates)
    lease = Lease(attempt=attempt, owner=owner, launch=launch, bases=bases)
    return lease, generation, candidates


def _bases_of(attempt: int, previous: Lease, candidates: Sequence[Place]) -> dict[int, str | None]:
    """Returns what each attempt rested on: of the newest ones, which people are shown, as it was.

    Of older ones only those whose commits are still there are named, each with the newest candidate
    before it, so that the lease does not grow with every attempt.

    Args:
        candidates: the commits on the chain of the attempt before, oldest first.
    """
    newest = {place.attempt: place.prefix for place in candidates}
    bases = {n: base for n, base in previous.bases.items() if n > attempt - _NUM_SHOWN}
    bases[attempt] = candidates[-1].prefix if candidates else None
    older = [n for n in newest if n not in bases]
    bases |= {n: newest.get(before) for before, n in pairwise((0, *older))}
    # Where the chain leaves the newest ones, it goes on with those.
    at = attempt
    while (base := _FOLDER.fullmatch(f"{bases[at]}/{COMMIT_NAME}")) and int(base[3]) in bases:
        if int(base[3]) >= at:
            break  # damaged: `_is_on_chain` ends there too
        at = int(base[3])
    if base is not None and int(base[3]) < at:
        bases[at] = newest[older[-1]] if older else None
    return dict(sorted(bases.items()))


def _commits_on_chain(store: Store, lease: Lease) -> list[Place]:
    folders = _list_folders(store)
    return sorted(p for p in folders if _is_committed(folders[p]) and _is_on_chain(lease, p))


def _is_on_chain(lease: Lease, place: Place) -> bool:
    """Returns whether a commit lies on the way that led to the current attempt.

    An attempt's commits up to the one that the next attempt resumed from do. Later ones do not: the
    attempt had lost the run when it wrote them.
    """
    attempt, last_step = lease.attempt, None
    while place.attempt < attempt:
        base = _FOLDER.fullmatch(f"{lease.bases.get(attempt)}/{COMMIT_NAME}")
        if base is None or int(base[3]) >= attempt:
            return False
        attempt, last_step = int(base[3]), int(base[2])
    return place.attempt == attempt and (last_step is None or place.step <= last_step)


def _list_folders(store: Store) -> dict[Place, list[Stat]]:
    """Returns the objects of every commit folder, finished or not."""
    folders: dict[Place, list[Stat]] = {}
    for stat in store.list("checkpoints/"):
        match = _FOLDER.fullmatch(stat.name)
        if match:
            place = Place(int(match[3]), int(match[2]), match[1])
            folders.setdefault(place, []).append(stat)
    return folders


def _is_committed(stats: list[Stat]) -> bool:
    return any(stat.name.endswith(f"/{COMMIT_NAME}") for stat in stats)


def _read_small(store: Store, name: str, max_bytes: int = MAX_RECORD_BYTES) -> bytes:
    """Returns an object that holds a record.

    Raises:
        ContentError: it has more than `max_bytes`.
    """
    stat = store.stat(name)
    if stat is None:
        raise NotFound(f"{store.url}/{name} does not exist")
    if stat.size > max_bytes:
        raise ContentError(f"{store.url}/{name} has {stat.size} bytes, over {max_bytes}; {RESTORE}")
    return store.get(name)


def _parsed(data: bytes, kind: type[R], where: str) -> R:
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        detail = error.errors()[0]
        field_name = ".".join(str(part) for part in detail["loc"]) or "content"
        raise ContentError(f"{where}: {field_name}: {detail['msg']}; {RESTORE}") from error


def _fetch_member(store: Store, name: str, member: Member, path: str) -> None:
    where = f"{store.url}/{name}"
    stat = store.stat(name)
    if stat is None:
        raise NotFound(f"{where} does not exist")
    if stat.size != member.size:  # before it fills the disk
        raise ContentError(f"{where} has {stat.size} bytes instead of {member.size}")
    if store.get_file(name, path) != member.crc32c:
        raise ContentError(f"{where} is damaged: its crc32c is not the one committed")
    if _sha256_of_file(path) != member.sha256:
        raise ContentError(f"{where} is damaged: its sha256 is not the one committed")


def _describe_member(name: str, path: str) -> Member:
    return Member(
        name=name,
        size=os.path.getsize(path),
        crc32c=crc32c_of_file(path),
        sha256=_sha256_of_file(path),
    )


def _commit_of(record: CommitRecord, prefix: str, data: bytes) -> Commit:
    state = dict(record.state)
    keep = state.pop(_KEEP, None)
    return Commit(
        step=record.step,
        attempt=record.attempt,
        epoch=record.epoch,
        prefix=prefix,
        state=state,
        sha256=hashlib.sha256(data).hexdigest(),
        keep=None if keep is None else tuple(keep),
    )


def _sha256_of_file(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _through_json(value: Any) -> Any:
    """Returns `value` as a later attempt will read it (tuples become lists)."""
    return json.loads(json.dumps(value))


def differences(stored: Any, given: Any) -> list[str]:
    """Returns a sentence for each leaf of two nested JSON values that differs.

    What is below `config` is named as the option that sets it.
    """
    before, now = dict(_leaves(stored)), dict(_leaves(given))
    return [
        f"{_as_option(name)} was {_value(before, name)}, now {_value(now, name)}"
        for name in sorted(before.keys() | now.keys())
        if _value(before, name) != _value(now, name)
    ]


def _as_option(name: str) -> str:
    group, *path = name.split(".")
    return flag_of(path) if group == "config" and path else name


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _value(leaves: dict[str, Any], name: str) -> str:
    return json.dumps(leaves[name]) if name in leaves else "not set"


_open_locks: set[int] = set()


def _forget_locks() -> None:
    # A forked worker that outlives its parent would otherwise keep the parent's lock.
    for file in _open_locks:
        os.close(file)
    _open_locks.clear()


os.register_at_fork(after_in_child=_forget_locks)


def _lock_file(root: str) -> int:
    """Returns the descriptor of the run's lock file, locked.

    Raises:
        LockedError: another process holds it; nothing was written.
    """
    path = os.path.join(root, LOCK_NAME)
    try:
        os.makedirs(root, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        refuse_file_above(path, error)
        raise StorageError(f"cannot write {path}: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(file, 0)
        os.pwrite(file, f"{socket.gethostname()}:{os.getpid()}".encode(), 0)
    except OSError as error:
        holder = os.pread(file, 200, 0).decode(errors="replace")
        os.close(file)
        if isinstance(error, BlockingIOError):
            raise LockedError(
                f"{root}: the run is owned by process {holder or 'unknown'}; wait for it, stop it "
                "or choose another name"
            ) from error
        raise StorageError(f"cannot lock {path}: {error.strerror}") from error
    _open_locks.add(file)
    return file


def _close_lock(file: int) -> None:
    if file in _open_locks:
        _open_locks.remove(file)
        os.close(file)
