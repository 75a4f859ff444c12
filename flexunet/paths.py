"""Expands the home folder in paths that users write."""

import os


def expanded(path: str) -> str:
    """Returns `path` with a home folder in place of a `~` at its start; other text as it is.

    A shell does so only at the start of a word, and nobody does so in a file.

    Raises:
        ValueError: there is no such user.
    """
    found = os.path.expanduser(path)
    if found.startswith("~"):
        user = path.partition("/")[0]
        raise ValueError(f"{user} is the home folder of nobody; for a file of that name: ./{user}")
    return found
