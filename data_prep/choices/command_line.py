"""Writes command lines of `prep`."""

import shlex
from collections.abc import Mapping
from typing import Any

from data_prep.config import PrepConfig

_LATE = ("group_preset", "group_regex", "draw_valid", "missing_mask", "skip_bad", "allow_leaks")


def prep_command(source: str, output: str, options: Mapping[str, Any]) -> str:
    """Returns the command line for a shell: `flexunet prep SOURCE OUTPUT --option value`."""
    words = ["flexunet", "prep", source, output]
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
    return f"{value:g}" if isinstance(value, float) else str(value)
