"""Writes CSV text that is safe to open in a spreadsheet, as file names come from outside.

Knows nothing of what the tables hold.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

# A spreadsheet takes a cell that starts with one of these for a formula.
# Source: OWASP, "CSV Injection".
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")
_GUARD = "'"


def csv_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns CSV text with a header; None is an empty cell, a float keeps every digit.

    Text that a spreadsheet would run as a formula gets a leading apostrophe (file names come from
    outside); numbers are left alone.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([guarded_cell(name) for name in columns])
    for row in rows:
        writer.writerow([guarded_cell(value) for value in row])
    return buffer.getvalue()


def guarded_cell(value: Any) -> Any:
    """Returns `value`, with a leading apostrophe where it is text that starts like a formula.

    Text that starts with an apostrophe gets one too, so that `plain_cell` knows whose it is.
    """
    if isinstance(value, str) and value.startswith((*_FORMULA_STARTS, _GUARD)):
        return f"{_GUARD}{value}"
    return value


def plain_cell(text: str) -> str:
    """Returns the text of which `guarded_cell` made `text`."""
    return text.removeprefix(_GUARD)
