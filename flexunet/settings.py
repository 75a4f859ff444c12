"""Defines typed settings: a frozen base class, validation with one-line errors, and YAML.

A settings class is plain data. The error for an unknown key suggests the nearest known key.
"""

import difflib
import re
import reprlib
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.config import JsonDict
from pydantic_core import ErrorDetails

from flexunet.errors import UsageError
from flexunet.paths import expand_home
from flexunet.synonyms import suggest_option

S = TypeVar("S", bound="Settings")

_MAX_SHOWN = 120  # characters of a value or key shown in an error
_MAX_PROBLEMS = 10  # shown in one error


class Settings(BaseModel):
    """Base class of a frozen group of settings; rejects unknown keys, NaN and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic reads `true` as 1, but `epochs: yes` is a mistake.
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (kind, *typing.get_args(kind)):
            raise ValueError("true and false are not allowed here")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _home_in_paths(cls, value: Any, info: ValidationInfo) -> Any:
        extra = cls.model_fields[str(info.field_name)].json_schema_extra
        if not (isinstance(extra, dict) and extra.get("path")):
            return value
        if isinstance(value, list | tuple):
            return [expand_home(each) if isinstance(each, str) else each for each in value]
        return expand_home(value) if isinstance(value, str) else value


def option(
    default: Any,
    description: str,
    *,
    not_identity: bool = False,
    path: bool = False,
    **constraints: Any,
) -> Any:
    """Returns a settings field.

    Args:
        default: the value if the key is missing; `...` makes the key required.
        description: one sentence for `--help`, with the unit.
        not_identity: may change between two attempts of one run; every other field is part of
            its identity.
        path: the value is one or more paths or URLs; a leading `~` is the home folder.
        constraints: passed on to pydantic, such as `gt`, `le` and `pattern`.
    """
    extra: JsonDict = {"not_identity": not_identity, "path": path}
    return Field(default, description=description, json_schema_extra=extra, **constraints)


def parse_settings(
    cls: type[S],
    values: Mapping[str, Any],
    where: str,
    *,
    typed: Mapping[str, Any] | None = None,
) -> S:
    """Returns an instance of `cls` parsed from nested `values`.

    Args:
        where: the source of the values, named in the error.
        typed: the part of `values` given on the command line; the error names these as options.
            None: there is no command line.

    Raises:
        UsageError: a key is unknown or a value is not allowed; the message is one line.
    """
    try:
        return cls.model_validate(dict(values))
    except ValidationError as error:
        details = _without_consequences(error.errors())
        problems = [_describe(cls, detail, typed) for detail in details[:_MAX_PROBLEMS]]
        if len(details) > _MAX_PROBLEMS:
            problems.append(f"and {len(details) - _MAX_PROBLEMS} more")
        if all((place := _option_of(detail)) and _is_typed(place, typed) for detail in details):
            where = "options"
        raise UsageError(f"{where}: {'; '.join(problems)}") from error


def _without_consequences(details: Sequence[Any]) -> list[Any]:
    """Returns the problems without lists that are too short only because an item is wrong."""
    places = [detail["loc"] for detail in details]
    return [
        detail
        for detail in details
        if detail["type"] != "too_short"
        or not any(
            len(place) > len(detail["loc"]) and place[: len(detail["loc"])] == detail["loc"]
            for place in places
        )
    ]


def fields_of(
    cls: type[Settings], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields (path, pydantic field) for every setting of `cls` and its nested groups."""
    for name, field in cls.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Settings):
            yield from fields_of(kind, (*path, name))
        else:
            yield (*path, name), field


