"""Turns keyword arguments of the Python API into the values of a settings class.

The keywords are the fields of the class, as the options of a command are: `epochs=5`, and
`model={"num_layers": 5}` for `--model.num-layers 5`.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from flexunet.errors import FlexUNetError, UsageError
from flexunet.paths import expand_home
from flexunet.settings import Settings, parse_settings, remedy_for

S = TypeVar("S", bound=Settings)

StrPath = str | os.PathLike[str]


def keyword_values(
    function: str, cls: type[Settings], options: Mapping[str, Any], parameters: Sequence[str] = ()
) -> dict[str, Any]:
    """Returns `options` as nested plain values: paths as text, settings as what was set in them.

    Args:
        function: its name in the API, for errors: "train".
        cls: has a field for each option.
        parameters: other parameters of the function, which an unknown keyword may mean.

    Raises:
        UsageError: a keyword is unknown; the message proposes the right one.
    """
    unknown = [name for name in options if name not in cls.model_fields]
    if unknown:
        problems = [f"{name!r}; {_remedy(cls, name, parameters)}" for name in unknown]
        raise UsageError(f"flexunet.{function}(): unknown option {'; '.join(problems)}")
    return {name: _plain(value) for name, value in options.items()}


def settings_of(
    function: str, cls: type[S], options: Mapping[str, Any], parameters: Sequence[str] = ()
) -> S:
    """Returns `cls` made from keyword arguments; see `keyword_values`.

    Raises:
        UsageError: a keyword is unknown, or a value is not allowed.
    """
    values = keyword_values(function, cls, options, parameters)
    return parse_settings(cls, values, f"flexunet.{function}()")


def path_text(path: StrPath) -> str:
    """Returns a path or URL as text; `~` at its start is the home folder.

    Raises:
        UsageError: there is no such home folder.
    """
    try:
        return expand_home(os.fspath(path))
    except ValueError as error:
        raise UsageError(str(error)) from error


def _remedy(cls: type[Settings], name: str, parameters: Sequence[str]) -> str:
    text = remedy_for(cls, [name], [each.upper() for each in parameters])
    text = re.sub(
        r"give it as the argument (\w+)", lambda found: f"did you mean {found[1].lower()!r}?", text
    )
    # 'model.num_layers' is no keyword; its group is one.
    return re.sub(r"'(\w+)\.(\w+)'", r"\1={'\2': ...}", text)


def _plain(value: Any) -> Any:
    if isinstance(value, Settings):
        return value.model_dump(exclude_unset=True)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_plain(each) for each in value)
    return value


@contextmanager
def keyword_errors(cls: type[Settings], parameters: Sequence[str] = ()) -> Iterator[None]:
    """Names keyword arguments, not options of a command, in the errors that the block raises.

    Args:
        parameters: keywords of the function that are no fields of `cls`.
    """
    try:
        yield
    except FlexUNetError as error:
        names = {*cls.model_fields, *parameters}
        error.args = tuple(
            _with_keywords(each, names) if isinstance(each, str) else each for each in error.args
        )
        raise


# A command that a message quotes stays as it is; a value is a number or a placeholder.
_OPTION = re.compile(
    r"`[^`]*`|\bflexunet [a-z]+ [^;,]*"
    r"|--(?P<no>no-)?(?P<group>[a-z][a-z0-9-]*)(?:\.(?P<name>[a-z0-9-]+))?"
    r"(?:[ =](?P<value>\d[\d.]*\b|[A-Z]{2,}\b))?"
)


def _with_keywords(text: str, names: set[str]) -> str:
    def keyword(found: re.Match[str]) -> str:
        group = (found["group"] or "").replace("-", "_")
        if group not in names:
            return found[0]
        if found["no"]:
            return f"{group}=False"
        value = found["value"]
        if found["name"]:
            inner = found["name"].replace("-", "_")
            return f"{group}={{'{inner}': {value or '...'}}}"
        return f"{group}={value}" if value else group

    return _OPTION.sub(keyword, text)
