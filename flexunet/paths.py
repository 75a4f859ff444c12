"""Expands `~` in paths from options and config files; finds secrets in addresses."""

import os
import re

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


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


def scheme_of(address: str) -> str:
    """Returns the scheme of a URL, in small letters; empty for a path."""
    found = _SCHEME.match(address)
    return found[1].lower() if found else ""


def has_secret(address: str) -> bool:
    """Returns whether a URL has a user, a password, or a query, which may be a token.

    A password may have any character. So an `@` after the host counts as well.
    """
    found = _SCHEME.match(address)
    if found is None:
        return False
    rest = address[found.end() :]
    has_host = rest.startswith("//") and not rest.startswith("///")
    return bool(rest.partition("?")[2]) or (has_host and "@" in rest)
