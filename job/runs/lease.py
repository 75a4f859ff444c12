"""Writes into `lease.json` who owns a run, and which commits its attempts resumed from.

Each opening of a run is an attempt with a number of its own, and writes the commit that it resumes
from. So the lease names a chain of attempts, and only commits on that chain count: one that a
process wrote after it had lost the run is never picked.
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
_NUM_SHOWN = 100  # attempts of which the lease says what they rested on


@dataclass(frozen=True)
class LeaseTiming:
    """Seconds between two renewals, and without one until a newcomer takes over."""

    renew_s: float = 2.0
    expire_s: float = 15.0


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


def put_lease(store: ObjectStore, lease: Lease, generation: int) -> ObjectMeta:
    """Stores the lease in the place of that with `generation`; 0: of none."""
    return store.put(LEASE_NAME, lease.model_dump_json().encode(), if_generation=generation)


def read_lease(store: ObjectStore) -> tuple[Lease, int] | None:
    """Returns the lease and its generation, None for a new run."""
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
    """Returns the lease of a new attempt, which is stored, its generation, what it may restore.

    Raises:
        LockedError: another process has the run, or was quicker.
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
                raise LockedError(f"{store.url}: another process took the run just now") from error


def _wait_for_lease(
    store: ObjectStore, timing: LeaseTiming, launch: str | None
) -> tuple[Lease, int] | None:
    """Returns the lease as soon as it may be taken: released, or unchanged for long enough.

    The time is this process's own; the clocks of two machines are never compared.

    Raises:
        LockedError: the owner renewed it meanwhile.
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
                f"{store.url}: the run is owned by {found[0].owner}; wait for it, stop it or "
                "choose another name"
            )
        if time.monotonic() - asked_at > timing.expire_s / 3:
            start = time.monotonic()  # storage was out of reach, so for the owner too
    return first


def next_lease(
    store: ObjectStore, found: tuple[Lease, int] | None, launch: str | None
) -> tuple[Lease, int, list[CheckpointRef]]:
    """Returns the lease of a new attempt, the generation it replaces, and what it may restore."""
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
    """Returns what each attempt rested on: of the newest ones, which people are shown, as it was.

    Of older ones only those whose commits are still there are named, each with the newest candidate
    before it, so that the lease does not grow with every attempt.

    Args:
        candidates: the commits on the chain of the attempt before, oldest first.
    """
    newest = {ref.attempt: ref.prefix for ref in candidates}
    bases = {n: base for n, base in previous.bases.items() if n > attempt - _NUM_SHOWN}
    bases[attempt] = candidates[-1].prefix if candidates else None
    older = [n for n in newest if n not in bases]
    bases |= {n: newest.get(before) for before, n in pairwise((0, *older))}
    # Where the chain leaves the newest ones, it goes on with those.
    at = attempt
    while (base := parse_checkpoint_ref(bases[at])) and base.attempt in bases:
        if base.attempt >= at:
            break  # damaged: `is_on_chain` ends there too
        at = base.attempt
    if base is not None and base.attempt < at:
        bases[at] = newest[older[-1]] if older else None
    return dict(sorted(bases.items()))


def checkpoints_on_chain(store: ObjectStore, lease: Lease) -> list[CheckpointRef]:
    """Returns the commits that count for the attempt of `lease`, oldest first."""
    folders = list_folders(store)
    return sorted(p for p in folders if is_complete(folders[p]) and is_on_chain(lease, p))


def is_on_chain(lease: Lease, ref: CheckpointRef) -> bool:
    """Returns whether a commit lies on the way that led to the current attempt.

    An attempt's commits up to the one that the next attempt resumed from do. Later ones do not: the
    attempt had lost the run when it wrote them.
    """
    attempt, last_step = lease.attempt, None
    while ref.attempt < attempt:
        base = parse_checkpoint_ref(lease.bases.get(attempt))
        if base is None or base.attempt >= attempt:
            return False
        attempt, last_step = base.attempt, base.step
    return ref.attempt == attempt and (last_step is None or ref.step <= last_step)
