"""Draws the `report/` of a dataset: statistics, contact sheets of sample pairs, rejected files.

Only draws; all decisions about the dataset are made elsewhere.
"""

import dataclasses
import functools
import io
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from data_prep.imaging.codecs import encode_png
from data_prep.imaging.pixels import shown_channels
from data_prep.masks.color_map import ClassColor, Color
from flexunet.tables import csv_table
from flexunet.text import legible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STATISTICS_NAME = "report/statistics.png"
REJECTS_NAME = "report/rejects.csv"
CLIPPED_NAME = "report/clipped.csv"
UNMAPPED_NAME = "report/unmapped-colors.csv"
UNMAPPED_COLUMNS = ("red", "green", "blue", "pixels", "files", "nearest_class")
_THUMBNAIL = 240  # pixels of the longer side
_MIN_COLUMN = 100  # pixels, so that names of small images stay readable
_GAP = 12  # pixels between thumbnails
_LINE = 18  # pixels of a line of text
_MAX_LEGEND = 10  # names in a line of the legend; without more classes, it names all of them
_OVERLAY_ALPHA = 0.45
_SWATCH = (_GAP + 1, _GAP + 1)  # height and width in the legend, pixels
_NUM_SPARE = 30  # colours of classes whose own one is not visible
_HATCH_PERIOD, _HATCH_WIDTH = 6, 2  # pixels, of diagonal lines over ignored areas
_HATCH_GREYS = 220.0, 90.0  # of the lines, and between them
_MIN_BRIGHTEST, _MIN_CHROMA = 100, 64  # levels, of a colour that is visible on grey images
_MIN_DIFFERENCE = 30  # levels in a channel, of two classes with their own colours
_FAR = 120  # levels, of another colour from all others, if there is one
_LEAST_PERCENT = 1e-3  # of pixels; smaller shares are drawn at this value


@dataclasses.dataclass(frozen=True)
class SplitStatistics:
    """The statistics of one split in the plot; `class_pixels` has one number per class."""

    num_samples: int
    class_pixels: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class PairPreview:
    """One pair for a contact sheet: (H, W, C) uint8 or uint16, and (H, W) uint8 class ids."""

    title: str
    image: np.ndarray
    mask: np.ndarray


def contact_sheet_name(split: str) -> str:
    """Returns the object name of the contact sheet of `split`."""
    return f"report/samples-{split}.png"


def clipped_csv(rows: Sequence[tuple[str, int, int]]) -> str:
    """Returns the CSV of images with clipped pixels: file, number of pixels, largest value."""
    return csv_table(("file", "num_pixels_above", "max_value"), rows)


def rejects_csv(rejects: Sequence[tuple[str, str]]) -> str:
    """Returns the CSV of rejected files and reasons; it is safe to open in a spreadsheet."""
    rows = [(legible(file), legible(reason)) for file, reason in rejects]
    return csv_table(("file", "reason"), rows)


def statistics_png(
    splits: Mapping[str, SplitStatistics], classes: Sequence[ClassColor], title: str
) -> bytes:
    """Returns a PNG with the samples per split, and the share of pixels per class and split."""
    from matplotlib.figure import Figure

    # Fixed positions: a layout engine would draw everything twice. Widths of names are estimated.
    width, height = 11.0, 4 + 0.15 * len(classes)  # inches
    bottom, top = 0.6 / height, 1 - 0.7 / height
    longest = max(len(_shortened(info.name)) for info in classes)
    left = 0.36 + (0.35 + 0.08 * longest) / width
    figure = Figure(figsize=(width, height))
    figure.suptitle(_literal(title), y=1 - 0.1 / height, va="top")
    _draw_counts(figure.add_axes((0.06, bottom, 0.28, top - bottom)), splits)
    _draw_shares(figure.add_axes((left, bottom, 0.98 - left, top - bottom)), splits, classes)
    out = io.BytesIO()
    metadata: dict[str, Any] = {"Software": None}
    figure.savefig(out, format="png", dpi=100, metadata=metadata, pil_kwargs={"compress_level": 1})
    return out.getvalue()


