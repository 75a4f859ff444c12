import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Literal

import click
import pytest

from flexunet.cli.options import SettingsCommand, explicit_options, settings_options
from flexunet.cli.runner import run_command
from flexunet.errors import ContentError, LockedError, StoppedError
from flexunet.settings import Settings, option, parse_settings


class Inner(Settings):
    """What is inside."""

    num_layers: int = option(3, "Layers.", ge=1)
    kernels: tuple[int, int] = option((9, 9), "Kernel, pixels.")
    is_deep: bool = option(False, "Deep.")


class Outer(Settings):
    """Two levels."""

    rate: float = option(0.0001, "Rate.")
    name: str | None = option(None, "Name.")
    weights: tuple[float, ...] | None = option(None, "Weights.")
    limit: float | None = option(0.4, "Limit; 0: no limit.")
    mode: Literal["a", "b"] = option("a", "Mode.")
    long: Literal["categorical", "structural", "topological"] = option("structural", "Long.")
    data: str = option(..., "Data.")
    inner: Inner = Inner()


def run(*argv: str) -> tuple[int, dict[str, Any]]:
    """Returns the exit code and the nested values that the command was given."""
    seen: dict[str, Any] = {}

    @click.command(cls=SettingsCommand)
    @settings_options(Outer)
    def command(**options: Any) -> None:
        seen.update(explicit_options(options))

    return run_command(command, argv, "tool"), seen


def run_body(body: Callable[[], Any]) -> int:
    @click.command()
    def command() -> Any:
        return body()

    return run_command(command, [], "tool")


@pytest.mark.parametrize(
    ("argv", "values"),
    [
        ((), {}),
        (("--rate", "0.5"), {"rate": 0.5}),
        (("--name", "x"), {"name": "x"}),
        (("--mode", "b"), {"mode": "b"}),
        (("--inner.num-layers", "4"), {"inner": {"num_layers": 4}}),
        (("--inner.kernels", "3,5"), {"inner": {"kernels": ["3", "5"]}}),
        (("--inner.kernels", " 3 , 5,"), {"inner": {"kernels": ["3", "5"]}}),
        (("--inner.is-deep",), {"inner": {"is_deep": True}}),
        (("--inner.no-is-deep",), {"inner": {"is_deep": False}}),
        (("--name", "none", "--weights", "none"), {"name": None, "weights": None}),
        (("--limit", "none"), {"limit": None}),
        (("--limit", "0"), {"limit": 0.0}),
    ],
)
def test_options_become_nested_values(argv: tuple[str, ...], values: dict[str, Any]) -> None:
    assert run(*argv) == (0, values)


def test_what_was_given_is_valid_for_the_settings() -> None:
    _, values = run("--data", "d", "--inner.kernels", "3,5", "--weights", "1,2.5", "--rate", "1e-4")
    config = parse_settings(Outer, values, "options")
    assert config.inner.kernels == (3, 5)
    assert config.weights == (1.0, 2.5)
    assert config.rate == 0.0001


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--ratee", "1"), "tool: no option '--ratee'; did you mean '--rate'?"),
        (("--num-layers", "1"), "did you mean '--inner.num-layers'?"),
        (("--inner.num-layer", "1"), "did you mean '--inner.num-layers'?"),
        (("--inner.num_layers", "1"), "did you mean '--inner.num-layers'?"),
        (("--xyzzy",), "tool: no option '--xyzzy' (see tool --help)"),
        (("--rate", "x"), "tool: Invalid value for '--rate': 'x' is not a valid float."),
        (("--limit", "x"), "tool: Invalid value for '--limit': 'x' is not a valid float."),
        (("--mode", "c"), "tool: Invalid value for '--mode': 'c' is not one of 'a', 'b'."),
        (("--rate",), "tool: Option '--rate' requires an argument."),
        (("extra",), "tool: Got unexpected extra argument (extra)"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], message: str
) -> None:
    assert run(*argv)[0] == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert "--help" in line


# Written out by hand: the whole of a help, so that a change of its form is seen.
HELP = """\
Usage: tool [OPTIONS]

Options:
  --rate NUMBER   Rate. [default: 0.0001]
  --name TEXT     Name. [default: none]
  --weights LIST  Weights. [default: none]
  --limit NUMBER  Limit; 0: no limit. [default: 0.4]
  --mode a|b      Mode. [default: a]
  --long NAME     Long. One of: categorical, structural, topological.
                  [default: structural]
  --data TEXT     Data. [required]
  --help          Show this message and exit.

Inner options:
  What is inside.

  --inner.num-layers INT  Layers. [default: 3]
  --inner.kernels LIST    Kernel, pixels. [default: 9,9]
  --inner.[no-]is-deep    Deep. [default: off]

Values:
  LIST  values separated by commas, such as 9,9
  none  unsets the option, also if the config file sets it (in YAML: null)
"""


def test_help_has_sections_defaults_and_the_order_of_the_class(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run("--help")[0] == 0
    assert capsys.readouterr().out == HELP


@pytest.mark.parametrize(("columns", "widest"), [("80", 80), ("100", 100), ("300", 100)])
def test_help_fits_the_terminal_and_stays_readable_on_a_wide_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str, widest: int
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    run("--help")
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines) <= widest