class _StrictLoader(yaml.SafeLoader):
    """Loads YAML like SafeLoader, but rejects aliases and duplicate keys."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        # Aliases of aliases expand a few lines to gigabytes of values.
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            problem = f"alias *{event.anchor} is not supported; write the value out"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # the base class raises the error
            if key_node.value in seen:
                problem = f"{key_node.value!r} is given twice; keep one"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def read_yaml(text: str, where: str) -> dict[str, Any]:
    """Parses `text` as a YAML mapping; an empty text gives an empty mapping.

    Raises:
        UsageError: `text` is not YAML or not a mapping, or has a duplicate key, an alias, or a tag
            that would build an object.
    """
    try:
        values = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        problem = " ".join(str(error).split())
        raise UsageError(f"{where}: not valid YAML: {problem}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"{where}: expected `key: value` lines, got {type(values).__name__}")
    return values


def read_text(path: str, flag: str | None = None) -> str:
    """Returns the text of the file at `path`, given by an option.

    Args:
        flag: the option, named in the error; None: the file is the command's config.

    Raises:
        UsageError: the file cannot be read or is not UTF-8 text.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError as error:
        raise UsageError(f"{flag or '--config'} {path}: does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        if flag is None:
            raise UsageError(f"{path}: config file cannot be read: {error}") from error
        raise UsageError(f"{flag} {path}: cannot be read ({error}); give a text file") from error


def write_yaml(settings: Settings, *, only_set: bool = False) -> str:
    """Returns `settings` as YAML text with every field, defaults too.

    Args:
        only_set: write only the fields that were set when `settings` were made.
    """
    values = settings.model_dump(mode="json", exclude_unset=only_set)
    return yaml.safe_dump(values, sort_keys=False)


def deep_merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `base` updated with the values of `over`, nested groups included."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            result[key] = deep_merge(below, value)
        else:
            result[key] = value
    return result


def flat_values(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested `values` by dotted path."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        found |= flat_values(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def suggestion(name: str, known: list[str]) -> str:
    """Returns a remedy for an unknown `name`: the nearest known name, or all known names."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


def remedy_for(cls: type[Settings], path: Sequence[str], arguments: Collection[str] = ()) -> str:
    """Returns a remedy for the unknown key at `path`: the right key, or advice.

    Args:
        arguments: names of the command's arguments, as in `flexunet.synonyms.suggest_option`.
    """
    elsewhere = [known for known in _keys_of(cls) if known.rpartition(".")[2] == path[-1]]
    if elsewhere:
        return f"did you mean {elsewhere[0]!r}?"
    keys = {flag_of(each.split(".")): each for each in _keys_of(cls)}
    remedy = suggest_option(path[-1], keys, arguments)
    if remedy is not None:
        for flag, key in keys.items():
            remedy = remedy.replace(f"{flag!r}", f"{key!r}")
        return remedy
    group: Any = cls
    for part in path[:-1]:
        field = getattr(group, "model_fields", {}).get(part)
        group = field.annotation if field else None
    return suggestion(path[-1], list(getattr(group, "model_fields", {})))


def flag_of(path: Sequence[str]) -> str:
    """Returns the option name of the field at `path`, such as `--model.num-layers`."""
    return "--" + ".".join(part.replace("_", "-") for part in path)


def _is_typed(path: Sequence[str], typed: Mapping[str, Any] | None) -> bool:
    values: Any = typed
    for part in path:
        if not isinstance(values, Mapping) or part not in values:
            return False
        values = values[part]
    return True


def _as_typed(message: str, typed: Mapping[str, Any], path: tuple[str, ...] = ()) -> str:
    """Replaces `name=` by the option name in `message`, for settings given as options."""
    for name, value in typed.items():
        below = (*path, name)
        if isinstance(value, Mapping):
            message = _as_typed(message, value, below)
        else:
            message = re.sub(rf"(?<![\w.-]){re.escape(name)}=", f"{flag_of(below)}=", message)
    return message


def _option_of(detail: ErrorDetails) -> list[str]:
    """Returns the path of the option with the error, without an index into its list."""
    path = [str(part) for part in detail["loc"]]
    return path[:-1] if path and path[-1].isdecimal() else path


def _describe(
    cls: type[Settings], detail: ErrorDetails, typed: Mapping[str, Any] | None = None
) -> str:
    path = [str(part) for part in detail["loc"]]
    name = _shortened(".".join(path)) or "values"
    place = _option_of(detail)
    if _is_typed(place, typed) or (typed is not None and detail["type"] == "missing"):
        name = flag_of(place)
    if detail["type"] == "extra_forbidden":
        return f"unknown key {name!r}; {remedy_for(cls, path)}"
    if detail["type"] == "model_type":
        return f"{name}: expected a group of keys, got {_shown(detail['input'])}"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "missing" and place != path:
        return f"{name}={_shown(detail['input'])}: too few values"
    if detail["type"] == "missing":
        return f"{name} is required"
    # A check of a whole group names its fields in the message; its input is the whole group.
    if isinstance(detail["input"], Mapping):
        message = _as_typed(message, typed or {})
        return f"{'.'.join(path)}: {message}" if path else message
    return f"{name}={_shown(detail['input'])}: {message[0].lower()}{message[1:]}"


def _keys_of(cls: type[Settings]) -> Iterator[str]:
    """Yields the keys of `cls`, and those of its groups as `group.key`."""
    for name, field in cls.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            yield from (f"{name}.{key}" for key in _keys_of(field.annotation))
        else:
            yield name


def _shown(value: Any) -> str:
    """Returns a shortened repr of `value`, which may be the whole content of a file."""
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = _MAX_SHOWN
    shortener.maxlist = shortener.maxtuple = shortener.maxdict = 8
    shortener.maxlevel = 2
    return shortener.repr(value)


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."
