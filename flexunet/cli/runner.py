"""Runs a command; turns errors into one line on stderr and an exit code."""

import contextlib
import difflib
import errno
import logging
import os
import sys
from collections.abc import Sequence

import click

from flexunet.cli.interrupts import (
    end_process,
    exit_on_interrupt,
    ignore_interrupts_at_exit,
    quiet_interrupts,
)
from flexunet.errors import FlexUNetError, StorageError
from flexunet.synonyms import suggest_option

_MAX_DETAIL_WIDTH = 200  # characters of a library's error; TensorFlow's fill pages
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def run_command(command: click.Command, argv: Sequence[str] | None, program: str) -> int:
    """Runs `command` and returns its exit code; reports a user error in one line on stderr.

    Args:
        argv: the arguments; None: those of this process, which ends with the command.
    """
    if argv is not None:
        return _code_of(command, argv, program)
    ignore_interrupts_at_exit()
    code = _code_of(command, sys.argv[1:], program)
    # After an error, stdout may still hold output, which os._exit would drop.
    with contextlib.suppress(OSError, ValueError):
        _flush_stdout()
    exit_on_interrupt(code)
    if "tensorflow" in sys.modules and not _has_peers():
        end_process(code)
    return code


def _has_peers() -> bool:
    """Returns whether this process trains with others: they may still wait for its answers."""
    return "TF_CONFIG" in os.environ


def _code_of(command: click.Command, argv: Sequence[str], program: str) -> int:
    # Libraries log through their own loggers; this is the only handler.
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("matplotlib", "PIL", "absl", "tensorflow", "urllib3", "google", "h5py"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        with quiet_interrupts():
            code = command.main(args=list(argv), prog_name=program, standalone_mode=False)
            _flush_stdout()
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)  # noqa: T201
        return error.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context else program
        problem = _no_option(error) if isinstance(error, click.NoSuchOption) else ""
        message = f"{problem or error.format_message()} (see {path} --help)"
        return _report(path, message, error.exit_code)
    except FlexUNetError as error:
        return _report(program, str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return _report(program, "interrupted; the same command continues", 6)
    except BrokenPipeError:
        # The reader of stdout has exited (`flexunet ... | head`); this keeps the interpreter from
        # raising again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if isinstance(error, OSError) and _is_of_stdout(error):
            problem = f"cannot write to stdout ({error.strerror}); free some space, then try again"
            return _report(program, problem, StorageError.exit_code)
        if not _is_out_of_memory(error):
            raise
        detail = (str(error).strip().splitlines() or ["no memory left"])[0][:_MAX_DETAIL_WIDTH]
        return _report(program, f"out of memory: {detail}; lower the batch or image size", 1)
    return code if isinstance(code, int) else 0


def _flush_stdout() -> None:
    # The interpreter flushes at exit, but fails with its own error and exit code.
    if sys.stdout is not None:
        sys.stdout.flush()


def _is_of_stdout(error: OSError) -> bool:
    """Returns whether `error` means that stdout is not writable; if so, closes stdout."""
    if error.filename is not None or error.errno not in _NO_ROOM:
        return False
    try:
        _flush_stdout()
        os.write(1, b"\n")  # the failed output is no longer in a buffer
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return True
    return False


def _is_out_of_memory(error: Exception) -> bool:
    # By name, because this package must not import TensorFlow.
    names = {each.__name__ for each in type(error).__mro__}
    return isinstance(error, MemoryError) or "ResourceExhaustedError" in names


def _no_option(error: click.NoSuchOption) -> str:
    parameters = error.ctx.command.params if error.ctx else []
    options = [name for each in parameters if isinstance(each, click.Option) for name in each.opts]
    arguments = [
        each.human_readable_name for each in parameters if isinstance(each, click.Argument)
    ]
    name = error.option_name
    remedy = suggest_option(name, options, arguments)
    if remedy is None:
        inside = [each for each in options if each.endswith("." + name.lstrip("-"))]
        close = inside or difflib.get_close_matches(name, options, n=1, cutoff=0.6)
        remedy = f"did you mean {close[0]!r}?" if close else None
    return f"no option {name!r}" + (f"; {remedy}" if remedy else "")


def _report(program: str, message: str, code: int) -> int:
    with contextlib.suppress(OSError):  # a terminal that is gone, or a full disk
        print(f"{program}: {' '.join(message.split())}", file=sys.stderr)  # noqa: T201
    return code