def contact_sheet_png(
    pairs: Sequence[PairPreview],
    classes: Sequence[ClassColor],
    value_max: int,
    title: str,
    *,
    ignore_id: int | None = None,
) -> bytes:
    """Returns a PNG with each image above the same image with its mask as an overlay.

    Args:
        pairs: one or more.
        value_max: raw value drawn as white.
        ignore_id: class id of ignored pixels, which are hatched.
    """
    # Without Matplotlib, which would need 0.5 s to put images side by side.
    large, small = _font(14), _font(11)
    colors = overlay_colors(classes)
    columns = []
    for pair in pairs:
        image, mask = _thumbnails(pair, value_max)
        columns.append((pair.title, image, _overlaid(image, mask, colors, ignore_id)))
    widest = max(_MIN_COLUMN, *(image.shape[1] for _, image, _ in columns))
    tallest = max(image.shape[0] for _, image, _ in columns)
    legend = [
        (_shortened(info.name), np.full((*_SWATCH, 3), colors[info.id], np.uint8))
        for info in _named(classes, pairs)
    ]
    if ignore_id is not None:
        legend.append(("ignored", _hatched_swatch(ignore_id)))
    lines = [legend[start : start + _MAX_LEGEND] for start in range(0, len(legend), _MAX_LEGEND)]
    widths = [[_text_width(small, name) + 3 * _GAP for name, _ in line] for line in lines]
    width = max((widest + _GAP) * len(columns), _text_width(large, title) + _GAP, *map(sum, widths))
    top = 2 * _LINE + _GAP
    bottom = top + 2 * (tallest + _GAP)
    height = bottom + max(1, len(lines)) * _LINE + _GAP
    canvas = PIL.Image.new("RGB", (width + _GAP, height), "white")
    draw = PIL.ImageDraw.Draw(canvas)
    draw.text(((width + _GAP) / 2, _GAP), title, "black", large, anchor="mt")
    left = _GAP
    for text, image, overlay in columns:
        draw.text((left, top - 4), _fitted(text, small, widest), "black", small, anchor="ls")
        canvas.paste(PIL.Image.fromarray(image), (left, top))
        canvas.paste(PIL.Image.fromarray(overlay), (left, top + tallest + _GAP))
        left += widest + _GAP
    for line, name_widths in zip(lines, widths, strict=True):
        left = max(_GAP, (width + _GAP - sum(name_widths)) // 2)
        for (name, swatch), name_width in zip(line, name_widths, strict=True):
            canvas.paste(PIL.Image.fromarray(swatch), (left, bottom))
            draw.text((left + _GAP + 6, bottom + _GAP / 2), name, "black", small, anchor="lm")
            left += name_width
        bottom += _LINE
    return encode_png(np.asarray(canvas))


def _named(classes: Sequence[ClassColor], pairs: Sequence[PairPreview]) -> list[ClassColor]:
    """Returns the foreground classes for the legend: of many, those in the masks."""
    if len(classes) <= _MAX_LEGEND:
        return list(classes[1:])
    seen = {int(class_id) for pair in pairs for class_id in np.unique(pair.mask)}
    return [info for info in classes[1:] if info.id in seen]


def _font(size: int) -> PIL.ImageFont.FreeTypeFont:
    # The font of the plots; Pillow's default font has Latin letters only.
    import matplotlib as mpl

    return PIL.ImageFont.truetype(f"{mpl.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def _text_width(font: PIL.ImageFont.FreeTypeFont, text: str) -> int:
    return math.ceil(font.getlength(text))


def _fitted(text: str, font: PIL.ImageFont.FreeTypeFont, width: int) -> str:
    """Returns `text`, shortened in the middle to at most `width` pixels."""
    text = " ".join(text.split())  # a line break cannot be drawn
    for num_kept in range(len(text), 0, -1):
        start, end = text[: (num_kept + 1) // 2], text[len(text) - num_kept // 2 :]
        shown = text if num_kept == len(text) else f"{start}…{end}"
        if _text_width(font, shown) <= width:
            return shown
    return "…" if text else ""


def _draw_counts(axes: "Axes", splits: Mapping[str, SplitStatistics]) -> None:
    bars = axes.bar(list(splits), [split.num_samples for split in splits.values()], color="C0")
    axes.bar_label(bars, padding=2)
    axes.margins(y=0.12)
    axes.locator_params(axis="y", integer=True)
    axes.set_title("Samples per split")
    axes.set_ylabel("samples")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_shares(
    axes: "Axes", splits: Mapping[str, SplitStatistics], classes: Sequence[ClassColor]
) -> None:
    # A foreground of 1 % beside a background of 99 % is visible only on a logarithmic axis. The
    # length of a bar has no meaning there, so the values are points.
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
    axes.set_xlim(_LEAST_PERCENT / 1.5, 1000)  # space for the numbers
    axes.set_xticks([1e-3, 1e-2, 0.1, 1, 10, 100], ["<0.001", "0.01", "0.1", "1", "10", "100"])
    axes.minorticks_off()
    axes.xaxis.grid(visible=True, color="0.9")
    axes.set_axisbelow(True)
    axes.set_yticks(places, [_literal(_shortened(info.name)) for info in classes])
    axes.set_ylim(len(classes) - 0.5, -0.5)
    axes.set_title("Share of pixels per class")
    axes.set_xlabel("% of pixels (logarithmic scale)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", fontsize=8)


def _thumbnails(pair: PairPreview, value_max: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the image (h, w, 3) uint8 and the mask (h, w) uint8, downscaled."""
    import cv2

    height, width = pair.mask.shape
    scale = min(1.0, _THUMBNAIL / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    image = cv2.resize(shown_channels(pair.image), size, interpolation=cv2.INTER_AREA)
    mask = cv2.resize(pair.mask, size, interpolation=cv2.INTER_NEAREST_EXACT)
    image = np.clip(image.astype(np.float32) * (255 / value_max), 0, 255).astype(np.uint8)
    image = image.reshape(*mask.shape, -1)
    return np.broadcast_to(image, (*mask.shape, 3)), mask


def _overlaid(
    image: np.ndarray, mask: np.ndarray, colors: Mapping[int, Color], ignore_id: int | None
) -> np.ndarray:
    """Returns `image` with a tint for each class, and hatching for `ignore_id`."""
    result = image.astype(np.float32)
    for class_id in np.unique(mask[mask > 0]).tolist():
        where = mask == class_id
        if class_id == ignore_id:
            result[where] = np.where(_hatching(mask.shape)[where, np.newaxis], *_HATCH_GREYS)
            continue
        color = np.array(colors.get(class_id) or _spare_color(class_id))
        result[where] = (1 - _OVERLAY_ALPHA) * result[where] + _OVERLAY_ALPHA * color
    return result.astype(np.uint8)


def _hatching(shape: tuple[int, ...]) -> np.ndarray:
    """Returns diagonal lines, (h, w) bool, which join across areas."""
    y, x = np.indices(shape)
    return (x + y) % _HATCH_PERIOD < _HATCH_WIDTH


def _hatched_swatch(ignore_id: int) -> np.ndarray:
    """Returns the legend swatch of ignored pixels, (h, w, 3) uint8."""
    mask = np.full(_SWATCH, ignore_id, np.uint8)
    return _overlaid(np.zeros((*_SWATCH, 3), np.uint8), mask, {}, ignore_id)


def overlay_colors(classes: Sequence[ClassColor]) -> dict[int, Color]:
    """Returns the colour of each foreground class in overlays: its own one if that is visible.

    White, grey and dark colours are invisible on images, and similar ones look the same.
    Such classes get another colour, which no other class has.
    """
    result: dict[int, Color] = {}
    for entry in classes[1:]:
        color = entry.color
        is_visible = max(color) >= _MIN_BRIGHTEST and max(color) - min(color) >= _MIN_CHROMA
        if is_visible and _difference(color, result.values()) >= _MIN_DIFFERENCE:
            result[entry.id] = color
    for entry in classes[1:]:
        if entry.id not in result:
            result[entry.id] = _free_color(entry.id, result.values())
    return result


def _difference(color: Color, others: Iterable[Color]) -> int:
    """Returns the largest channel difference to the nearest of `others`."""
    distances = (max(abs(a - b) for a, b in zip(color, each, strict=True)) for each in others)
    return min(distances, default=255)


def _free_color(class_id: int, taken: Collection[Color]) -> Color:
    """Returns the colour of a class without an own one, of those that are far from others."""
    if len(taken) >= _NUM_SPARE:  # all are taken
        return _spare_color(class_id)
    spare = [_spare_color(number) for number in range(class_id, class_id + _NUM_SPARE)]
    distances = [_difference(color, taken) for color in spare]
    far = [color for color, each in zip(spare, distances, strict=True) if each >= _FAR]
    return far[0] if far else spare[distances.index(max(distances))]


@functools.cache
def _spare_color(class_id: int) -> Color:
    from matplotlib.colors import to_rgb

    first = to_rgb(f"C{(class_id + 2) % 10}")
    # Ten colours, then the same ones lighter, then darker.
    target, part = ((0.0, 0.0), (1.0, 0.55), (0.0, 0.45))[(class_id - 1) // 10 % 3]
    red, green, blue = (round(255 * (v + part * (target - v))) for v in first)
    return red, green, blue


def _shortened(text: str, length: int = 28) -> str:
    text = " ".join(text.split())  # a line break cannot be drawn
    return text if len(text) <= length else f"{text[: length - 10]}...{text[-7:]}"


def _literal(text: str) -> str:
    # Matplotlib would read text between dollar signs as a formula.
    return text.replace("$", r"\$")
