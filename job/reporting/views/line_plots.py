"""Lays out small line plots for a page, in pixels; the template draws them as SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from job.reporting.views.parts import Rgb, Table

Point = tuple[float, float]

# Each has a contrast of at least 4.5 on white; the dashes distinguish lines without colour.
LINE_COLORS = (
    *("#1f6fb2", "#b04a00", "#2a7a3b", "#8a3ea8", "#a8243a", "#0b6f6a", "#6b5600", "#4f5963"),
)
_DASHES = ("", "7 4", "2 3", "9 3 2 3")
_MOST_POINTS = 300  # of a line; a page with thousands of epochs stays small
_MOST_TICKS = 5
_LEAST_RANGE = 1e-300  # of smaller ones, a tick has no digits


@dataclass(frozen=True)
class LineStyle:
    """The look of a line, which the legend shows."""

    color: str
    dash: str


def line_style(index: int) -> LineStyle:
    """Returns the look of line `index`; 32 lines look different."""
    color = LINE_COLORS[index % len(LINE_COLORS)]
    return LineStyle(color, _DASHES[index // len(LINE_COLORS) % len(_DASHES)])


# Two lines in one plot: colour and dashes differ.
PAIR = (LineStyle(LINE_COLORS[0], ""), LineStyle(LINE_COLORS[1], "5 3"))


@dataclass(frozen=True)
class Axis:
    """An axis of a plot: its label, and ticks as (pixels from the start, text)."""

    label: str
    ticks: Sequence[tuple[float, str]]


@dataclass(frozen=True)
class Line:
    """A line of a plot: points (x, y) in pixels from the upper left corner."""

    style: LineStyle
    points: Sequence[Point]
    has_markers: bool

    @property
    def path(self) -> str:
        """The points as an SVG attribute."""
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in self.points)


@dataclass(frozen=True)
class LinePlot:
    """A plot.

    Attributes:
        words: the content, for people who do not see the plot.
        bars: (left, top, width, height) below the plot.
        color: of the class, None if the plot is of no class.
        has_diagonal: from the lower left to the upper right corner.
    """

    title: str
    words: str
    width: int
    height: int
    x: Axis
    y: Axis
    lines: Sequence[Line]
    color: Rgb | None = None
    has_diagonal: bool = False
    bars: Sequence[tuple[float, float, float, float]] = ()
    bars_height: int = 0


@dataclass(frozen=True)
class PlotGroup:
    """Plots of one kind with a common legend, and their numbers as a table.

    Attributes:
        notes: sentences below the plots.
        legend: (words, style) of each line.
        table: shown on demand.
    """

    title: str
    notes: Sequence[str]
    legend: Sequence[tuple[str, LineStyle]]
    plots: Sequence[LinePlot]
    table: Table | None


@dataclass(frozen=True)
class Frame:
    """The area of a plot and its ranges.

    Attributes:
        labels: of the horizontal and the vertical axis.
        width, height: of the area inside of the axes, pixels.
        x_range, y_range: (lowest, highest) value.
        is_whole: horizontal ticks are whole numbers.
    """

    labels: tuple[str, str]
    width: int
    height: int
    x_range: tuple[float, float]
    y_range: tuple[float, float] = (0.0, 1.0)
    is_whole: bool = False

    def x_axis(self) -> Axis:
        """Returns the horizontal axis."""
        low, high = self.x_range
        found = ticks_of(low, high, is_whole=self.is_whole)
        ticks = [(_position(each, low, high) * self.width, text) for each, text in found]
        return Axis(self.labels[0], ticks)

    def y_axis(self) -> Axis:
        """Returns the vertical axis."""
        low, high = self.y_range
        ticks = [
            ((1 - _position(each, low, high)) * self.height, text)
            for each, text in ticks_of(low, high)
        ]
        return Axis(self.labels[1], ticks)

    def line(self, points: Sequence[Point], style: LineStyle, *, has_markers: bool = False) -> Line:
        """Returns a line through points (x, y), in units of the axes; at most 300 are drawn."""
        step = max(1, -(-len(points) // _MOST_POINTS))
        chosen = [*points[:-1:step], *points[-1:]]
        placed = [
            (
                _position(x, *self.x_range) * self.width,
                (1 - _position(y, *self.y_range)) * self.height,
            )
            for x, y in chosen
        ]
        return Line(style, placed, has_markers)

    def plot(
        self, title: str, words: str, lines: Sequence[Line], color: Rgb | None = None
    ) -> LinePlot:
        """Returns the plot of these lines."""
        axes = self.x_axis(), self.y_axis()
        return LinePlot(title, words, self.width, self.height, *axes, lines, color)


def ticks_of(low: float, high: float, *, is_whole: bool = False) -> list[tuple[float, str]]:
    """Returns up to 6 round values from `low` to `high`, and their texts; none without a range.

    Args:
        is_whole: only whole numbers.
    """
    if not math.isfinite(high - low):
        return []
    if high - low < _LEAST_RANGE:
        return [(low, f"{low:g}")]
    rough = (high - low) / (_MOST_TICKS - 1)
    scale = 10.0 ** math.floor(math.log10(rough))
    factors = (1, 2, 5, 10) if is_whole else (1, 2, 2.5, 5, 10)
    step = next(factor * scale for factor in factors if factor * scale >= rough * 0.999)
    step = max(1.0, step) if is_whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(index * step, f"{index * step:.6g}") for index in range(first, last + 1)]


def range_of(values: Sequence[float], *, from_zero: bool = False) -> tuple[float, float]:
    """Returns a range that has all of `values`; (0, 1) without values."""
    if not values:
        return 0.0, 1.0
    low, high = (0.0 if from_zero else min(values)), max(values)
    return (low, high) if high > low else (low, low + 1.0)


def range_words(name: str, points: Sequence[Point]) -> str:
    """Returns a sentence about a line, for people who do not see it."""
    if not points:
        return f"{name}: no value."
    values = [y for _, y in points]
    return f"{name}: {min(values):.3g} to {max(values):.3g}, at the end {values[-1]:.3g}."


def _position(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.0
