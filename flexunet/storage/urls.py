"""Opens the store at a URL, and compares the locations of stores."""

import os
import re
import urllib.parse

from flexunet.errors import UsageError
from flexunet.storage.base import ObjectStore
from flexunet.storage.gcs import RETRY_S, GcsStore
from flexunet.storage.local import LocalStore
from flexunet.storage.names import is_inside


def open_store(url: str, *, retry_s: float = RETRY_S) -> ObjectStore:
    """Returns the store at `url`: `gs://bucket/prefix`, a folder's path, or `file:///path`.

    Nothing is read or written yet.

    Args:
        retry_s: seconds for which a request is repeated after transient failures; folders have
            none.

    Raises:
        UsageError: the URL has another scheme or is malformed.
    """
    if re.match(r"(gs|file):/?([^/]|$)", url):
        raise UsageError(f"storage URL {url!r} lacks a slash; write gs://bucket or file:///path")
    scheme, found, rest = url.partition("://")
    if not found:
        if not url or "\0" in url:
            raise UsageError(f"{url!r} is not a folder or storage URL; give a path or gs://bucket")
        return LocalStore(url)
    if scheme == "gs":
        return GcsStore(url, retry_s=retry_s)
    if scheme == "file" and rest.startswith("/"):
        return LocalStore(urllib.parse.unquote(rest))
    raise UsageError(
        f"storage URL {url!r} is not supported; use gs://bucket/folder, a folder's path or "
        "file:///path"
    )


def open_source(url: str) -> ObjectStore:
    """Returns the store at `url` for reading a user's source; follows all links in a folder.

    So images may be links to another folder or disk. For output, datasets and runs use
    `open_store`, which follows no link out of the folder.

    Raises:
        UsageError: see `open_store`.
    """
    store = open_store(url)
    return store.following_links() if isinstance(store, LocalStore) else store


def is_file(store: ObjectStore) -> bool:
    """Returns whether the store's local folder is a file."""
    return store.local_root is not None and os.path.isfile(store.local_root)


def folder_problem(store: ObjectStore) -> str | None:
    """Returns why a store's local folder cannot be read; None if it can, and for a bucket."""
    if store.local_root is None or os.path.isdir(store.local_root):
        return None
    return "is a file, not a folder" if is_file(store) else "does not exist"


def is_subpath(inner: ObjectStore, outer: ObjectStore) -> bool:
    """Returns whether `inner` is `outer` or a folder in it, after resolving symbolic links."""
    return is_inside(_real_url(inner), _real_url(outer))


def _real_url(store: ObjectStore) -> str:
    return os.path.realpath(store.local_root) if store.local_root else store.url
