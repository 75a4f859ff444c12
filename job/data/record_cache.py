"""Reads the records of a remote dataset, keeps some in a folder of bounded size, reads ahead.

A dataset larger than the disk of a node is read over the network in every epoch, except for the
records that fit into the cache. An epoch reads every sample once, in an order that is known before:
whichever records are kept, the same share of the reads is local. So the first records stay, and
none is replaced. Threads fetch the others before they are needed.
"""

import contextlib
import fcntl
import logging
import os
import queue
import shutil
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from data_prep.shards.records import unframe_record
from flexunet.errors import ContentError, StorageError
from flexunet.storage import LocalStore, ObjectStore, local_path
from flexunet.storage.local_files import local_errors, whole_file

logger = logging.getLogger(__name__)

# A request takes tens of milliseconds until bytes arrive, and only a few to send them.
NUM_AHEAD = 32
_MOST_LOOKED_AT = 256  # samples of the order at once: looking for a file takes about 10 us
_USED = ".used"  # the bytes of all records; its lock is that of the folder


@dataclass(frozen=True)
class RecordKey:
    """The position of a record in the shards of a dataset, in bytes."""

    shard: str
    offset: int
    length: int


class RecordFolder:
    """Keeps records as files SHARD/OFFSET in a folder, up to a number of bytes.

    Threads and processes of a node share it. The lock is held while a record is written, so that
    the bytes on disk are counted exactly.
    """

    def __init__(self, folder: str, max_bytes: int) -> None:
        """Opens the folder: counts its records, and deletes some if they take too much.

        Raises:
            StorageError: the folder cannot be written, or its disk is too small.
        """
        self.path = folder
        self._max_bytes = max_bytes
        self._is_full = False
        with local_errors("write", folder):
            os.makedirs(folder, exist_ok=True)
        with self._locked() as used:
            # A process that was killed while it wrote leaves parts of files.
            LocalStore(folder).remove_unfinished()
            used.write(self._shrunk())
            used_bytes = used.read()
        free = shutil.disk_usage(folder).free
        if max_bytes - used_bytes > free:
            raise StorageError(
                f"{folder}: --cache-size of {max_bytes / 2**30:.1f} GiB needs "
                f"{(max_bytes - used_bytes) / 2**30:.1f} GiB more, but this disk has "
                f"{free / 2**30:.1f} GiB free; give a smaller --cache-size or another --cache-dir"
            )

    def has(self, key: RecordKey) -> bool:
        """Returns whether a record is kept; its content is not yet checked."""
        return os.path.exists(self._file(key))

    def read(self, key: RecordKey) -> bytes | None:
        """Returns a kept record; None if it is not kept. Deletes it if it is damaged."""
        path = self._file(key)
        try:
            with open(path, "rb", buffering=0) as file:
                record = file.readall()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"{path}: cannot be read: {error.strerror}") from error
        if _is_whole(record, key):
            return record
        logger.warning("%s: the cached record is damaged; reading it again", path)
        with self._locked() as used, contextlib.suppress(FileNotFoundError):
            os.unlink(path)
            used.write(used.read() - len(record))
        return None

    def keep(self, key: RecordKey, record: bytes) -> None:
        """Writes a record, unless the folder is full or has it."""
        if self._is_full:
            return
        path = self._file(key)
        try:
            with self._locked() as used:
                num_bytes = used.read() + len(record)
                if num_bytes > self._max_bytes:
                    self._is_full = True
                elif not os.path.exists(path):
                    used.write(num_bytes)
                    with whole_file(path) as file:
                        file.write(record)
        except StorageError as error:
            self._is_full = True
            logger.warning("the cache keeps no more records: %s", error)

    def _file(self, key: RecordKey) -> str:
        return os.path.join(local_path(self.path, key.shard), str(key.offset))

    @contextlib.contextmanager
    def _locked(self) -> Iterator["_Used"]:
        """Holds the lock; the kernel frees it when the process dies."""
        path = os.path.join(self.path, _USED)
        with local_errors("write", path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                yield _Used(descriptor)
            finally:
                os.close(descriptor)

    def _shrunk(self) -> int:
        """Deletes records until the rest fits; returns the bytes of the rest."""
        num_bytes = 0
        for folder, _, names in os.walk(self.path):
            for name in names:
                path = os.path.join(folder, name)
                if path == os.path.join(self.path, _USED):
                    continue
                size = os.path.getsize(path)
                if num_bytes + size > self._max_bytes:
                    os.unlink(path)
                else:
                    num_bytes += size
        return num_bytes


@dataclass(frozen=True)
class _Used:
    """The number in the open file that counts the bytes of a folder."""

    descriptor: int

    def read(self) -> int:
        """Returns the number of bytes."""
        return int(os.pread(self.descriptor, 32, 0) or b"0")

    def write(self, num_bytes: int) -> None:
        """Replaces the number of bytes."""
        os.pwrite(self.descriptor, b"%-32d" % num_bytes, 0)


class RemoteRecords:
    """Reads records from a folder or over the network; its threads end with the process."""

    def __init__(self, store: ObjectStore, folder: RecordFolder | None) -> None:
        """Reads from `store`, and keeps records in `folder`; None: keeps nothing."""
        self._store = store
        self._folder = folder
        self._calls: queue.SimpleQueue[tuple[Future[bytes], RecordKey]] = queue.SimpleQueue()
        self._num_threads = 0

    def is_local(self, key: RecordKey) -> bool:
        """Returns whether a record can be read without the network."""
        return self._folder is not None and self._folder.has(key)

    def read(self, key: RecordKey) -> bytes:
        """Returns a record, and keeps it if it came over the network.

        Raises:
            StorageError: the record cannot be read.
        """
        record = None if self._folder is None else self._folder.read(key)
        if record is None:
            record = self._store.get(key.shard, key.offset, key.length)
            if self._folder is not None and _is_whole(record, key):
                self._folder.keep(key, record)
        return record

    def submit(self, key: RecordKey) -> "Future[bytes]":
        """Returns the future result of `read`, in one of `NUM_AHEAD` threads."""
        future: Future[bytes] = Future()
        self._calls.put((future, key))
        if self._num_threads < NUM_AHEAD:
            self._num_threads += 1
            name = f"read-ahead-{self._num_threads}"
            threading.Thread(target=self._work, name=name, daemon=True).start()
        return future

    def _work(self) -> None:
        while True:
            future, key = self._calls.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self.read(key))
            except BaseException as error:
                future.set_exception(error)


