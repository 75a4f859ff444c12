"""Keeps the folder that the user works in off the module path of Python processes.

A file `numpy.py` or `job.py` beside the user's data would be run in place of the module.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_SAFE = "PYTHONSAFEPATH"  # keeps the working folder off the path, as `python -P`


@contextlib.contextmanager
def safe_path() -> Iterator[None]:
    """Keeps the working folder off the path of processes that start inside the block."""
    before = os.environ.get(_SAFE)
    os.environ[_SAFE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SAFE]
        else:
            os.environ[_SAFE] = before


def safe_environment() -> dict[str, str]:
    """Returns the environment of a Python process that imports the modules that this one would."""
    folders = [*unsafe_folders(), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {_SAFE: "1"}
    return environment | ({"PYTHONPATH": os.pathsep.join(folders)} if folders else {})


def unsafe_folders() -> list[str]:
    """Returns the folder of these packages where `python -m` put it on the path, else none.

    Other processes have to be told of it: it may be that of a checkout that is not installed.
    """
    own = str(Path(__file__).resolve().parents[1])
    return [own] if sys.path and os.path.realpath(sys.path[0] or os.curdir) == own else []
