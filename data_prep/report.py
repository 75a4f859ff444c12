"""The `report/` folder of a dataset: statistics, sheets of sample pairs, refused files.

Draws what it is given; it must not decide anything about the dataset.
"""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.colormap import ClassColor
from data_prep.table import csv_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STATISTICS_NAME = "report/statistics.png"
REJECTS_NAME = "report/rejects.csv"
_THUMBNAIL = 320  # pixels of the longer side
_GAP = 12  # pixels between thumbnails
_OVERLAY_ALPHA = 0.45
_LEAST_PERCENT = 1e-3  # of pixels; smaller shares are drawn there


@dataclasses.dataclass(frozen=True)
class SplitStatistics:
    """What the plot shows of one split; `class_pixels` has one number per class."""

    num_samples: int
    class_pixels: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Pair:
    """One pair for a sheet: (H, W, C) uint8 or uint16, and (H, W) uint8 class ids."""

    title: str
    image: np.ndarray
    mask: np.ndarray


def sheet_name(split: str) -> str:
    """Returns the name of the sheet of sample pairs of `split`."""
    return f"report/samples-{split}.png"


def rejects_csv(rejects: Sequence[tuple[str, str]]) -> str:
    """Returns the table of (file, reason); it is safe to open in a spreadsheet."""
    return csv_table(("file", "reason"), rejects)


def statistics_png(
    splits: Mapping[str, SplitStatistics], classes: Sequence[ClassColor], title: str
) -> bytes:
    """Returns a PNG: images per split, and the share of each class in the pixels of each split."""
    figure = _figure(11, 4 + 0.15 * len(classes))
    counts, shares = figure.subplots(1, 2, width_ratios=(2, 3))
    figure.suptitle(title)
    _draw_counts(counts, splits)
    _draw_shares(shares, splits, classes)
    return _png(figure)


def sheet_png(
    pairs: Sequence[Pair], classes: Sequence[ClassColor], value_max: int, title: str
) -> bytes:
    """Returns a PNG with the picture of each pair above the same picture with its mask on it.

    Args:
        value_max: raw value that is drawn white.
    """
    figure = _figure(max(4.4, 2.4 * len(pairs) + 0.4), 5.8)
    figure.suptitle(title, fontsize=10)
    # One axes for all pictures, placed by hand: each costs 40 ms, and a layout draws all twice.
    figure.set_layout_engine("none")
    axes = figure.add_axes((0.02, 0.08, 0.96, 0.84))
    axes.set_axis_off()
    step = 0
    columns = []
    for pair in pairs:
        image, mask = _thumbnails(pair, value_max)
        column = np.concatenate([_framed(image), _framed(_overlaid(image, mask))])
        axes.text(step, -4, _shortened(pair.title), fontsize=8)
        step += column.shape[1]
        columns.append(column)
    axes.imshow(np.concatenate(columns, axis=1))
    _add_legend(figure, classes)
    return _png(figure)


def _framed(image: np.ndarray) -> np.ndarray:
    """Returns `image`, (h, w, 3) uint8, with white space to its right and below."""
    return np.pad(image, ((0, _GAP), (0, _GAP), (0, 0)), constant_values=255)


def _draw_counts(axes: "Axes", splits: Mapping[str, SplitStatistics]) -> None:
    bars = axes.bar(list(splits), [split.num_samples for split in splits.values()], color="C0")
    axes.bar_label(bars, padding=2)
    axes.margins(y=0.12)
    axes.locator_params(axis="y", integer=True)
    axes.set_title("Images per split")
    axes.set_ylabel("images")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_shares(
    axes: "Axes", splits: Mapping[str, SplitStatistics], classes: Sequence[ClassColor]
) -> None:
    # A foreground of 1 % beside a background of 99 % shows only on a logarithmic axis, where a bar
    # has no beginning and its length means nothing: a point is a place and no more.
    height = 0.8 / len(splits)
    places = np.arange(len(classes))
    for i, (name, split) in enumerate(splits.items()):
        total = max(1, sum(split.class_pixels))
        percent = np.array([100 * count / total for count in split.class_pixels])
        rows = places + (i - (len(splits) - 1) / 2) * height
        shown = np.maximum(percent, _LEAST_PERCENT)
        axes.plot(shown, rows, "o", markersize=7, color=f"C{i}", label=name)
        for value, place, row in zip(percent, shown, rows, strict=True):
            axes.annotate(
                f"{value:.3g} %", (place, row), (7, 0), textcoords="offset points",
                va="center", fontsize=8,
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(_LEAST_PERCENT / 1.5, 1000)  # room for the numbers
    axes.set_xticks([1e-3, 1e-2, 0.1, 1, 10, 100], ["<0.001", "0.01", "0.1", "1", "10", "100"])
    axes.xaxis.grid(visible=True, color="0.9")
    axes.set_axisbelow(True)
    axes.set_yticks(places, [_shortened(info.name) for info in classes])
    axes.set_ylim(len(classes) - 0.5, -0.5)
    axes.set_title("Share of each class in the pixels")
    axes.set_xlabel("% of pixels; each step is ten times the one before")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", fontsize=8)


def _thumbnails(pair: Pair, value_max: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (h, w, 3) uint8 and (h, w) uint8, reduced."""
    import cv2

    height, width = pair.mask.shape
    scale = min(1.0, _THUMBNAIL / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    image = cv2.resize(pair.image, size, interpolation=cv2.INTER_AREA)
    mask = cv2.resize(pair.mask, size, interpolation=cv2.INTER_NEAREST_EXACT)
    image = np.clip(image.astype(np.float32) * (255 / value_max), 0, 255).astype(np.uint8)
    image = image.reshape(*mask.shape, -1)
    return np.broadcast_to(image, (*mask.shape, 3)), mask


def _overlaid(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    result = image.astype(np.float32)
    for class_id in np.unique(mask[mask > 0]):
        where = mask == class_id
        color = np.array(_overlay_color(int(class_id))) * 255
        result[where] = (1 - _OVERLAY_ALPHA) * result[where] + _OVERLAY_ALPHA * color
    return result.astype(np.uint8)


def _overlay_color(class_id: int) -> tuple[float, float, float]:
    # Not the colour of the class itself, which is often white: unseen on dense tissue.
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(f"C{(class_id + 2) % 10}")
    return red, green, blue


def _add_legend(figure: "Figure", classes: Sequence[ClassColor]) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(color=_overlay_color(info.id), label=_shortened(info.name)) for info in classes[1:10]
    ]
    if handles:
        figure.legend(handles=handles, loc="lower center", ncols=len(handles), fontsize=8)


def _figure(width: float, height: float) -> "Figure":
    """Returns an empty figure of `width` x `height` inches; pyplot's global state is not used."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: "Figure") -> bytes:
    out = io.BytesIO()
    metadata: dict[str, Any] = {"Software": None}
    figure.savefig(out, format="png", dpi=100, metadata=metadata, pil_kwargs={"compress_level": 3})
    return out.getvalue()


def _shortened(text: str, length: int = 28) -> str:
    # Names are shown as they are: a dollar sign must not start a formula.
    short = text if len(text) <= length else f"{text[: length - 10]}...{text[-7:]}"
    return short.replace("$", r"\$")
