"""Copies the shards of a remote dataset to a folder in several threads, and checks each copy."""

import contextlib
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from data_prep.shards.manifest import ShardInfo
from flexunet.errors import ContentError
from flexunet.progress import Heartbeat, Progress
from flexunet.storage import ObjectStore, local_path
from flexunet.storage.names import TEMPORARY

# One connection rarely uses a whole network: a bucket limits each stream.
_NUM_STREAMS = 8
_TICK_S = 0.25
_END_S = 2.0  # for the threads to end after an error

MIB = 1 << 20


class _Cancelled(Exception):
    """Ends a copy whose result nobody needs."""


class ShardCopies:
    """Copies shards in threads that end with the process, so that none keeps it running."""

    def __init__(self, store: ObjectStore, shards: Sequence[ShardInfo], folder: str) -> None:
        """Prepares to copy `shards` of `store` into `folder`, in their order."""
        self._store = store.watched(self._note)
        self._url = store.url
        self._folder = folder
        self._waiting = deque(shards)
        self._num_left = len(shards)
        self._results: queue.SimpleQueue[ShardInfo | BaseException] = queue.SimpleQueue()
        self._has_moved = threading.Event()
        self._is_cancelled = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, name=f"shard-copy-{number}", daemon=True)
            for number in range(min(_NUM_STREAMS, len(shards)))
        ]

    def run(self, heartbeat: Heartbeat, bar: Progress) -> None:
        """Copies all shards; calls `heartbeat` and updates `bar`, in MiB, in this thread.

        Raises:
            ContentError: a shard differs from the manifest.
            StorageError: a shard cannot be read or written.
        """
        for thread in self._threads:
            thread.start()
        num_bytes, shown = 0, 0
        try:
            while self._num_left:
                num_bytes += self._take_results()
                done = (num_bytes + _unfinished_bytes(self._folder)) // MIB
                if self._has_moved.is_set():
                    self._has_moved.clear()
                    heartbeat()
                # A repeated copy starts again, and the bar waits for it.
                bar.advance(max(done - shown, 0))
                shown = max(done, shown)
        finally:
            self._cancel()
        bar.advance(-(-num_bytes // MIB) - shown)

    def _take_results(self) -> int:
        """Returns the bytes of the shards that were finished since the last call; waits a tick."""
        num_bytes = 0
        timeout = _TICK_S
        with contextlib.suppress(queue.Empty):
            while True:
                result = self._results.get(timeout=timeout)
                if isinstance(result, BaseException):
                    raise result
                num_bytes += result.num_bytes
                self._num_left -= 1
                timeout = 0.0
        return num_bytes

    def _work(self) -> None:
        try:
            while not self._is_cancelled.is_set():
                self._copy(self._waiting.popleft())
        except (IndexError, _Cancelled):
            return
        except BaseException as error:
            self._results.put(error)

    def _copy(self, shard: ShardInfo) -> None:
        path = local_path(self._folder, shard.name)
        if self._store.get_file(shard.name, path) != shard.crc32c:
            Path(path).unlink()
            raise ContentError(
                f"{self._url}/{shard.name}: CRC32C differs from the manifest, the dataset is "
                "damaged; prepare it again"
            )
        self._results.put(shard)

    def _note(self) -> None:
        if self._is_cancelled.is_set():
            raise _Cancelled
        self._has_moved.set()

    def _cancel(self) -> None:
        """Ends the threads at their next bytes; waits only for a short time."""
        self._is_cancelled.set()
        end = time.monotonic() + _END_S
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(end - time.monotonic(), 0.0))


def _unfinished_bytes(folder: str) -> int:
    """Returns the bytes in the files of `folder` that are being written."""
    num_bytes = 0
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(TEMPORARY):
                with contextlib.suppress(FileNotFoundError):
                    num_bytes += entry.stat().st_size
    return num_bytes