def test_an_empty_default_is_shown_as_none(capsys: pytest.CaptureFixture[str]) -> None:
    class Others(Settings):
        runs: tuple[str, ...] = option((), "More runs.")

    @click.command(cls=SettingsCommand)
    @settings_options(Others)
    def command(**options: Any) -> None:
        """Does nothing."""

    assert run_command(command, ["--help"], "tool") == 0
    assert "  --runs LIST  More runs. [default: none]\n" in capsys.readouterr().out


@pytest.mark.parametrize("columns", range(40, 81))
def test_help_breaks_no_line_inside_an_option_name(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Long(Settings):
        """A long name in a text."""

        size: int = option(1, "Without --image-size-of-all, or else with --num-workers.")

    @click.command(cls=SettingsCommand)
    @settings_options(Long)
    def command(**options: Any) -> None:
        """Read --image-size-of-all first, then --num-workers."""

    monkeypatch.setenv("COLUMNS", str(columns))
    assert run_command(command, ["--help"], "tool") == 0
    shown = capsys.readouterr().out
    assert shown.count("--image-size-of-all") == shown.count("--num-workers") == 2
    assert shown.isascii()


def test_skipped_fields_are_no_options(capsys: pytest.CaptureFixture[str]) -> None:
    @click.command(cls=SettingsCommand)
    @settings_options(Outer, skip=("data", "inner"))
    def command(**options: Any) -> None:
        """Does nothing."""

    assert run_command(command, ["--help"], "tool") == 0
    text = capsys.readouterr().out
    assert "--rate" in text
    assert "--data" not in text
    assert "--inner" not in text


def test_a_field_without_a_command_line_form_is_refused() -> None:
    class Odd(Settings):
        table: dict[str, int] = option({}, "Table.")

    with pytest.raises(TypeError, match=r"table: no command-line form for dict\[str, int\]"):
        settings_options(Odd)(lambda: None)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ContentError("a.png: broken\nin two lines"), 3),
        (LockedError("runs/a: owned"), 4),
        (StoppedError("stopped"), 6),
        (KeyboardInterrupt(), 6),
    ],
)
def test_errors_for_the_user_are_one_line_and_their_exit_code(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    def body() -> None:
        raise error

    assert run_body(body) == code
    # click ends the line of an echoed ^C first.
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("tool: ")
    assert " ".join(str(error).split()) in line


# As TensorFlow's: tf.errors.ResourceExhaustedError is known by its name alone.
class ResourceExhaustedError(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (MemoryError(), "no memory left"),
        (MemoryError("Unable to allocate 8 TiB"), "Unable to allocate 8 TiB"),
        (ResourceExhaustedError("OOM with shape[8,9]\n" + "node\n" * 99), "OOM with shape[8,9]"),
    ],
)
def test_want_of_memory_is_one_line_and_says_what_to_do(
    capsys: pytest.CaptureFixture[str], error: Exception, shown: str
) -> None:
    def body() -> None:
        raise error

    assert run_body(body) == 1
    expected = f"tool: out of memory: {shown}; lower the batch or image size\n"
    assert capsys.readouterr().err == expected


def test_errors_of_ours_keep_their_traceback() -> None:
    def body() -> None:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        run_body(body)


def test_a_command_returns_its_own_exit_code() -> None:
    assert run_body(lambda: 5) == 5
    assert run_body(lambda: None) == 0
    assert run_body(lambda: "text") == 0


def test_an_interrupt_after_an_error_loses_no_output() -> None:
    script = (
        "import click, os, signal\n"
        "from flexunet.cli.runner import run_command\n"
        "from flexunet.errors import StorageError\n"
        "@click.command()\n"
        "def command():\n"
        "    print('half a result')\n"
        "    raise StorageError('disk full')\n"
        "run_command(command, None, 'tool')\n"
        "os.kill(os.getpid(), signal.SIGINT)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONUNBUFFERED": ""},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (5, b"half a result\n")


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    script = (
        "import click; from flexunet.cli.runner import run_command\n"
        "@click.command()\n"
        "def command(): [click.echo('x' * 1000) for _ in range(1000)]\n"
        "raise SystemExit(run_command(command, [], 'tool'))"
    )
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=write_end, stderr=subprocess.PIPE, check=False
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (1, b"")


_LAST_WORK = """
import atexit, sys, threading, time, weakref
from concurrent.futures import ThreadPoolExecutor
from flexunet.cli.interrupts import end_process

class Slow:
    def __del__(self):
        print("modules removed")

slow = Slow()
atexit.register(print, "function of atexit")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
ThreadPoolExecutor(1).submit(lambda: (time.sleep(0.1), print("pool")))
end_process(7)
"""


def test_a_process_ends_with_all_its_work_but_removes_no_modules() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _LAST_WORK], capture_output=True, text=True, check=False
    )
    assert done.returncode == 7, done.stderr
    assert done.stdout.split("\n") == ["pool", "thread", "function of atexit", ""]
