"""Keeps the working folder off the module path of Python processes.

Otherwise Python would run a file `numpy.py` or `job.py` in that folder instead of the module.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_SAFE = "PYTHONSAFEPATH"  # keeps the working folder off the path, like `python -P`


@contextlib.contextmanager
def safe_path() -> Iterator[None]:
    """Keeps the working folder off the module path of processes started inside the block."""
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
    """Returns the environment for a Python process that imports the same modules as this one."""
    folders = [*unsafe_folders(), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {_SAFE: "1"}
    return environment | ({"PYTHONPATH": os.pathsep.join(folders)} if folders else {})


def unsafe_folders() -> list[str]:
    """Returns the folder of these packages if `python -m` put it on the path, else nothing.

    Other processes need it: these packages may come from a checkout that is not installed.
    """
    own = str(Path(__file__).resolve().parents[1])
    return [own] if sys.path and os.path.realpath(sys.path[0] or os.curdir) == own else []
