"""Reads the small files of a run; a damaged file or a missing field is an error of one line.

An earlier version may have written them, without fields that have come since.
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
    """What a file holds; a field that it lacks is the user's to mend, and no bug of ours."""

    def __init__(self, values: Iterable[tuple[str, Any]], where: str, remedy: str) -> None:
        super().__init__(values)
        self._where, self._remedy = where, remedy

    def __missing__(self, key: str) -> Any:
        raise ContentError(
            f"{self._where}: {key!r} is missing, as an earlier version wrote the file or it is "
            f"damaged; {self._remedy}"
        )


def evaluate_again(run: ObjectStore) -> str:
    """Returns what to do where an evaluation of `run` cannot be read."""
    return f"evaluate the run again: flexunet evaluate {run.url}"


def read_json(store: ObjectStore, name: str, remedy: str) -> dict[str, Any] | None:
    """Returns the JSON object `name`, None where there is none.

    Args:
        remedy: what to do where it cannot be read.

    Raises:
        ContentError: it is not a JSON object; later, where a key is looked up that it lacks.
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
    """Returns the rows of the CSV table `name`, None where there is none.

    Args:
        remedy: what to do where it cannot be read.

    Raises:
        ContentError: it is no table of text; later, where a column is looked up that it lacks.
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
    """Yields (column, text) of a row; one that was cut short lacks its last columns."""
    for column, text in row.items():
        if column is not None and text is not None:
            yield plain_cell(column), plain_cell(text)
