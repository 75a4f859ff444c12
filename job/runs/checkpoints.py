"""Reads, describes and deletes the commits of a run.

A commit is a folder whose `COMMIT.json` was put last. What its members hold is the caller's.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flexunet.errors import ContentError
from flexunet.settings import Settings, option
from flexunet.storage import NotFound, ObjectMeta, ObjectStore, crc32c_of_file
from job.runs.layout import (
    COMMIT_NAME,
    MAX_RECORD_BYTES,
    CheckpointRef,
    is_complete,
    list_folders,
    parse_record,
    read_small,
    through_json,
)
from job.runs.lease import Lease, checkpoints_on_chain, is_on_chain, read_lease

logger = logging.getLogger(__name__)

MAX_MEMBERS = 64
_KEEP = "keep"  # in the state of a COMMIT.json: folders of other commits that this one needs
_MEMBER_NAME = re.compile(r"[A-Za-z0-9][-A-Za-z0-9._]{0,127}")


@dataclass(frozen=True)
class Checkpoint:
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


class CheckpointFile(Settings):
    """One file of a commit."""

    name: str = option(..., "File name inside the commit's folder.", pattern=r"^[A-Za-z0-9]")
    size: int = option(..., "Size, bytes.", ge=0)
    crc32c: int = option(..., "CRC-32C of the bytes.", ge=0)
    sha256: str = option(..., "SHA-256 of the bytes, hex.", pattern="^[0-9a-f]{64}$")


class CheckpointRecord(Settings):
    """The content of COMMIT.json."""

    version: Literal[1] = option(1, "Version of this format.")
    step: int = option(..., "Training steps done.", ge=0)
    attempt: int = option(..., "The attempt that wrote it.", ge=1)
    epoch: int = option(..., "Epochs done.", ge=0)
    members: tuple[CheckpointFile, ...] = option(
        ..., "Every file of the commit.", max_length=MAX_MEMBERS
    )
    dataset_digest: str = option(..., "SHA-256 of the dataset's manifest, hex.")
    config_digest: str = option(..., "SHA-256 of the run's identity, hex.")
    state: dict[str, Any] = option(..., "What the caller wants back.")


def find_checkpoints(store: ObjectStore) -> list[CheckpointRef]:
    """Returns the commits of a run that count, oldest first; needs no ownership."""
    found = read_lease(store)
    return checkpoints_on_chain(store, found[0]) if found else []


def read_checkpoint(store: ObjectStore, prefix: str) -> Checkpoint:
    """Returns the commit in the folder `prefix`.

    Raises:
        ContentError, NotFound: its record is damaged or missing.
    """
    return _read_checkpoint(store, prefix)[1]


def download_newest(
    store: ObjectStore,
    refs: Collection[CheckpointRef],
    staging_dir: str,
    digests: tuple[str, str] | None = None,
    names: Collection[str] | None = None,
) -> tuple[Checkpoint, dict[str, str]] | None:
    """Returns the newest undamaged commit of `refs` and its members' local paths by name.

    Args:
        staging_dir: local folder for the members, in a folder of its own per commit.
        digests: of dataset and config that the commit must have been made with.
        names: members to fetch; None: all.

    Raises:
        ContentError: all of them are damaged.
    """
    problems: list[str] = []
    for ref in sorted(refs, reverse=True):
        try:
            restored = download_checkpoint(store, ref, staging_dir, digests, names)
        except (ContentError, NotFound) as error:
            problems.append(str(error))
            continue
        if problems:
            logger.warning("%s; resuming from %s instead", "; ".join(problems), ref.prefix)
        return restored
    if problems:
        raise ContentError(
            f"run {store.url} has no undamaged commit: {'; '.join(problems)}; restore the objects "
            "or choose another run name"
        )
    return None


def download_checkpoint(
    store: ObjectStore,
    ref: CheckpointRef,
    staging_dir: str,
    digests: tuple[str, str] | None = None,
    names: Collection[str] | None = None,
) -> tuple[Checkpoint, dict[str, str]]:
    """Returns one commit and its members' local paths by name; of `names` only, where given.

    Raises:
        ContentError, NotFound: an object is damaged or missing; the message names it.
    """
    record, commit = _read_checkpoint(store, ref.prefix)
    where = f"{store.url}/{ref.prefix}/{COMMIT_NAME}"
    if (record.attempt, record.step) != (ref.attempt, ref.step):
        raise ContentError(f"{where}: it is of attempt {record.attempt}, step {record.step}")
    if digests and (record.dataset_digest, record.config_digest) != digests:
        raise ContentError(f"{where}: it was made with another dataset or config")
    paths: dict[str, str] = {}
    for member in record.members:
        if not _MEMBER_NAME.fullmatch(member.name):
            raise ContentError(f"{where}: member name {member.name!a} is not allowed")
        if names is not None and member.name not in names:
            continue
        path = os.path.join(staging_dir, ref.prefix.replace("/", "-"), member.name)
        _fetch_member(store, f"{ref.prefix}/{member.name}", member, path)
        paths[member.name] = path
    return commit, paths


def _read_checkpoint(store: ObjectStore, prefix: str) -> tuple[CheckpointRecord, Checkpoint]:
    name = f"{prefix}/{COMMIT_NAME}"
    data = read_small(store, name)
    record = parse_record(data, CheckpointRecord, f"{store.url}/{name}")
    return record, checkpoint_of(record, prefix, data)


def _fetch_member(store: ObjectStore, name: str, member: CheckpointFile, path: str) -> None:
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


def checkpoint_of(record: CheckpointRecord, prefix: str, data: bytes) -> Checkpoint:
    """Returns what `record`, stored as `data` in the folder `prefix`, tells of a commit."""
    state = dict(record.state)
    keep = state.pop(_KEEP, None)
    return Checkpoint(
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


def describe_members(members: Mapping[str, str]) -> tuple[CheckpointFile, ...]:
    """Returns the size and digests of the local files `members`, path by name."""
    return tuple(
        CheckpointFile(
            name=name,
            size=os.path.getsize(path),
            crc32c=crc32c_of_file(path),
            sha256=_sha256_of_file(path),
        )
        for name, path in members.items()
    )


def check_member_names(names: Iterable[str]) -> None:
    """Raises ValueError where one of `names` cannot be that of a member."""
    for name in names:
        if not _MEMBER_NAME.fullmatch(name) or name == COMMIT_NAME:
            raise ValueError(f"{name!r} is not a member name")


def record_state(state: Mapping[str, Any], keep: Collection[str]) -> dict[str, Any]:
    """Returns the state of a commit record, with what `checkpoint_of` gives as `keep`."""
    stored: dict[str, Any] = through_json({**state, _KEEP: list(keep)})
    return stored


def record_bytes(record: CheckpointRecord) -> bytes:
    """Returns the content of COMMIT.json.

    Raises:
        ValueError: it would be too large.
    """
    # Not pydantic's own JSON: it turns NaN and infinity into null.
    data = json.dumps(record.model_dump()).encode()
    if len(data) > MAX_RECORD_BYTES:
        raise ValueError(f"{COMMIT_NAME} would have {len(data)} bytes: state is too large")
    return data


class GarbageCollector:
    """Deletes what a run no longer needs of its commits; remembers what each of them needs."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._kept_by: dict[str, tuple[str, ...] | None] = {}  # see `_needed_by`

    def collect(
        self, lease: Lease, newest: CheckpointRef, keep_last: int, keep: Collection[str]
    ) -> None:
        """Deletes commits older than `newest`; otherwise as `Run.collect_garbage`.

        Args:
            lease: of the owner.
        """
        folders = list_folders(self._store)
        committed = [ref for ref in folders if is_complete(folders[ref])]
        valid = sorted(p for p in committed if is_on_chain(lease, p))
        kept = {newest.prefix, *(p.prefix for p in valid[-max(keep_last, 1) :])}
        needed = {prefix: self._needed_by(prefix) for prefix in kept}
        own = needed[newest.prefix]
        if own is not None:
            needed[newest.prefix] = (*own, *keep)
        self._kept_by = needed
        if None in needed.values():
            kept |= {ref.prefix for ref in committed}
        kept |= {*keep, *(prefix for each in needed.values() for prefix in each or ())}
        for ref, stats in folders.items():
            if ref.prefix not in kept and ref < newest:
                delete_folder(self._store, stats)

    def _needed_by(self, prefix: str) -> tuple[str, ...] | None:
        """Returns the folders that the commit in `prefix` needs; None where it does not say.

        A commit that is damaged needs nothing any more.
        """
        if prefix not in self._kept_by:
            try:
                self._kept_by[prefix] = read_checkpoint(self._store, prefix).keep
            except (ContentError, NotFound):
                self._kept_by[prefix] = ()
        return self._kept_by[prefix]


def delete_folder(store: ObjectStore, stats: list[ObjectMeta]) -> None:
    """Deletes the objects of a commit folder, its COMMIT.json first."""
    for stat in sorted(stats, key=lambda stat: not stat.name.endswith(f"/{COMMIT_NAME}")):
        store.delete(stat.name)
