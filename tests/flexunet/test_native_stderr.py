"""Held back stderr, in a process of its own whose descriptor 2 is a pipe."""

import subprocess
import sys
import textwrap

import pytest

PRELUDE = """
import logging, os, sys
from flexunet.native_stderr import suppress_native_stderr
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
def say(where):
    os.write(2, f"noise {where}\\n".encode())
    print("printed", where, file=sys.stderr)
    logging.info("logged %s", where)
"""


def stderr_of(code: str) -> list[str]:
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True).stderr.splitlines()


def test_only_what_does_not_come_from_python_is_held_back() -> None:
    lines = stderr_of("""
    with suppress_native_stderr(shown_on_error=True):
        say("inside")
    say("after")
    """)
    inside, after = ["printed inside", "logged inside"], ["printed after", "logged after"]
    assert lines == [*inside, "noise after", *after]


def test_a_logger_that_came_inside_still_has_its_stream_after() -> None:
    lines = stderr_of("""
    logger = logging.getLogger("library")
    logger.propagate = False
    with suppress_native_stderr(shown_on_error=True):
        logger.addHandler(logging.StreamHandler(sys.stderr))
        logger.warning("inside")
    logger.warning("after")
    """)
    assert lines == ["inside", "after"]


@pytest.mark.parametrize("shown", [True, False])
def test_a_failure_shows_it_where_that_is_requested(shown: bool) -> None:
    lines = stderr_of(f"""
    try:
        with suppress_native_stderr(shown_on_error={shown}):
            say("inside")
            raise ValueError
    except ValueError:
        say("after")
    """)
    assert ("noise inside" in lines) is shown
    assert lines[-3:] == ["noise after", "printed after", "logged after"]
