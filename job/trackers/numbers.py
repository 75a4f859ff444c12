"""Joins the numbers of each epoch from the tables of a run."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flexunet.errors import ContentError
from flexunet.json_files import read_table
from flexunet.storage import ObjectStore
from flexunet.tables import csv_table
from job.runs.layout import RESTORE

logger = logging.getLogger(__name__)

CLASS_DICE_NAME = "metrics/class_dice.csv"
_TABLES = ("metrics/history.csv", "metrics/throughput.csv")
_OF_CLASS = "dice_"  # begins the columns of classes
_TAG = "val_dice/"  # begins their names in a tracker, which groups names by what is before a slash

Row = Mapping[str, Any]  # the epoch, from 0, and numbers; None: not defined


def class_dice_row(epoch: int, classes: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the row of an epoch in `CLASS_DICE_NAME`: the Dice of each class but 0.

    Args:
        classes: of the summary of an evaluation.
    """
    dice = {f"{_OF_CLASS}{each['name']}": each["dice"] for each in classes if each["id"] != 0}
    return {"epoch": epoch, **dice}


def class_dice_table(rows: Sequence[Row]) -> str:
    """Returns the table of the Dice of each class on the validation split, as CSV."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return csv_table(columns, ([row.get(name) for name in columns] for row in rows))


def read_class_dice(run: ObjectStore, num_epochs: int) -> list[Row]:
    """Returns the rows of the first `num_epochs` epochs, for a run that resumes.

    Runs of earlier versions have none. A damaged table starts anew, with a warning.
    """
    try:
        rows = _numbers(run, CLASS_DICE_NAME)
    except ContentError as error:
        logger.warning("%s; the table starts anew with epoch %d", error, num_epochs + 1)
        return []
    return [row for row in rows if row["epoch"] < num_epochs]


def joined_rows(*tables: Sequence[Row], class_dice: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns one row per epoch, in order, with the numbers of all tables.

    Args:
        class_dice: rows of `class_dice_row`; their numbers get the names `val_dice/CLASS`.
    """
    found: dict[int, dict[str, Any]] = {}
    for row in (row for table in tables for row in table):
        found.setdefault(row["epoch"], {}).update(row)
    for row in class_dice:
        named = {
            f"{_TAG}{name.removeprefix(_OF_CLASS)}": value
            for name, value in row.items()
            if name != "epoch"
        }
        found.setdefault(row["epoch"], {"epoch": row["epoch"]}).update(named)
    return [found[epoch] for epoch in sorted(found)]


def stored_rows(run: ObjectStore, num_epochs: int) -> list[dict[str, Any]]:
    """Returns the joined rows of the first `num_epochs` epochs, from the tables of a run.

    Raises:
        ContentError: a table is damaged.
    """
    tables = [_numbers(run, name) for name in _TABLES]
    rows = joined_rows(*tables, class_dice=_numbers(run, CLASS_DICE_NAME))
    return [row for row in rows if row["epoch"] < num_epochs]


def _numbers(run: ObjectStore, name: str) -> list[dict[str, Any]]:
    table = read_table(run, name, RESTORE) or []
    try:
        return [{**_floats(row), "epoch": int(row["epoch"])} for row in table]
    except ValueError as error:
        raise ContentError(f"{run.url}/{name}: {error}; {RESTORE}") from error


def _floats(row: Mapping[str, str]) -> dict[str, float | None]:
    """Returns the numbers of a row; an empty cell and a number that is not finite are None."""
    values = {column: float(text) if text else math.nan for column, text in row.items()}
    return {column: value if math.isfinite(value) else None for column, value in values.items()}
