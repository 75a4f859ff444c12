"""Writes CSV text that is safe to open in a spreadsheet, whatever the file names in it.

The functions do not depend on the content of a table.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

# A spreadsheet reads a cell that starts with one of these as a formula.
# Source: OWASP, "CSV Injection".
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")
_GUARD = "'"


def csv_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns CSV text with a header; None is an empty cell, a float keeps every digit.

    Text that a spreadsheet would run as a formula gets a leading apostrophe, because file names are
    not trusted; numbers do not change.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([guarded_cell(name) for name in columns])
    for row in rows:
        writer.writerow([guarded_cell(value) for value in row])
    return buffer.getvalue()


def guarded_cell(value: Any) -> Any:
    """Returns `value`, with a leading apostrophe if it is text that starts like a formula.

    Text that starts with an apostrophe gets a second one, so that `plain_cell` can remove one.
    """
    if isinstance(value, str) and value.startswith((*_FORMULA_STARTS, _GUARD)):
        return f"{_GUARD}{value}"
    return value


def plain_cell(text: str) -> str:
    """Returns the original text of a cell written by `guarded_cell`."""
    return text.removeprefix(_GUARD)
