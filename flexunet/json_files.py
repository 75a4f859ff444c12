"""Reads the JSON and CSV files of a run; reports damage or a missing field in one line.

An earlier version may have written a file without fields that were added later.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flexunet.errors import ContentError
from flexunet.storage import NotFound, ObjectStore
from flexunet.tables import plain_cell


class _Stored(dict[str, Any]):
    """The content of a file; a missing field raises ContentError with a remedy, not KeyError."""

    def __init__(self, values: Iterable[tuple[str, Any]], where: str, remedy: str) -> None:
        super().__init__(values)
        self._where, self._remedy = where, remedy

    def __missing__(self, key: str) -> Any:
        raise ContentError(
            f"{self._where}: {key!r} is missing: the file is damaged or from an earlier version; "
            f"{self._remedy}"
        )


def read_json(store: ObjectStore, name: str, remedy: str) -> dict[str, Any] | None:
    """Returns the JSON object `name`, None if it does not exist.

    Args:
        remedy: what to do if the file cannot be read.

    Raises:
        ContentError: the file is not a JSON object; also later, on access to a missing key.
    """
    where = f"{store.url}/{name}"
    try:
        values = json.loads(
            store.get(name), object_pairs_hook=lambda pairs: _Stored(pairs, where, remedy)
        )
    except NotFound:
        return None
    except (ValueError, RecursionError) as error:
        raise ContentError(f"{where}: not valid JSON ({error}); {remedy}") from error
    if not isinstance(values, dict):
        raise ContentError(f"{where}: not a JSON object; {remedy}")
    return values


def read_table(store: ObjectStore, name: str, remedy: str) -> list[dict[str, str]] | None:
    """Returns the rows of the CSV table `name`, None if it does not exist.

    Args:
        remedy: what to do if the file cannot be read.

    Raises:
        ContentError: the file is not a CSV table; also later, on access to a missing column.
    """
    where = f"{store.url}/{name}"
    try:
        rows = csv.DictReader(io.StringIO(store.get(name).decode(), newline=""), strict=True)
        return [_Stored(_cells(row), where, remedy) for row in rows]
    except NotFound:
        return None
    except (ValueError, csv.Error) as error:
        raise ContentError(f"{where}: not a table ({error}); {remedy}") from error


def _cells(row: Mapping[str | None, Any]) -> Iterator[tuple[str, str]]:
    """Yields (column, text) of a row; a truncated row lacks its last columns."""
    for column, text in row.items():
        if column is not None and text is not None:
            yield plain_cell(column), plain_cell(text)
