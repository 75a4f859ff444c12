"""Reads, describes and deletes the checkpoints of a run.

A checkpoint is a folder whose `COMMIT.json` is written last. The caller defines the content of its
files (members).
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
_KEEP = "keep"  # key in the state of COMMIT.json: folders of other checkpoints that this one needs
_MEMBER_NAME = re.compile(r"[A-Za-z0-9][-A-Za-z0-9._]{0,127}")


@dataclass(frozen=True)
class Checkpoint:
    """Describes a checkpoint by its COMMIT.json.

    Attributes:
        state: values of the caller, after a round trip through JSON.
        sha256: digest of COMMIT.json, hex.
        keep: folders of other checkpoints that it needs; None if unknown (version 0.1.0).
    """

    step: int
    attempt: int
    epoch: int
    prefix: str
    state: dict[str, Any]
    sha256: str
    keep: tuple[str, ...] | None


class CheckpointFile(Settings):
    """Describes one file of a checkpoint."""

    name: str = option(
        ..., "File name inside the folder of the checkpoint.", pattern=r"^[A-Za-z0-9]"
    )
    size: int = option(..., "Size, bytes.", ge=0)
    crc32c: int = option(..., "CRC-32C of the bytes.", ge=0)
    sha256: str = option(..., "SHA-256 of the bytes, hex.", pattern="^[0-9a-f]{64}$")


class CheckpointRecord(Settings):
    """Defines the content of COMMIT.json."""

    version: Literal[1] = option(1, "Version of this format.")
    step: int = option(..., "Training steps done.", ge=0)
    attempt: int = option(..., "The attempt that wrote it.", ge=1)
    epoch: int = option(..., "Epochs done.", ge=0)
    members: tuple[CheckpointFile, ...] = option(
        ..., "Every file of the checkpoint.", max_length=MAX_MEMBERS
    )
    dataset_digest: str = option(..., "SHA-256 of the dataset's manifest, hex.")
    config_digest: str = option(..., "SHA-256 of the run's identity, hex.")
    state: dict[str, Any] = option(..., "Values of the caller.")


def find_checkpoints(store: ObjectStore) -> list[CheckpointRef]:
    """Returns the valid checkpoints of a run, oldest first; needs no ownership."""
    found = read_lease(store)
    return checkpoints_on_chain(store, found[0]) if found else []


def read_checkpoint(store: ObjectStore, prefix: str) -> Checkpoint:
    """Returns the checkpoint in the folder `prefix`.

    Raises:
        ContentError, NotFound: its COMMIT.json is damaged or missing.
    """
    return _read_checkpoint(store, prefix)[1]


def download_newest(
    store: ObjectStore,
    refs: Collection[CheckpointRef],
    staging_dir: str,
    digests: tuple[str, str] | None = None,
    names: Collection[str] | None = None,
) -> tuple[Checkpoint, dict[str, str]] | None:
    """Downloads the newest undamaged checkpoint of `refs`; returns it and local paths by name.

    Args:
        staging_dir: local folder; each checkpoint gets its own subfolder.
        digests: required digests of dataset and config.
        names: files to download; None: all.

    Raises:
        ContentError: all checkpoints are damaged.
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
            f"run {store.url} has no undamaged checkpoint: {'; '.join(problems)}; restore the "
            "objects or choose another --name"
        )
    return None


def download_checkpoint(
    store: ObjectStore,
    ref: CheckpointRef,
    staging_dir: str,
    digests: tuple[str, str] | None = None,
    names: Collection[str] | None = None,
) -> tuple[Checkpoint, dict[str, str]]:
    """Downloads one checkpoint, or only its files `names`; returns it and local paths by name.

    Raises:
        ContentError, NotFound: an object is damaged or missing; names it.
    """
    record, commit = _read_checkpoint(store, ref.prefix)
    where = f"{store.url}/{ref.prefix}/{COMMIT_NAME}"
    if (record.attempt, record.step) != (ref.attempt, ref.step):
        raise ContentError(
            f"{where}: the record belongs to attempt {record.attempt}, step {record.step}"
        )
    if digests and (record.dataset_digest, record.config_digest) != digests:
        raise ContentError(f"{where}: the checkpoint belongs to another dataset or config")
    paths: dict[str, str] = {}
    for member in record.members:
        if not _MEMBER_NAME.fullmatch(member.name):
            raise ContentError(f"{where}: file name {member.name!a} is not allowed")
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
        raise ContentError(f"{where} is damaged: its crc32c differs from COMMIT.json")
    if _sha256_of_file(path) != member.sha256:
        raise ContentError(f"{where} is damaged: its sha256 differs from COMMIT.json")


def checkpoint_of(record: CheckpointRecord, prefix: str, data: bytes) -> Checkpoint:
    """Returns the checkpoint of `record`, stored as `data` in the folder `prefix`."""
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
    """Returns sizes and digests of the local files `members` (name: path)."""
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
    """Raises ValueError if one of `names` is not a valid file name of a checkpoint."""
    for name in names:
        if not _MEMBER_NAME.fullmatch(name) or name == COMMIT_NAME:
            raise ValueError(f"{name!r} is not a valid file name of a checkpoint")


def record_state(state: Mapping[str, Any], keep: Collection[str]) -> dict[str, Any]:
    """Returns the state for COMMIT.json, including `keep` (see `checkpoint_of`)."""
    stored: dict[str, Any] = through_json({**state, _KEEP: list(keep)})
    return stored


def record_bytes(record: CheckpointRecord) -> bytes:
    """Returns the content of COMMIT.json.

    Raises:
        ValueError: the state is too large.
    """
    # The JSON of pydantic would turn NaN and infinity into null.
    data = json.dumps(record.model_dump()).encode()
    if len(data) > MAX_RECORD_BYTES:
        raise ValueError(f"{COMMIT_NAME} would have {len(data)} bytes: state is too large")
    return data


class GarbageCollector:
    """Deletes checkpoints that a run no longer needs; caches what each of them needs."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._kept_by: dict[str, tuple[str, ...] | None] = {}  # see `_needed_by`

    def collect(
        self, lease: Lease, newest: CheckpointRef, keep_last: int, keep: Collection[str]
    ) -> None:
        """Deletes checkpoints older than `newest`; otherwise as `Run.collect_garbage`.

        Args:
            lease: lease of the owner.
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
        """Returns the folders that the checkpoint in `prefix` needs; None if unknown.

        A damaged checkpoint needs none.
        """
        if prefix not in self._kept_by:
            try:
                self._kept_by[prefix] = read_checkpoint(self._store, prefix).keep
            except (ContentError, NotFound):
                self._kept_by[prefix] = ()
        return self._kept_by[prefix]


def delete_folder(store: ObjectStore, stats: list[ObjectMeta]) -> None:
    """Deletes the objects of a checkpoint folder, COMMIT.json first."""
    for stat in sorted(stats, key=lambda stat: not stat.name.endswith(f"/{COMMIT_NAME}")):
        store.delete(stat.name)
