"""Collects the measures of all cases at one size: a matrix of classes and measures, and counts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from job.reporting.phrases import (
    BASELINE,
    MeasureRow,
    is_share,
    lesion_words,
    measure_owners,
    measure_rows,
    size_notes,
)
from job.reporting.views.parts import Rgb, Table, interval_words, name_once

_PRESENCES = ("neither", "both", "truth_only", "missed", "prediction_only")
_LESION_COUNTS = ("lesions", "lesions_found", "false_positives", "specks")
_FEW_CLASSES = 4  # foreground classes up to which every size is shown without a click


@dataclass(frozen=True)
class MatrixCell:
    """A measure of a class.

    Attributes:
        share: of the full length of its bar, 0 to 1; None without a bar.
    """

    value: float | None
    interval: str | None
    share: float | None


@dataclass(frozen=True)
class MatrixRow:
    """The measures of a class, or of the mean over all foreground classes."""

    name: str
    color: Rgb | None
    cells: Sequence[MatrixCell | None]


@dataclass(frozen=True)
class Matrix:
    """The measures of classes: a row for each class, a column for each measure."""

    columns: Sequence[str]
    rows: Sequence[MatrixRow]


@dataclass(frozen=True)
class Size:
    """The measures of all cases at one size.

    Attributes:
        matrix: None if there is one foreground class.
        is_open: whether the page shows it without a click.
    """

    title: str
    matrix: Matrix | None
    measures: Table
    counts: Table
    num_groups: int
    min_groups: int
    tolerance: str
    lesion_words: str
    notes: Sequence[str]
    is_open: bool = True


def sizes_of(
    sizes: Sequence[tuple[str, Mapping[str, Any]]], colors: Mapping[str, Rgb]
) -> list[Size]:
    """Returns the measures at each of `titled_sizes`; of many classes, only the first is open."""
    return [
        size_of(title, measures, colors, is_open=number == 0 or _has_few_classes(measures))
        for number, (title, measures) in enumerate(sizes)
    ]


def size_of(
    title: str, measures: Mapping[str, Any], colors: Mapping[str, Rgb], *, is_open: bool = True
) -> Size:
    """Returns the measures of all cases at one size, from `summarize_cases`.

    Args:
        colors: of classes by name.
    """
    tolerance = " or ".join(
        f"{value:g} {unit}" for unit, value in measures["nsd_tolerance"].items()
    )
    rows = measure_rows(measures)
    return Size(
        title=title,
        matrix=_matrix(measures, colors) if len(measures["classes"]) > 1 else None,
        measures=_measures(rows),
        counts=_counts(measures, colors),
        num_groups=measures["num_groups"],
        min_groups=measures["interval"]["min_groups"],
        tolerance=tolerance,
        lesion_words=lesion_words(measures),
        notes=size_notes(title, measures),
        is_open=is_open,
    )


def _has_few_classes(measures: Mapping[str, Any]) -> bool:
    return len(measures["classes"]) <= _FEW_CLASSES


def _matrix(measures: Mapping[str, Any], colors: Mapping[str, Rgb]) -> Matrix:
    owners = measure_owners(measures)
    columns = list(dict.fromkeys(label for _, found in owners for label in found))
    return Matrix(
        columns,
        [
            MatrixRow(owner, colors.get(owner), [_cell(label, found) for label in columns])
            for owner, found in owners
        ],
    )


def _cell(label: str, found: Mapping[str, Mapping[str, Any]]) -> MatrixCell | None:
    measure = found.get(label)
    if measure is None:
        return None
    value = measure["value"]
    return MatrixCell(value, interval_words(measure), value if is_share(label) else None)


def _measures(rows: Sequence[MeasureRow]) -> Table:
    columns = (
        "class",
        "measure",
        "value",
        "95 % interval",
        "images",
        "groups",
        BASELINE,
        "images of the baseline",
    )
    cells = [
        (
            owner,
            label,
            each["value"],
            interval_words(each),
            each["num_cases"],
            each["num_groups"],
            each["all_background"],
            each["all_background_num_cases"],
        )
        for owner, label, each in rows
    ]
    return Table(columns, name_once(cells))


def _counts(measures: Mapping[str, Any], colors: Mapping[str, Rgb]) -> Table:
    columns = (
        "class",
        "in neither mask",
        "in both masks",
        "nothing predicted",
        "missed",
        "false alarm",
        "lesions",
        "lesions found",
        "false positives",
        "tiny regions",
    )
    keys = [f"num_{key}" for key in (*_PRESENCES, *_LESION_COUNTS)]
    rows = [(each["name"], *(each[key] for key in keys)) for each in measures["classes"]]
    return Table(columns, rows, colors)
