"""Creates a command's options from its settings class, and its settings from the options given.

Every option of a command is a field of its settings class, so that `--help`, the YAML file and the
saved config always agree.
"""

import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import click
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from flexunet.paths import expand_home
from flexunet.settings import Settings, fields_of, flag_of, parse_settings

S = TypeVar("S", bound=Settings)

MAX_WIDTH = 100  # columns of help on a wider terminal

_SEPARATOR = "__"
_MAX_NAME_WIDTH = 34  # columns; the text of a longer option starts on the next line
_MAX_CHOICES_WIDTH = 24  # characters; longer choices are listed in the text
_FIXED_BLANK, _FIXED_HYPHEN = "\u00a0", "\u2011"
_OPTION_NAME = re.compile(r"(?<![\w-])--[\w.-]+")
_NONE = "none"
_UNSET = object()  # the option was unset on the command line; None means not given
_METAVARS = {int: "INT", float: "NUMBER", str: "TEXT"}


class _HelpFormatter(click.HelpFormatter):
    """Formats help without a line break inside the name of an option."""

    def write_text(self, text: str) -> None:
        """See `click.HelpFormatter.write_text`."""
        super().write_text(_fixed(text))

    def write_dl(self, rows: Iterable[tuple[str, str]], *arguments: Any, **options: Any) -> None:
        """See `click.HelpFormatter.write_dl`."""
        super().write_dl([(name, _fixed(text)) for name, text in rows], *arguments, **options)

    def getvalue(self) -> str:
        """Returns the help as plain text."""
        return super().getvalue().replace(_FIXED_HYPHEN, "-").replace(_FIXED_BLANK, " ")


def _fixed(text: str) -> str:
    """Returns `text` with hyphens in option names at which click does not break a line."""
    return _OPTION_NAME.sub(lambda name: name[0].replace("-", _FIXED_HYPHEN), text)


class _HelpContext(click.Context):
    formatter_class = _HelpFormatter


class SettingsCommand(click.Command):
    """A click command with one help section per group of settings, at most 100 columns wide."""

    context_class = _HelpContext

    def __init__(self, *arguments: Any, **attributes: Any) -> None:
        attributes["context_settings"] = {"max_content_width": MAX_WIDTH} | (
            attributes.get("context_settings") or {}
        )
        super().__init__(*arguments, **attributes)

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
    """Explains the value forms LIST and none if the command has such options."""
    forms = []
    if any(isinstance(each.type, _ListType) for each in options):
        forms.append(("LIST", "values separated by commas, such as 9,9"))
    if any(isinstance(each, _SettingsOption) and each.is_nullable for each in options):
        forms.append(("none", "unsets the option, also if the config file sets it (in YAML: null)"))
    if forms:
        with formatter.section("Values"):
            formatter.write_dl(forms)


class PathType(click.ParamType[Any]):
    """The click type of a path or URL argument; a leading `~` is the home folder."""

    name = "PATH"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """See `click.ParamType.convert`."""
        try:
            return expand_home(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


PATH = PathType()


def settings_options(
    cls: type[Settings], *, skip: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Returns a decorator that adds one click option for every field of `cls`.

    Args:
        skip: top-level fields that the command takes in another way, such as arguments.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for path, field in reversed(list(fields_of(cls))):
            if path[0] not in skip:
                place = _OptionPlace(flag_of(path), path, _group_of(cls, path))
                function = _click_option(place, field)(function)
        return function

    return decorate


def extra_options(
    cls: type[Settings], name: str, beside: Sequence[type[Settings]]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Returns a decorator that adds the fields of `cls` as a section of their own.

    `explicit_options` returns their values as the group `name`. The options have the names of the
    fields; a name that `beside` has, too, is `--NAME.FIELD`.

    Args:
        cls: has no nested groups; its docstring explains the section.
        beside: settings classes of the command's other options.
    """
    taken = {path for each in beside for path, _ in fields_of(each)}

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for path, field in reversed(list(fields_of(cls))):
            flag = flag_of((name, *path) if path in taken else path)
            function = _click_option(_OptionPlace(flag, (name, *path), cls), field)(function)
        return function

    return decorate


def explicit_options(parameters: dict[str, Any]) -> dict[str, Any]:
    """Returns the values given on the command line, nested like the settings."""
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
    """Returns an instance of `cls` parsed from the options given on the command line.

    Raises:
        UsageError: a value is not allowed; the message names the option.
    """
    values = explicit_options(parameters)
    return parse_settings(cls, values, "options", typed=values)


class _SettingsOption(click.Option):
    """A click option for a settings field.

    Attributes:
        group: the settings class of the nested group, None at the top level.
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
        """Returns (name, text); shows the two names of a boolean as one: `--[no-]cache`."""
        record = super().get_help_record(ctx)
        if record is None or not self.secondary_opts:
            return record
        *groups, leaf = self.opts[0].removeprefix("--").split(".")
        return "--" + ".".join([*groups, f"[no-]{leaf}"]), record[1]


class _OptionPlace(NamedTuple):
    """The place of an option: its flag, the path of its value, and its section of the help."""

    flag: str
    path: tuple[str, ...]
    group: type[Settings] | None


def _click_option(place: _OptionPlace, field: FieldInfo) -> Callable[..., Any]:
    declarations = [place.flag]
    kind = _without_none(field.annotation)
    attributes: dict[str, Any] = {
        "cls": _SettingsOption,
        "group": place.group,
        "is_nullable": kind is not field.annotation,
        "default": None,
    }
    text = field.description or ""
    if kind is bool:
        *dashed, last = place.flag.removeprefix("--").split(".")
        declarations[0] += "/--" + ".".join([*dashed, f"no-{last}"])
    else:
        value_type, metavar = _type_of(place.path, kind)
        if isinstance(value_type, click.Choice) and len(metavar) > _MAX_CHOICES_WIDTH:
            text = f"{text} One of: {', '.join(value_type.choices)}."
            metavar = "NAME"
        if attributes["is_nullable"]:
            value_type = _NullableType(value_type)
        attributes |= {"type": value_type, "metavar": metavar}
    # Help lines must not break inside the default; the formatter restores the blanks.
    text = (text + _default_text(field)).replace("default: ", "default:" + _FIXED_BLANK)
    return click.option(*declarations, _SEPARATOR.join(place.path), help=text, **attributes)


def _group_of(cls: type[Settings], path: tuple[str, ...]) -> type[Settings] | None:
    """Returns the settings class with the field at `path`, None if that is `cls` itself."""
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
    """The click type of `a,b,c` as a list; the settings class converts and checks each value."""

    name = "LIST"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if isinstance(value, str):
            return [part.strip() for part in value.split(",") if part.strip()]
        return value


class _NullableType(click.ParamType[Any]):
    """The click type of `none` or a value of another type."""

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
    """Returns the end of an option's help text: required, or its default."""
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
