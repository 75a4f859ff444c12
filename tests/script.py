"""Runs Python code as Python itself does, in a process of the fork server.

python -m tests.script FILE ARGUMENTS       as `python FILE ARGUMENTS`
python -m tests.script -c CODE ARGUMENTS    as `python -c CODE ARGUMENTS`
python -m tests.script -m MODULE ARGUMENTS  as `python -m MODULE ARGUMENTS`

With `--forks` as its first argument, the Python processes that the code starts by `sys.executable`
are forked too, by `tests/forked_python.py`.
"""

import multiprocessing
import os
import runpy
import sys
import types
from pathlib import Path

if __name__ == "__main__":
    del sys.argv[0]
    if sys.argv[0] == "--forks":
        multiprocessing.set_executable(sys.executable)  # the real one
        sys.executable = str(Path(__file__).with_name("forked_python.py").resolve())
        del sys.argv[0]
    if sys.argv[0] == "-c":
        code = sys.argv.pop(1)
        sys.path.insert(0, "")
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), vars(sys.modules["__main__"]))  # noqa: S102
    elif sys.argv[0] == "-m":
        del sys.argv[0]
        sys.modules.pop(sys.argv[0], None)  # runs again
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
        runpy.run_path(sys.argv[0], run_name="__main__")
