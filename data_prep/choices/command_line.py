"""Writes command lines of `prep`."""

import shlex
from collections.abc import Mapping
from typing import Any

from data_prep.config import PrepConfig

_LATE = ("group_preset", "group_regex", "draw_valid", "missing_mask", "skip_bad", "allow_leaks")


def prep_command(source: str, output: str, options: Mapping[str, Any]) -> str:
    """Returns the command line for a shell: `flexunet prep SOURCE OUTPUT --option value`."""
    # A name that begins with a dash would be an option.
    places = [f"./{each}" if each.startswith("-") else each for each in (source, output)]
    words = ["flexunet", "prep", *places]
    fields = PrepConfig.model_fields
    names = [name for name in fields if name not in _LATE]
    for name in (*names, *_LATE):
        value = options.get(name)
        if value is None or value == fields[name].default:
            continue
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [flag, _as_text(value)]
    return shlex.join(words)


def _as_text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_as_text, value))
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return str(value)
