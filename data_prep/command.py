"""The command line: options made from settings, errors turned into one line and an exit code.

Every option of a command is a field of its settings class, so that `--help`, the YAML file and the
saved config can never disagree.
"""

import inspect
import logging
import os
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

import click
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from data_prep.errors import FlexUNetError
from data_prep.settings import Settings, fields_of

_SEPARATOR = "__"


class SettingsCommand(click.Command):
    """A click command whose help shows nested groups of settings under a heading of their own."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the options to `formatter`, one section per group of settings."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                group, found, _ = (parameter.name or "").partition(_SEPARATOR)
                title = f"{group.capitalize()} options" if found else "Options"
                sections.setdefault(title, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records, col_max=40)


def settings_options(
    cls: type[Settings], *, skip: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Returns a decorator that adds one click option for every field of `cls`.

    Args:
        skip: fields of the first level that the command takes in another way (as arguments).
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for path, field in reversed(list(fields_of(cls))):
            if path[0] not in skip:
                function = _click_option(path, field)(function)
        return function

    return decorate


def given(parameters: dict[str, Any]) -> dict[str, Any]:
    """Returns the nested values that were given on the command line, by settings path."""
    values: dict[str, Any] = {}
    for name, value in parameters.items():
        if value is None or value == ():
            continue
        *groups, leaf = name.split(_SEPARATOR)
        target = values
        for group in groups:
            target = target.setdefault(group, {})
        target[leaf] = value
    return values


def run_command(command: click.Command, argv: Sequence[str] | None, program: str) -> int:
    """Runs `command` and returns its exit code; a user's mistake becomes one line on stderr."""
    # cv2 and matplotlib log through their own channels; ours is the only handler.
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("matplotlib", "PIL", "absl", "tensorflow", "urllib3", "google", "h5py"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = command.main(args=arguments, prog_name=program, standalone_mode=False)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context else program
        return _report(path, f"{error.format_message()} (see {path} --help)", error.exit_code)
    except FlexUNetError as error:
        return _report(program, str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return _report(program, "interrupted; the same command continues", 6)
    except BrokenPipeError:
        # The reader of our output went away (`flexunet ... | head`); keep the interpreter from
        # raising again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code if isinstance(code, int) else 0


def _report(program: str, message: str, code: int) -> int:
    print(f"{program}: {' '.join(message.split())}", file=sys.stderr)  # noqa: T201
    return code


def _click_option(path: tuple[str, ...], field: FieldInfo) -> Callable[..., Any]:
    dashed = [part.replace("_", "-") for part in path]
    flag = "--" + ".".join(dashed)
    name = _SEPARATOR.join(path)
    text = field.description or ""
    default = _default_text(field)
    kind = _without_none(field.annotation)
    if default:
        text = f"{text} [default: {default}]"
    if kind is bool:
        off = "--" + ".".join([*dashed[:-1], "no-" + dashed[-1]])
        return click.option(f"{flag}/{off}", name, default=None, help=text)
    if typing.get_origin(kind) is typing.Literal:
        choices = [str(choice) for choice in typing.get_args(kind)]
        return click.option(flag, name, type=click.Choice(choices), help=text)
    if typing.get_origin(kind) is tuple:
        return click.option(flag, name, type=_ListOption(), help=f"{text} (comma between values)")
    if kind in (int, float, str):
        return click.option(flag, name, type=kind, help=text)
    raise TypeError(f"{'.'.join(path)}: no command-line form for {inspect.formatannotation(kind)}")


class _ListOption(click.ParamType[Any]):
    """`a,b,c` as a list; the settings class converts and checks each value."""

    name = "LIST"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if isinstance(value, str):
            return [part.strip() for part in value.split(",") if part.strip()]
        return value


def _without_none(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
        if len(kinds) == 1:
            return kinds[0]
    return annotation


def _default_text(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None:
        return ""
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    if isinstance(field.default, tuple):
        return ",".join(str(value) for value in field.default)
    return str(field.default)
