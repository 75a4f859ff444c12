"""Accesses local folders and buckets through one interface, `ObjectStore`.

All access to storage goes through this package. Objects have names relative to the store's URL,
separated by `/`. A put is atomic on both: a reader gets the old object, the new one or none, never
a part. Conditional puts compare generations, numbers that change with every write. The package does
not depend on the meaning of the objects.
"""

from flexunet.storage.base import (
    BROKEN_LINK,
    Forbidden,
    NotAFolder,
    NotFound,
    ObjectMeta,
    ObjectStore,
    PreconditionFailed,
    Unavailable,
)
from flexunet.storage.gcs import GcsStore
from flexunet.storage.local import LocalStore
from flexunet.storage.local_files import crc32c_of, crc32c_of_file, refuse_file_above
from flexunet.storage.names import checked_name, join_url, local_path, name_problem
from flexunet.storage.preconditions import (
    content_matches,
    probe_preconditions,
    probe_writable,
    put_if_changed,
    put_probably_new,
)
from flexunet.storage.urls import folder_problem, is_file, is_subpath, open_source, open_store

__all__ = [
    "BROKEN_LINK",
    "Forbidden",
    "GcsStore",
    "LocalStore",
    "NotAFolder",
    "NotFound",
    "ObjectMeta",
    "ObjectStore",
    "PreconditionFailed",
    "Unavailable",
    "checked_name",
    "content_matches",
    "crc32c_of",
    "crc32c_of_file",
    "folder_problem",
    "is_file",
    "is_subpath",
    "join_url",
    "local_path",
    "name_problem",
    "open_source",
    "open_store",
    "probe_preconditions",
    "probe_writable",
    "put_if_changed",
    "put_probably_new",
    "refuse_file_above",
]
