"""Expands `~` in paths from options and config files; finds secrets in addresses."""

import os
from urllib.parse import urlsplit


def expand_home(path: str) -> str:
    """Returns `path` with a leading `~` or `~user` replaced by the home folder.

    A shell expands it only at the start of a word, and not in a config file.

    Raises:
        ValueError: the user does not exist.
    """
    found = os.path.expanduser(path)
    if found.startswith("~"):
        user = path.partition("/")[0]
        raise ValueError(
            f"{user}: this user has no home folder here; for a file of this name, write ./{user}"
        )
    return found


def has_secret(address: str) -> bool:
    """Returns whether a URL has a user, a password, or a query, which may be a token."""
    parts = urlsplit(address)
    return bool(parts.scheme and ("@" in parts.netloc or parts.query))