class ReadAhead:
    """Fetches the records of a split before they are read; usable from several threads.

    At most `NUM_AHEAD` records are fetched or wait to be read, which bounds the memory.
    """

    def __init__(self, records: RemoteRecords, key_of: Callable[[int], RecordKey]) -> None:
        """Reads the record of sample `index` at `key_of(index)`."""
        self._records = records
        self._key_of = key_of
        self._mutex = threading.Lock()
        self._order: deque[int] = deque()
        self._num_read: Counter[int] = Counter()  # reads of samples before their request
        self._pending: dict[int, deque[Future[bytes]]] = {}
        self._num_pending = 0

    def expect(self, order: Sequence[int]) -> None:
        """Sets the samples that will be read next, instead of those before."""
        with self._mutex:
            for futures in self._pending.values():
                for future in futures:
                    future.cancel()
            self._pending.clear()
            self._num_pending = 0
            self._order = deque(order)
            self._num_read.clear()
            self._fill()

    def read(self, index: int) -> bytes:
        """Returns the record of sample `index`.

        Raises:
            StorageError: the record cannot be read.
        """
        with self._mutex:
            futures = self._pending.get(index)
            future = futures.popleft() if futures else None
            if future is not None:
                self._num_pending -= 1
                if not futures:
                    del self._pending[index]
            else:
                self._num_read[index] += 1
            self._fill()
        return self._records.read(self._key_of(index)) if future is None else future.result()

    def _fill(self) -> None:
        """Requests the next records that are not local; looks at a bounded number of samples."""
        for _ in range(min(len(self._order), _MOST_LOOKED_AT)):
            if self._num_pending == NUM_AHEAD:
                return
            index = self._order.popleft()
            if self._num_read[index]:
                self._num_read[index] -= 1  # several threads read, and one was faster
                continue
            key = self._key_of(index)
            if not self._records.is_local(key):
                self._pending.setdefault(index, deque()).append(self._records.submit(key))
                self._num_pending += 1


def _is_whole(record: bytes, key: RecordKey) -> bool:
    """Returns whether `record` has the length and the checksums of a complete record."""
    try:
        unframe_record(record, where=key.shard)
    except ContentError:
        return False
    return len(record) == key.length
