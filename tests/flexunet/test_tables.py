"""CSV text disarms what a spreadsheet would run, and leaves numbers alone."""

import pytest

from flexunet.tables import csv_table, guarded_cell, plain_cell


@pytest.mark.parametrize("name", ["=cmd|' /C calc'!A0.png", "+1.png", "-1.png", "@a.png", "\t=a"])
def test_guarded_cell_disarms_formulas(name: str) -> None:
    assert guarded_cell(name) == "'" + name
    assert plain_cell(guarded_cell(name)) == name


@pytest.mark.parametrize("name", ["a.png", "'a.png", "'=a.png", "''", ""])
def test_plain_cell_is_what_was_written(name: str) -> None:
    assert plain_cell(guarded_cell(name)) == name


def test_csv_table_leaves_negative_numbers_alone() -> None:
    assert csv_table(["id", "change"], [["=a,b", -0.5], ["plain", None]]) == (
        'id,change\n"\'=a,b",-0.5\nplain,\n'
    )
