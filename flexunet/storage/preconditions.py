"""Puts only what a store lacks, and probes whether a store enforces and allows puts."""

import contextlib
import uuid

from flexunet.errors import StorageError
from flexunet.storage.base import Forbidden, ObjectMeta, ObjectStore, PreconditionFailed
from flexunet.storage.local_files import crc32c_of


def put_if_changed(store: ObjectStore, name: str, data: bytes) -> None:
    """Puts `data` unless the object holds it already: who may create may not always replace."""
    stat = store.stat(name)
    if stat is None or not holds(store, stat, data):
        store.put(name, data)


def holds(store: ObjectStore, stat: ObjectMeta, data: bytes) -> bool:
    """Returns whether the object has the size and the CRC-32C of `data`."""
    if stat.size != len(data):
        return False
    found = crc32c_of(store.get(stat.name)) if stat.crc32c is None else stat.crc32c
    return found == crc32c_of(data)


def probe_writable(store: ObjectStore, *, may_stay: bool = False) -> None:
    """Puts, gets and deletes a small object of a name nobody else has.

    Args:
        may_stay: leave it where the credentials may create and view, but not delete.

    Raises:
        StorageError: one of them fails; the message says what is missing.
    """
    name = f"flexunet-probe-{uuid.uuid4().hex}"
    data = name.encode()
    store.put(name, data, if_generation=0)
    try:
        if store.get(name) != data:
            raise StorageError(f"{store.url}: a probe came back with other bytes; check the server")
    finally:
        try:
            store.delete(name)
        except Forbidden:
            if not may_stay:
                raise


def probe_preconditions(store: ObjectStore) -> None:
    """Checks that conditional puts are conditional, on which locks and commits rest.

    Raises:
        StorageError: the server ignores them (as gcp-storage-emulator 2024.8.3 does), or fails.
    """
    name = f"flexunet-probe-{uuid.uuid4().hex}"
    first = store.put(name, b"first", if_generation=0)
    try:
        for generation in (0, first.generation - 1):
            with contextlib.suppress(PreconditionFailed):
                store.put(name, b"second", if_generation=generation)
                raise StorageError(
                    f"{store.url}: the server does not enforce preconditions, so two processes "
                    "could own one run; use Google Cloud Storage or a folder"
                )
    finally:
        store.delete(name)
