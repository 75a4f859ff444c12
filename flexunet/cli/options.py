"""Makes a command's options from its settings class, and its settings from the options typed.

Every option of a command is a field of its settings class, so that `--help`, the YAML file and the
saved config can never disagree.
"""

import inspect
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from flexunet.paths import expanded
from flexunet.settings import Settings, fields_of, flag_of, validated

S = TypeVar("S", bound=Settings)

MAX_WIDTH = 100  # columns of help, on a terminal that is wider

_SEPARATOR = "__"
_MAX_NAME_WIDTH = 34  # columns; a longer option has its text on the next line
_MAX_CHOICES_WIDTH = 24  # characters; longer choices are listed in the text
_FIXED_BLANK = "\u00a0"
_NONE = "none"
_UNSET = object()  # given on the command line to unset an option, as None means not given
_METAVARS = {int: "INT", float: "NUMBER", str: "TEXT"}


class SettingsCommand(click.Command):
    """A click command whose help has a section for each group of settings, 100 columns at most."""

    def __init__(self, *arguments: Any, **attributes: Any) -> None:
        attributes["context_settings"] = {"max_content_width": MAX_WIDTH} | (
            attributes.get("context_settings") or {}
        )
        super().__init__(*arguments, **attributes)

    def get_help(self, ctx: click.Context) -> str:
        """Returns the help as plain text."""
        return super().get_help(ctx).replace(_FIXED_BLANK, " ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the options to `formatter`, one section per group of settings."""
        sections: dict[type[Settings] | None, list[tuple[str, str]]] = {None: []}
        options = [each for each in self.get_params(ctx) if isinstance(each, click.Option)]
        for parameter in options:
            group = parameter.group if isinstance(parameter, _SettingsOption) else None
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections.setdefault(group, []).append(record)
        for group, records in sections.items():
            with formatter.section(_title(group)):
                if group is not None:
                    formatter.write_text(" ".join((group.__doc__ or "").split()))
                    formatter.write_paragraph()
                formatter.write_dl(records, col_max=_MAX_NAME_WIDTH)
        _write_value_forms(formatter, options)


def _title(group: type[Settings] | None) -> str:
    return f"{group.__name__.removesuffix('Config')} options" if group else "Options"


def _write_value_forms(formatter: click.HelpFormatter, options: Sequence[click.Option]) -> None:
    """Explains the forms of values that are not plain, where a command has any."""
    forms = []
    if any(isinstance(each.type, _ListType) for each in options):
        forms.append(("LIST", "values with commas between them: 9,9"))
    if any(isinstance(each, _SettingsOption) and each.is_nullable for each in options):
        forms.append(
            ("none", "not set; where it is the default it also undoes the config file (YAML: null)")
        )
    if forms:
        with formatter.section("Values"):
            formatter.write_dl(forms)


class PathType(click.ParamType[Any]):
    """A path or URL of an argument; `~` at its start is the home folder."""

    name = "PATH"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """See `click.ParamType.convert`."""
        try:
            return expanded(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


PATH = PathType()


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
                function = _click_option(cls, path, field)(function)
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
        target[leaf] = None if value is _UNSET else value
    return values


def from_options(cls: type[S], parameters: dict[str, Any]) -> S:
    """Returns `cls` made from what was given on the command line.

    Raises:
        UsageError: a value is not allowed; the message names the option.
    """
    values = given(parameters)
    return validated(cls, values, "options", typed=values)


class _SettingsOption(click.Option):
    """An option of a settings field.

    Attributes:
        group: the settings class of the nested group, None at the first level.
        is_nullable: whether `none` unsets it.
    """

    def __init__(
        self,
        declarations: Sequence[str],
        *,
        group: type[Settings] | None,
        is_nullable: bool,
        **attributes: Any,
    ) -> None:
        super().__init__(declarations, **attributes)
        self.group = group
        self.is_nullable = is_nullable

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Returns (name, text); the two names of a boolean are shown as one: `--[no-]cache`."""
        record = super().get_help_record(ctx)
        if record is None or not self.secondary_opts:
            return record
        *groups, leaf = self.opts[0].removeprefix("--").split(".")
        return "--" + ".".join([*groups, f"[no-]{leaf}"]), record[1]


def _click_option(
    cls: type[Settings], path: tuple[str, ...], field: FieldInfo
) -> Callable[..., Any]:
    dashed = [part.replace("_", "-") for part in path]
    declarations = [flag_of(path)]
    kind = _without_none(field.annotation)
    attributes: dict[str, Any] = {
        "cls": _SettingsOption,
        "group": _group_of(cls, path),
        "is_nullable": kind is not field.annotation,
        "default": None,
    }
    text = field.description or ""
    if kind is bool:
        declarations[0] += "/--" + ".".join([*dashed[:-1], "no-" + dashed[-1]])
    else:
        value_type, metavar = _type_of(path, kind)
        if isinstance(value_type, click.Choice) and len(metavar) > _MAX_CHOICES_WIDTH:
            text = f"{text} One of: {', '.join(value_type.choices)}."
            metavar = "NAME"
        if attributes["is_nullable"]:
            value_type = _NullableType(value_type)
        attributes |= {"type": value_type, "metavar": metavar}
    # A line must not break inside of it; the command's help puts the blanks back.
    text = (text + _default_text(field)).replace("default: ", "default:" + _FIXED_BLANK)
    return click.option(*declarations, _SEPARATOR.join(path), help=text, **attributes)


def _group_of(cls: type[Settings], path: tuple[str, ...]) -> type[Settings] | None:
    """Returns the settings class that holds the field at `path`, None for `cls` itself."""
    group = cls
    for name in path[:-1]:
        group = typing.cast(type[Settings], group.model_fields[name].annotation)
    return group if len(path) > 1 else None


def _type_of(path: tuple[str, ...], kind: Any) -> tuple[click.ParamType[Any], str]:
    """Returns the type of an option's value and its name in the help."""
    if typing.get_origin(kind) is typing.Literal:
        choices = [str(choice) for choice in typing.get_args(kind)]
        return click.Choice(choices), "|".join(choices)
    if typing.get_origin(kind) is tuple:
        return _ListType(), _ListType.name
    if kind in _METAVARS:
        return click.types.convert_type(kind), _METAVARS[kind]
    raise TypeError(f"{'.'.join(path)}: no command-line form for {inspect.formatannotation(kind)}")


class _ListType(click.ParamType[Any]):
    """`a,b,c` as a list; the settings class converts and checks each value."""

    name = "LIST"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if isinstance(value, str):
            return [part.strip() for part in value.split(",") if part.strip()]
        return value


class _NullableType(click.ParamType[Any]):
    """`none`, or a value of another type."""

    def __init__(self, inner: click.ParamType[Any]) -> None:
        self.name = inner.name
        self._inner = inner

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if value == _NONE:
            return _UNSET
        return self._inner.convert(value, param, ctx)


def _without_none(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
        if len(kinds) == 1:
            return kinds[0]
    return annotation


def _default_text(field: FieldInfo) -> str:
    """Returns what ends an option's text."""
    if field.default is PydanticUndefined:
        return " [required]"
    return f" [default: {_shown(field.default) or 'none'}]"


def _shown(value: Any) -> str:
    if value is None:
        return _NONE
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(_shown(part) for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
