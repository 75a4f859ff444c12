"""Stores only changed objects, and checks that a store is writable and enforces preconditions."""

import contextlib
import uuid

from flexunet.errors import StorageError
from flexunet.storage.base import Forbidden, ObjectMeta, ObjectStore, PreconditionFailed
from flexunet.storage.local_files import crc32c_of


def put_if_changed(store: ObjectStore, name: str, data: bytes) -> None:
    """Stores `data` unless the object has the same content.

    Some credentials may create objects but not replace them.
    """
    stat = store.stat(name)
    if stat is None or not content_matches(store, stat, data):
        store.put(name, data)


def put_probably_new(store: ObjectStore, name: str, data: bytes) -> None:
    """Does the same as `put_if_changed`, with one request if the object is missing."""
    try:
        store.put(name, data, if_generation=0)
    except (PreconditionFailed, Forbidden):  # Forbidden: these credentials may not replace it
        put_if_changed(store, name, data)


def content_matches(store: ObjectStore, stat: ObjectMeta, data: bytes) -> bool:
    """Returns whether the object has the size and the CRC-32C of `data`."""
    if stat.size != len(data):
        return False
    found = crc32c_of(store.get(stat.name)) if stat.crc32c is None else stat.crc32c
    return found == crc32c_of(data)


def probe_writable(store: ObjectStore, *, may_stay: bool = False) -> None:
    """Puts, gets and deletes a small object with a unique name.

    Args:
        may_stay: leave the object if the credentials may create and view, but not delete.

    Raises:
        StorageError: one of the requests fails; the message names the missing permission.
    """
    name = f"flexunet-probe-{uuid.uuid4().hex}"
    data = name.encode()
    store.put(name, data, if_generation=0)
    try:
        if store.get(name) != data:
            raise StorageError(
                f"{store.url}: a test object was read back with other bytes; check the server"
            )
    finally:
        try:
            store.delete(name)
        except Forbidden:
            if not may_stay:
                raise


def probe_preconditions(store: ObjectStore) -> None:
    """Checks that the server enforces conditional puts, which locks and commits need.

    Raises:
        StorageError: the server ignores the conditions (as gcp-storage-emulator 2024.8.3 does), or
            a request fails.
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
