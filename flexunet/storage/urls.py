"""Opens the store at a URL, and compares where stores are."""

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
        retry_s: seconds for which a transient failure is repeated; folders have none.

    Raises:
        UsageError: the URL is of another kind or not well formed.
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
    """Returns the store at `url` to read what a user names: in a folder, all links are followed.

    So pictures may be links to another folder or disk. What is written, and what programs wrote
    into a dataset or a run, is for `open_store`, which follows no link that leads out of it.

    Raises:
        UsageError: as `open_store`.
    """
    store = open_store(url)
    return store.following_links() if isinstance(store, LocalStore) else store


def is_file(store: ObjectStore) -> bool:
    """Returns whether a file lies where the store's local folder should be."""
    return store.local_root is not None and os.path.isfile(store.local_root)


def folder_problem(store: ObjectStore) -> str | None:
    """Returns why a store has no local folder to read; None where it has, and of a bucket."""
    if store.local_root is None or os.path.isdir(store.local_root):
        return None
    return "is a file, not a folder" if is_file(store) else "does not exist"


def is_subpath(inner: ObjectStore, outer: ObjectStore) -> bool:
    """Returns whether `inner` is `outer` or a folder in it, also by way of symbolic links."""
    return is_inside(_real_url(inner), _real_url(outer))


def _real_url(store: ObjectStore) -> str:
    return os.path.realpath(store.local_root) if store.local_root else store.url
