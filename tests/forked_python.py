#!/usr/bin/env python3
"""Stands in for `python`: the suite's fork server starts what this is asked to run.

A script that starts Python with `sys.executable` then imports TensorFlow once for all processes.
Takes FILE, `-c CODE` or `-m MODULE`, each with arguments. CPU times of its end are its own, not
those of the forked process.
"""

import os
import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from tests import commands  # noqa: E402 - from this project


def main() -> int:
    """Runs the command to its end, with the same files, folder and environment."""
    words = sys.argv[2:] if sys.argv[1] == "-m" else ["tests.script", *sys.argv[1:]]
    pid, connection = commands.fork(words, (0, 1, 2), os.getcwd())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(pid, number))
    code = commands.exit_code(connection)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
