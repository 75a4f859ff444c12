"""Groups the failures of an evaluation: pairs of an image and a class with a low Dice."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexunet.json_files import read_table
from flexunet.storage import ObjectStore
from flexunet.text import pluralize
from job.reporting.views.parts import Rgb, Table, cell_value
from job.runs.layout import evaluate_again

_FAILED_DICE = 0.5  # of a class in an image; a lower one is listed as a failure
_MOST_SHOWN = 200  # failures on a page, all classes together
_LEAST_SHOWN = 10  # of each class
PROBLEMS = ("nothing predicted", "no overlap", "false alarm", "poor overlap")
_OF_PRESENCE = {"truth_only": "nothing predicted", "prediction_only": "false alarm"}

Failed = tuple[float, Mapping[str, str]]  # Dice, and the row of its image


@dataclass(frozen=True)
class ClassFailures:
    """The failures of a class, worst first; `table` has the first of them.

    Attributes:
        problems: number of failures by problem, in words.
    """

    name: str
    color: Rgb | None
    num_failed: int
    problems: str
    num_shown: int
    table: Table


@dataclass(frozen=True)
class Failures:
    """The (image, class) pairs with a low Dice.

    Attributes:
        pairs: number of pairs that have a Dice, in words.
        table: the number of pairs and of failures of each class, by problem.
        classes: those with failures, most failures first.
    """

    limit: float
    pairs: str
    num_failed: int
    table: Table
    classes: Sequence[ClassFailures]


def failures_of(store: ObjectStore, colors: Mapping[str, Rgb]) -> Failures | None:
    """Returns the failures of the newest evaluation, or None if nothing was measured.

    Args:
        colors: of classes by name.
    """
    rows = read_table(store, "evaluation/measures_network.csv", evaluate_again(store))
    if not rows:
        return None
    names = [key.removeprefix("presence_") for key in rows[0] if key.startswith("presence_")]
    num_pairs = {name: sum(bool(row[f"dice_{name}"]) for row in rows) for name in names}
    failed = {name: _failed(rows, name) for name in names}
    problems = {
        name: Counter(_problem(row, name) for _, row in found) for name, found in failed.items()
    }
    cells = [
        (name, num_pairs[name], len(failed[name]), *(problems[name][each] for each in PROBLEMS))
        for name in names
    ]
    with_failures = sorted((name for name in names if failed[name]), key=lambda n: -len(failed[n]))
    most = max(_LEAST_SHOWN, _MOST_SHOWN // max(1, len(with_failures)))
    return Failures(
        limit=_FAILED_DICE,
        pairs=_pairs_words(sum(num_pairs.values()), len(names)),
        num_failed=sum(map(len, failed.values())),
        table=Table(("class", "images with a Dice", "failures", *PROBLEMS), cells, colors),
        classes=[
            ClassFailures(
                name=name,
                color=colors.get(name),
                num_failed=len(failed[name]),
                problems=_problem_words(problems[name]),
                num_shown=len(failed[name][:most]),
                table=_table(failed[name][:most], name),
            )
            for name in with_failures
        ],
    )


def _pairs_words(number: int, num_classes: int) -> str:
    return pluralize(number, "image") if num_classes == 1 else f"{number} pairs of image and class"


def _failed(rows: Sequence[Mapping[str, str]], name: str) -> list[Failed]:
    """Returns the failures of a class, worst first."""
    found = [(float(row[f"dice_{name}"]), row) for row in rows if row[f"dice_{name}"]]
    return sorted((each for each in found if each[0] < _FAILED_DICE), key=lambda each: each[0])


def _problem(row: Mapping[str, str], name: str) -> str:
    if row[f"presence_{name}"] != "both":
        return _OF_PRESENCE.get(row[f"presence_{name}"], "")
    return "poor overlap" if int(row[f"tp_px_{name}"]) else "no overlap"


def _problem_words(problems: Mapping[str, int]) -> str:
    return ", ".join(f"{problems[each]} {each}" for each in PROBLEMS if problems[each])


def _table(failed: Sequence[Failed], name: str) -> Table:
    columns = (
        "image",
        "group",
        "problem",
        "Dice",
        "HD95",
        "unit",
        "lesions found",
        "false positives",
    )
    return Table(columns, [_row(*each, name) for each in failed])


def _row(dice: float, row: Mapping[str, str], name: str) -> tuple[Any, ...]:
    return (
        row["id"],
        row["group"],
        _problem(row, name),
        dice,
        cell_value(row[f"hd95_{name}"]),
        row["unit"],
        f"{row[f'found_lesions_{name}']} of {row[f'lesions_{name}']}",
        int(row[f"false_positives_{name}"]),
    )
