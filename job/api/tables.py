"""Reads the CSV tables of a run into data frames: names stay text, all else is numbers."""

from typing import TYPE_CHECKING

from flexunet.errors import ContentError
from flexunet.json_files import read_table
from flexunet.storage import ObjectStore

if TYPE_CHECKING:
    import pandas as pd


def read_frame(
    store: ObjectStore, name: str, remedy: str, *, index: str, text: tuple[str, ...] = ()
) -> "pd.DataFrame":
    """Returns the table `name`; empty if it does not exist.

    An empty cell is NaN in a column of numbers, and an empty text in a column of text.

    Args:
        remedy: what to do if the file is damaged.
        index: the column that becomes the index.
        text: the columns that are text; "NA" and "null" are names there.

    Raises:
        ContentError: the file is not a table, a cell is missing or is not a number.
    """
    import pandas as pd

    rows = read_table(store, name, remedy)
    if rows is None:
        return pd.DataFrame({index: pd.Series(dtype=int)}).set_index(index)
    columns = list(dict.fromkeys(name for row in rows for name in row)) or [index]
    table = pd.DataFrame({column: [row[column] for row in rows] for column in columns})
    for column in columns:
        if column not in text:
            table[column] = _numbers(table[column], f"{store.url}/{name}", remedy)
    if index not in columns:
        raise ContentError(f"{store.url}/{name}: has no column {index!r}; {remedy}")
    return table.set_index(index)


def _numbers(cells: "pd.Series", where: str, remedy: str) -> "pd.Series":
    import pandas as pd

    try:
        return pd.to_numeric(cells)  # an empty text is NaN
    except ValueError as error:
        raise ContentError(
            f"{where}: column {cells.name!r} has a cell that is not a number ({error}); {remedy}"
        ) from error
