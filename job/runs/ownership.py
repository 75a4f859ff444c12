"""Holds a run for one process: by a file lock on local disks, by a renewed lease elsewhere."""

import fcntl
import logging
import os
import socket
import threading
import time
from typing import Any, Protocol

from flexunet.errors import ContentError, LockedError, StorageError
from flexunet.storage import (
    ObjectStore,
    PreconditionFailed,
    Unavailable,
    probe_preconditions,
    refuse_file_above,
)
from job.runs.layout import LEASE_NAME, LOCK_NAME, CheckpointRef
from job.runs.lease import Lease, LeaseTiming, next_lease, put_lease, read_lease, take_lease

logger = logging.getLogger(__name__)


class Ownership(Protocol):
    """Proves that this process owns a run."""

    lease: Lease

    @property
    def base(self) -> str | None:
        """The folder of the checkpoint that this attempt resumes from."""
        ...

    @property
    def is_lost(self) -> bool:
        """Whether this process knows that it has lost the run."""
        ...

    def confirm(self) -> None:
        """Raises LockedError if this process has lost the run; asks storage."""
        ...

    def check(self) -> None:
        """Raises LockedError if this process has lost the run; asks storage only if in doubt."""
        ...

    def rebase(self, base: str | None) -> None:
        """Records in the lease that this attempt resumes from another checkpoint."""
        ...

    def release(self) -> None:
        """Releases the run; a second call does nothing."""
        ...


def acquire(
    store: ObjectStore,
    *,
    timing: LeaseTiming | None,
    by_lease: bool | None,
    launch: str | None,
) -> tuple[Ownership, list[CheckpointRef]]:
    """Acquires the run in `store`; returns its ownership and the checkpoints to resume from.

    See `Run.acquire`.
    """
    if by_lease is None:
        by_lease = store.local_root is None
    if not by_lease and store.local_root is not None:
        file = _lock_file(store.local_root)
        try:
            lease, generation, candidates = next_lease(store, read_lease(store), launch)
            stat = put_lease(store, lease, generation)
            store.remove_unfinished()
        except BaseException:
            _close_lock(file)
            raise
        return _FileLock(store, file, lease, stat.generation), candidates
    if store.local_root is None:
        probe_preconditions(store)
    timing = timing or LeaseTiming()
    lease, generation, candidates = take_lease(store, timing, launch)
    return _RenewedLease(store, lease, generation, timing), candidates


class _FileLock:
    """Owns a run by `flock`, which the kernel releases with the process."""

    def __init__(self, store: ObjectStore, file: int, lease: Lease, generation: int) -> None:
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
        """Also detects that someone deleted the lock file or the whole run."""
        if self._is_released:
            raise _given_back(self._store)
        path = os.path.join(self._store.local_root or "", LOCK_NAME)
        try:
            is_same = os.path.samestat(os.stat(path), os.fstat(self._file))
        except OSError:
            is_same = False
        if not is_same:
            raise LockedError(
                f"{path} or its whole folder was deleted during the run; this process stops, and "
                "the same command starts again"
            )

    def check(self) -> None:
        """Same as `confirm`, which asks no other machine."""
        self.confirm()

    def rebase(self, base: str | None) -> None:
        bases = {**self.lease.bases, self.lease.attempt: base}
        lease = self.lease.model_copy(update={"bases": bases})
        self._generation = put_lease(self._store, lease, self._generation).generation
        self.lease = lease

    def release(self) -> None:
        self._is_released = True
        _close_lock(self._file)


class _RenewedLease:
    """Owns a run by a lease that a thread renews.

    Only the lease of another owner means that the run is lost. Elapsed time or an outage does not:
    without storage, no other process can take the run over either. A damaged lease is written again
    as long as it cannot have expired. After that its owner is unknown, and the run is lost.
    """

    def __init__(
        self, store: ObjectStore, lease: Lease, generation: int, timing: LeaseTiming
    ) -> None:
        self.lease = lease
        # The lease must not expire during a request that hangs.
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
            logger.warning(
                "%s could not be released: the next start waits until its lease expires (%g s): %s",
                self._store.url,
                self._timing.expire_s,
                error,
            )

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
                    logger.warning(
                        "the lease of %s could not be renewed: %s", self._store.url, error
                    )
                is_failing = True
            except Exception as error:
                # Without this thread no one renews the lease; the owner must get the error.
                self._lose(f"the lease is no longer renewed because of a bug ({error!r})")
                raise

    def _write_patiently(self, update: dict[str, Any]) -> None:
        """Writes the lease like `_write`; repeats that as long as other requests of the run."""
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
                    stat = put_lease(self._store, lease, generation)
                    break
                except PreconditionFailed as error:
                    # It may be a renewal of this process that timed out but reached the server.
                    found = self._generation_of(lease.owner)
                    if found is None:
                        raise _lost(self._store, self._why_lost) from error
                    generation = found
            self.lease, self._generation, self._renewed_at = lease, stat.generation, start

    def _generation_of(self, owner: str) -> int | None:
        """Returns the generation of the stored lease if `owner` may replace it.

        None: the run is lost; this process records that.
        """
        before = self._store.stat(LEASE_NAME)
        try:
            found = read_lease(self._store)
        except ContentError as error:
            if before is not None and not self._may_have_expired:
                logger.warning("%s; this process owns the run and writes the lease again", error)
                return before.generation
            self._lose(f"the lease is damaged and may have expired ({error})")
            return None
        if found is None:
            self._lose(f"{LEASE_NAME} was deleted, so the owner of the run is unknown")
            return None
        if found[0].owner != owner:
            self._lose(None)
            return None
        return found[1]

    def _lose(self, why: str | None) -> None:
        """Records that the run is lost; `why` None: to another process."""
        self._is_lost, self._why_lost = True, why


def _now() -> float:
    """Returns seconds of a clock that continues while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _lost(store: ObjectStore, why: str | None = None) -> LockedError:
    if why is None:
        return LockedError(
            f"{store.url}: another process has taken the run over; this process stops"
        )
    return LockedError(
        f"{store.url}: {why}; this process stops; run the same command again to resume"
    )


def _given_back(store: ObjectStore) -> LockedError:
    return LockedError(f"{store.url}: this process has released the run and can no longer write")


_open_locks: set[int] = set()


def _forget_locks() -> None:
    # Otherwise a forked worker that outlives its parent would keep the lock of the parent.
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
                f"{root}: the run is owned by process {holder or 'unknown'}; wait for it, stop it, "
                "or choose another --name"
            ) from error
        raise StorageError(f"cannot lock {path}: {error.strerror}") from error
    _open_locks.add(file)
    return file


def _close_lock(file: int) -> None:
    if file in _open_locks:
        _open_locks.remove(file)
        os.close(file)
