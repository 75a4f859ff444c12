"""Writes command lines of `prep`."""

import shlex
from collections.abc import Mapping
from typing import Any

from data_prep.config import PrepConfig


def prep_command(source: str, output: str, options: Mapping[str, Any]) -> str:
    """Returns the command line for a shell: `flexunet prep SOURCE OUTPUT --option value`.

    Args:
        options: values of fields of `PrepConfig`; defaults are left out.
    """
    words = ["flexunet", "prep", source, output]
    for name, field in PrepConfig.model_fields.items():
        value = options.get(name)
        if value is None or value == field.default:
            continue
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [flag, _as_text(value)]
    return shlex.join(words)


def _as_text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_as_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
