"""Stores in `lease.json` the owner of a run and the checkpoints that its attempts resumed from.

Each opening of a run is an attempt with its own number, and records the checkpoint that it resumes
from. So the lease defines a chain of attempts. Only checkpoints on this chain count: one that a
process wrote after it lost the run is never used.
"""

import os
import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from flexunet.errors import LockedError
from flexunet.settings import Settings, option
from flexunet.storage import ObjectMeta, ObjectStore, PreconditionFailed
from job.runs.layout import (
    LEASE_NAME,
    CheckpointRef,
    is_complete,
    list_folders,
    parse_checkpoint_ref,
    parse_record,
    read_small,
)

_MAX_LEASE_BYTES = 64 << 20  # version 0.1.0 added 40 bytes at every attempt
_NUM_SHOWN = 100  # latest attempts whose base checkpoint the lease keeps


@dataclass(frozen=True)
class LeaseTiming:
    """Sets the seconds between renewals, and until a lease without renewal expires."""

    renew_s: float = 2.0
    expire_s: float = 15.0


class Lease(Settings):
    """Defines the content of lease.json."""

    version: Literal[1] = option(1, "Version of this format.")
    attempt: int = option(..., "The attempt that owns the run.", ge=1)
    owner: str = option(..., "Host, process id and a random part of the owner.")
    beat: int = option(0, "Renewals so far.")
    released: bool = option(False, "The owner has closed the run.")
    launch: str | None = option(None, "The launcher that started the owner, if one did.")
    bases: dict[int, str | None] = option(
        ..., "Folder of the checkpoint that each attempt resumes from."
    )


def put_lease(store: ObjectStore, lease: Lease, generation: int) -> ObjectMeta:
    """Stores the lease if the stored one has this `generation`; 0: if there is none."""
    return store.put(LEASE_NAME, lease.model_dump_json().encode(), if_generation=generation)


def read_lease(store: ObjectStore) -> tuple[Lease, int] | None:
    """Returns the lease and its generation; None for a new run."""
    while True:
        before = store.stat(LEASE_NAME)
        if before is None:
            return None
        data = read_small(store, LEASE_NAME, _MAX_LEASE_BYTES)
        lease = parse_record(data, Lease, f"{store.url}/{LEASE_NAME}")
        if store.stat(LEASE_NAME) == before:
            return lease, before.generation


def take_lease(
    store: ObjectStore, timing: LeaseTiming, launch: str | None
) -> tuple[Lease, int, list[CheckpointRef]]:
    """Stores the lease of a new attempt; returns it, its generation and its valid checkpoints.

    Raises:
        LockedError: another process owns the run, or was faster.
    """
    found = _wait_for_lease(store, timing, launch)
    while True:
        lease, generation, candidates = next_lease(store, found, launch)
        try:
            return lease, put_lease(store, lease, generation).generation, candidates
        except PreconditionFailed as error:
            before, found = found, read_lease(store)
            is_renewed = before and found and before[0].owner == found[0].owner
            if launch is None or not is_renewed or found is None or found[0].launch != launch:
                raise LockedError(
                    f"{store.url}: another process has just taken the run; wait for it, stop it, "
                    "or choose another --name"
                ) from error


def _wait_for_lease(
    store: ObjectStore, timing: LeaseTiming, launch: str | None
) -> tuple[Lease, int] | None:
    """Returns the lease once it may be taken: released, or unchanged for long enough.

    Uses only the clock of this process; clocks of two machines are never compared.

    Raises:
        LockedError: the owner renewed the lease meanwhile.
    """
    first = read_lease(store)
    if first is None or first[0].released or (launch is not None and first[0].launch == launch):
        return first
    start = time.monotonic()
    while time.monotonic() - start < timing.expire_s:
        time.sleep(timing.renew_s / 4)
        asked_at = time.monotonic()
        stat = store.stat(LEASE_NAME)
        if stat is None or stat.generation != first[1]:
            found = read_lease(store)
            if found is None or found[0].released:
                return found
            raise LockedError(
                f"{store.url}: the run is owned by {found[0].owner}; wait for it, stop it, or "
                "choose another --name"
            )
        if time.monotonic() - asked_at > timing.expire_s / 3:
            start = time.monotonic()  # storage was unreachable, so for the owner, too
    return first


def next_lease(
    store: ObjectStore, found: tuple[Lease, int] | None, launch: str | None
) -> tuple[Lease, int, list[CheckpointRef]]:
    """Returns the lease of a new attempt, the generation to replace, and valid checkpoints."""
    owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
    if found is None:
        return Lease(attempt=1, owner=owner, launch=launch, bases={1: None}), 0, []
    previous, generation = found
    candidates = checkpoints_on_chain(store, previous)
    attempt = previous.attempt + 1
    bases = _bases_of(attempt, previous, candidates)
    lease = Lease(attempt=attempt, owner=owner, launch=launch, bases=bases)
    return lease, generation, candidates


def _bases_of(
    attempt: int, previous: Lease, candidates: Sequence[CheckpointRef]
) -> dict[int, str | None]:
    """Returns the base checkpoint of each attempt.

    The newest attempts keep their bases, for people to read. Of older ones, only those whose
    checkpoints still exist are kept, each with the newest candidate before it as base. So the lease
    does not grow with every attempt.

    Args:
        candidates: the checkpoints on the chain of the attempt before, oldest first.
    """
    newest = {ref.attempt: ref.prefix for ref in candidates}
    bases = {n: base for n, base in previous.bases.items() if n > attempt - _NUM_SHOWN}
    bases[attempt] = candidates[-1].prefix if candidates else None
    older = [n for n in newest if n not in bases]
    bases |= {n: newest.get(before) for before, n in pairwise((0, *older))}
    # Where the chain leaves the newest attempts, it continues with the older ones.
    at = attempt
    while (base := parse_checkpoint_ref(bases[at])) and base.attempt in bases:
        if base.attempt >= at:
            break  # damaged: `is_on_chain` ends there too
        at = base.attempt
    if base is not None and base.attempt < at:
        bases[at] = newest[older[-1]] if older else None
    return dict(sorted(bases.items()))


def checkpoints_on_chain(store: ObjectStore, lease: Lease) -> list[CheckpointRef]:
    """Returns the valid checkpoints for the attempt of `lease`, oldest first."""
    folders = list_folders(store)
    return sorted(p for p in folders if is_complete(folders[p]) and is_on_chain(lease, p))


def is_on_chain(lease: Lease, ref: CheckpointRef) -> bool:
    """Returns whether a checkpoint is on the chain that leads to the current attempt.

    The checkpoints of an attempt are on the chain up to the one from which the next attempt
    resumed. It wrote later ones after it had lost the run.
    """
    attempt, last_step = lease.attempt, None
    while ref.attempt < attempt:
        base = parse_checkpoint_ref(lease.bases.get(attempt))
        if base is None or base.attempt >= attempt:
            return False
        attempt, last_step = base.attempt, base.step
    return ref.attempt == attempt and (last_step is None or ref.step <= last_step)
