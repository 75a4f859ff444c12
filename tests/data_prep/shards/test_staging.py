"""Staged objects: the index comes last, and few of them are in memory."""

import threading
from typing import cast

import pytest

from data_prep.shards import staging
from data_prep.shards.source_pairs import RejectedPair
from data_prep.shards.staging import BackgroundPuts, Parts
from flexunet.errors import StorageError
from flexunet.storage import ObjectStore, open_store
from tests.conftest import FaultyBucket
from tests.faults.proxy import Fault


def test_an_index_is_stored_only_after_all_of_its_parts(
    faulty_bucket: FaultyBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "_PART_BYTES", 100)
    store = open_store(faulty_bucket.url)
    # The second part is refused late; an index that does not wait would be stored by then.
    faulty_bucket.proxy.add(Fault("status", status=403, delay_s=0.3, name="-00001.bin"))
    puts = BackgroundPuts(store, 4)
    parts = Parts(puts, "scan-a.bin")
    for i in range(3):
        parts.add(RejectedPair(str(i), "file", "reason", (0, 0)), b"r" * 80)
    with pytest.raises(StorageError, match="permission denied"):
        parts.finish()
    puts.close()
    assert [stat.name for stat in store.list()] == ["scan-a-00000.bin"]


class _SlowStore:
    """A store that records the bytes that are being stored at once."""

    def __init__(self) -> None:
        self.bytes_at_once: list[int] = []
        self._running: list[int] = []
        self._lock = threading.Lock()

    def put(self, name: str, data: bytes, *, if_generation: int | None = None) -> None:
        with self._lock:
            self._running.append(len(data))
            self.bytes_at_once.append(sum(self._running))
        threading.Event().wait(0.02)
        with self._lock:
            self._running.remove(len(data))


@pytest.mark.parametrize(
    ("sizes", "limit"),
    [
        ([10] * 8, 40),  # four threads
        ([60] * 4, 60),  # two of them are more than the limit
        ([30, 250, 30], 250),  # one that is larger than the limit is alone
    ],
)
def test_objects_in_memory_are_bounded(
    sizes: list[int], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "_MAX_STAGING_BYTES", 100)
    store = _SlowStore()
    puts = BackgroundPuts(cast(ObjectStore, store), 4)
    for i, size in enumerate(sizes):
        puts.put(f"{i}", b"x" * size)
    puts.wait()
    puts.close()
    assert len(store.bytes_at_once) == len(sizes)
    assert max(store.bytes_at_once) == limit
