"""Lays out the confusion matrix of an evaluation: which class the pixels of each class became."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flexunet.errors import ContentError
from flexunet.json_files import read_table
from flexunet.storage import ObjectStore
from job.reporting.views.parts import Rgb, Table
from job.runs.layout import evaluate_again

_CELL = 38  # pixels
_LEAST_SHOWN = 0.0005  # share of a cell; a smaller one rounds to 0.0 %
_LETTER = 7.0  # pixels, about, of a letter of a name
_MOST_LETTERS = 24  # of a name; the whole name is in the table
_LIGHT, _DARK = np.array([255, 255, 255]), np.array([8, 64, 129])  # white to dark blue
# Of black and white, the ink with more contrast: above this luminance black, at least 4.5.
_MIDDLE_LUMINANCE = 0.18
_LUMINANCE = np.array([0.2126, 0.7152, 0.0722])  # of red, green and blue (WCAG 2)


@dataclass(frozen=True)
class ConfusionCell:
    """A cell: its position from the upper left corner in pixels, and its share in percent."""

    x: int
    y: int
    text: str
    fill: str
    ink: str


@dataclass(frozen=True)
class ConfusionName:
    """A class beside its row and above its column; `middle` is in pixels from the first cell."""

    text: str
    color: Rgb | None
    middle: float


@dataclass(frozen=True)
class ConfusionView:
    """The confusion matrix: a row for each class of the truth, a column for each prediction.

    Attributes:
        words: the content, for people who do not see the matrix.
        cell: pixels of a side of a cell.
        margin: pixels for the names.
        mixed_up: the largest shares outside of the diagonal, in words.
        table: pixels.
    """

    words: str
    cell: int
    margin: int
    names: Sequence[ConfusionName]
    cells: Sequence[ConfusionCell]
    mixed_up: Sequence[str]
    table: Table

    @property
    def side(self) -> int:
        """Pixels of all cells of a row."""
        return self.cell * len(self.names)


def confusion_of(store: ObjectStore, colors: Mapping[str, Rgb]) -> ConfusionView | None:
    """Returns the confusion matrix of the newest evaluation; None if it has none.

    Args:
        colors: of classes by name.

    Raises:
        ContentError: the table is damaged.
    """
    rows = read_table(store, "evaluation/confusion.csv", evaluate_again(store))
    if not rows:
        return None
    names = list(dict.fromkeys(row["truth"] for row in rows))
    index = {name: number for number, name in enumerate(names)}
    pixels = np.zeros((len(names), len(names)), np.int64)
    try:
        for row in rows:
            pixels[index[row["truth"]], index[row["predicted"]]] = int(row["pixels"])
    except (ValueError, KeyError, OverflowError) as error:
        raise ContentError(
            f"{store.url}/evaluation/confusion.csv: damaged ({error}); {evaluate_again(store)}"
        ) from error
    total = pixels.sum(axis=1, keepdims=True)
    shares = np.divide(pixels, total, out=np.zeros(pixels.shape), where=total > 0)
    mixed_up = _mixed_up(names, shares)
    right = ", ".join(f"{name} {shares[n, n]:.0%}" for n, name in enumerate(names) if total[n, 0])
    return ConfusionView(
        words=f"Confusion matrix of {len(names)} classes. Share that is right: {right}.",
        cell=_CELL,
        margin=round(max(len(_shortened(name)) for name in names) * _LETTER) + 30,
        names=[
            ConfusionName(_shortened(name), colors.get(name), (n + 0.5) * _CELL)
            for n, name in enumerate(names)
        ],
        cells=[_cell(r, c, shares[r, c]) for r, c in np.argwhere(shares >= _LEAST_SHOWN).tolist()],
        mixed_up=mixed_up,
        table=Table(
            ["truth \\ prediction, pixels", *names],
            [[name, *map(int, row)] for name, row in zip(names, pixels, strict=True)],
            colors,
        ),
    )


def _cell(row: int, column: int, share: float) -> ConfusionCell:
    color = np.round(_LIGHT + (_DARK - _LIGHT) * share)
    red, green, blue = color.astype(int)
    text = f"{100 * share:.0f}" if share >= 0.1 else f"{100 * share:.1f}"
    ink = "#000" if _luminance(color) > _MIDDLE_LUMINANCE else "#fff"
    return ConfusionCell(column * _CELL, row * _CELL, text, f"#{red:02x}{green:02x}{blue:02x}", ink)


def _luminance(color: npt.NDArray[np.float64]) -> float:
    """Returns the relative luminance of a colour, as WCAG 2 defines it."""
    shares = color / 255
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    return float(linear @ _LUMINANCE)


def _mixed_up(names: Sequence[str], shares: npt.NDArray[np.float64]) -> list[str]:
    """Returns the five largest shares of pixels of a class that became another one."""
    wrong = shares.copy()
    np.fill_diagonal(wrong, 0.0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:5]
    places = [divmod(int(each), len(names)) for each in order]
    return [f"{names[r]} as {names[c]} {wrong[r, c]:.1%}" for r, c in places if wrong[r, c] > 0]


def _shortened(name: str) -> str:
    return name if len(name) <= _MOST_LETTERS else f"{name[: _MOST_LETTERS - 1]}…"
