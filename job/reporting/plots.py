"""Draws curves, coloured masks, overlays and panels as PNG bytes.

Owns how they look. The same input gives the same bytes: no dates, no versions, no global plot
state. Knows nothing of storage, TensorFlow or the meaning of a number.
"""

import importlib.util
import io
import os
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from data_prep.imaging.codecs import encode_png
from data_prep.imaging.pixels import shown_channels
from data_prep.masks.color_map import NO_CLASS_COLOR, ClassColor

Pixels = npt.NDArray[np.uint8]
Color = tuple[int, int, int]

# Cyan and orange differ for every common colour blindness, and both differ from grey tissue.
_TRUTH_COLOR: Color = (0, 220, 255)
_PREDICTION_COLOR: Color = (255, 140, 0)
_EDGE_COLOR: Color = (0, 0, 0)
_INK: Color = (235, 235, 235)
_PAPER: Color = (24, 24, 24)

_DIMMED = 0.65
_TINT = 0.35
# Limits of the longest side of an overlay, pixels. Small images are enlarged until a contour is at
# most one of their pixels wide; large ones are reduced so that a browser shows them whole.
_OVERLAY_SIDES = (1024, 1600)
_PANEL_SIDE = 512
_MARGIN = 10
_EDGE = 1  # pixels of the dark edge on each side of a contour


def curve_png(
    title: str,
    epochs: Sequence[int],
    series: Mapping[str, Sequence[float]],
    ylabel: str,
    labels: Mapping[str, str] | None = None,
) -> bytes:
    """Returns line plots over epochs, in the style of the reference implementation.

    Args:
        epochs: from 1.
        series: values by name, each as long as `epochs`; names that start with "val_" are red,
            the rest green, all dashed with markers. NaN leaves a gap.
        labels: names in the legend, by name of the series; default: that name.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8.0, 5.0), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    marker_size = 6.0 if len(epochs) <= 30 else 3.5
    for (name, values), (color, marker) in zip(series.items(), _line_styles(series), strict=True):
        axes.plot(
            epochs,
            values,
            color=color,
            linestyle="--",
            linewidth=1.4,
            marker=marker,
            markersize=marker_size,
            label=(labels or {}).get(name, name),
        )
    axes.set_title(title, parse_math=False)
    axes.set_xlabel("epoch, counted from 1")
    axes.set_ylabel(ylabel, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(epochs) == 1:
        axes.set_xticks(epochs)
    axes.grid(True, alpha=0.4)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def mask_png(class_ids: Pixels, classes: Sequence[ClassColor]) -> bytes:
    """Returns a palette PNG: pixel values are class ids, shown in the colours of `classes`.

    Args:
        class_ids: (H, W) uint8; an id without a class (the ignore id) is grey.
    """
    image = Image.fromarray(class_ids)
    image.putpalette(_palette(classes).tobytes())
    return _png(image)


def overlay_png(
    image: npt.NDArray[Any],
    class_ids: Pixels,
    classes: Sequence[ClassColor],
    truth: Pixels | None = None,
) -> bytes:
    """Returns the dimmed image with the contours of the prediction and, if given, the truth.

    With more than one foreground class the prediction is also tinted in the colours of the classes.
    The legend is below the image and covers no part of it.

    Args:
        image: (H, W) or (H, W, C), uint8 or uint16.
        class_ids: (H, W) uint8, the prediction.
        truth: (H, W) uint8.
    """
    height, width = _overlay_size(*class_ids.shape)
    canvas = _resized(_shown(image), height, width) * _DIMMED
    predicted = _resized_ids(class_ids, height, width)
    foreground = [each for each in classes if each.id != 0]
    if len(foreground) > 1:
        tinted = _palette(classes)[predicted]
        canvas = np.where((predicted > 0)[..., None], canvas + _TINT * (tinted - canvas), canvas)
    pixels = np.round(canvas).astype(np.uint8)
    line = max(1, round(max(height, width) / 500))
    # The truth is drawn first and wider, so that both lines show where they agree.
    contours = [_Contour("prediction", predicted, _PREDICTION_COLOR, line)]
    if truth is not None:
        true = _resized_ids(truth, height, width)
        contours.insert(0, _Contour("truth", true, _TRUTH_COLOR, 2 * line))
    _draw_two_tone(pixels, contours, foreground)
    entries = [_Entry(each.name, each.color, is_line=True) for each in contours]
    if len(foreground) > 1:
        entries.extend(_Entry(each.name, each.color, is_line=False) for each in foreground)
    return _png(_stacked([_image(pixels), _legend(entries, width)]))


def panel_png(
    image: npt.NDArray[Any],
    truth: Pixels,
    prediction: Pixels,
    classes: Sequence[ClassColor],
    title: str,
) -> bytes:
    """Returns image, truth and prediction side by side, with `title` above and a legend below.

    Args:
        image: (H, W) or (H, W, C), uint8 or uint16.
        truth, prediction: (H, W) uint8.
    """
    scale = _PANEL_SIDE / max(truth.shape)
    height, width = (max(1, round(side * scale)) for side in truth.shape)
    palette = _palette(classes)
    columns = [
        ("image", _resized(_shown(image), height, width)),
        ("truth", palette[_resized_ids(truth, height, width)]),
        ("prediction", palette[_resized_ids(prediction, height, width)]),
    ]
    tiles = [_stacked([_line_of_text(name, width), _image(tile)]) for name, tile in columns]
    row = _side_by_side(tiles)
    entries = [_Entry(each.name, each.color, is_line=False) for each in classes]
    if not {each.id for each in classes}.issuperset(np.unique(truth).tolist()):
        entries.append(_Entry("ignored", NO_CLASS_COLOR, is_line=False))
    return _png(_stacked([_line_of_text(title, row.width), row, _legend(entries, row.width)]))


def panel_title(name: str, dice: float | None, measure: str = "image Dice") -> str:
    """Returns the title of a case; `dice` is None if neither mask has foreground."""
    return f"{name}: no foreground" if dice is None else f"{name}: {measure} {dice:.3f}"


class _Contour(NamedTuple):
    """The borders of the regions of a mask: class ids (H, W), and pixels of the line."""

    name: str
    class_ids: Pixels
    color: Color
    line: int


class _Entry(NamedTuple):
    text: str
    color: Color
    is_line: bool


def _line_styles(names: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns (colour, marker) of each line; validation is red, as in the reference."""
    markers = "os^Dv"
    if all(name.startswith("val_") for name in names):
        # There is no training line to distinguish them from.
        return [(f"C{i % 10}", markers[i % len(markers)]) for i in range(len(names))]
    styles = []
    counts = {"green": 0, "red": 0}
    for name in names:
        color = "red" if name.startswith("val_") else "green"
        styles.append((color, markers[counts[color] % len(markers)]))
        counts[color] += 1
    return styles


def _palette(classes: Sequence[ClassColor]) -> Pixels:
    """Returns the colour of every possible id: (256, 3) uint8."""
    palette = np.full((256, 3), NO_CLASS_COLOR, np.uint8)
    for each in classes:
        palette[each.id] = each.color
    return palette


def _shown(image: npt.NDArray[Any]) -> Pixels:
    """Returns `image` as (H, W, 3) uint8; 16-bit images are scaled to their own range.

    Of an image with other than 1 or 3 channels, the first is shown.
    """
    pixels = shown_channels(image[..., None] if image.ndim == 2 else image)
    if pixels.dtype != np.uint8:
        low, high = float(pixels.min()), float(pixels.max())
        pixels = ((pixels - low) * (255.0 / max(high - low, 1.0))).round().astype(np.uint8)
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3))


def _overlay_size(height: int, width: int) -> tuple[int, int]:
    smallest, largest = _OVERLAY_SIDES
    longest = max(height, width)
    scale = min(max(longest, smallest), largest) / longest
    return max(1, round(height * scale)), max(1, round(width * scale))


def _resized(pixels: Pixels, height: int, width: int) -> Pixels:
    import cv2

    shrinks = height < pixels.shape[0]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    resized = cv2.resize(np.ascontiguousarray(pixels), (width, height), interpolation=method)
    return np.asarray(resized, np.uint8)


def _resized_ids(class_ids: Pixels, height: int, width: int) -> Pixels:
    import cv2

    resized = cv2.resize(class_ids, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    return np.asarray(resized, np.uint8)


def _draw_two_tone(
    pixels: Pixels, contours: Sequence[_Contour], classes: Sequence[ClassColor]
) -> None:
    """Draws contours with a dark edge, which shows them on bright pixels of any colour, too."""
    for each in contours:
        _draw_contours(pixels, each.class_ids, classes, _EDGE_COLOR, each.line + 2 * _EDGE)
    for each in contours:
        _draw_contours(pixels, each.class_ids, classes, each.color, each.line)


def _draw_contours(
    pixels: Pixels, class_ids: Pixels, classes: Sequence[ClassColor], color: Color, line: int
) -> None:
    """Draws the border of each of `classes` into `pixels`, `line` pixels wide."""
    import cv2

    for each in classes:
        region = (class_ids == each.id).astype(np.uint8)
        contours, _ = cv2.findContours(region, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(pixels, contours, -1, color, line)


def _image(pixels: Pixels) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels))


def _legend(entries: Sequence[_Entry], width: int) -> Image.Image:
    """Returns a strip of swatches with names, `width` pixels wide, with as many rows as needed."""
    font, swatch, row_height = _font(), 22, 26
    places: list[tuple[int, int]] = []
    left, row = _MARGIN, 0
    for entry in entries:
        length = swatch + 6 + round(font.getlength(entry.text)) + 2 * _MARGIN
        if places and left + length > width:
            left, row = _MARGIN, row + 1
        places.append((left, row * row_height))
        left += length
    strip = Image.new("RGB", (width, (row + 1) * row_height), _PAPER)
    draw = ImageDraw.Draw(strip)
    for entry, (x, y) in zip(entries, places, strict=True):
        half = 2 if entry.is_line else 7
        box = (x, y + 13 - half, x + swatch, y + 13 + half)
        draw.rectangle(box, fill=entry.color, outline=None if entry.is_line else _INK)
        draw.text((x + swatch + 6, y + 13), entry.text, fill=_INK, font=font, anchor="lm")
    return strip


def _line_of_text(text: str, width: int) -> Image.Image:
    """Returns a strip with centred `text`; a text that is too long loses its start."""
    font = _font()
    shown = text
    while len(shown) > 1 and font.getlength(shown) > width - 2 * _MARGIN:
        # Cut the start: the end has the name of the case and its score.
        shown = "…" + shown[2:]
    strip = Image.new("RGB", (width, 28), _PAPER)
    draw = ImageDraw.Draw(strip)
    draw.text((width // 2, 14), shown, fill=_INK, font=font, anchor="mm")
    return strip


def _stacked(images: Sequence[Image.Image]) -> Image.Image:
    width = max(image.width for image in images)
    stacked = Image.new("RGB", (width, sum(image.height for image in images)), _PAPER)
    top = 0
    for image in images:
        stacked.paste(image, ((width - image.width) // 2, top))
        top += image.height
    return stacked


def _side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    width = sum(image.width + _MARGIN for image in images) + _MARGIN
    row = Image.new("RGB", (width, max(image.height for image in images)), _PAPER)
    left = _MARGIN
    for image in images:
        row.paste(image, (left, 0))
        left += image.width + _MARGIN
    return row


@cache
def _font() -> ImageFont.FreeTypeFont:
    # The font that matplotlib ships, so that an image looks the same on every machine. To import
    # matplotlib takes 0.2 s.
    spec = importlib.util.find_spec("matplotlib")
    folder = os.path.join(os.path.dirname(str(spec and spec.origin)), "mpl-data")
    if not os.path.isdir(folder):  # some packages of Linux keep its data elsewhere
        import matplotlib

        folder = matplotlib.get_data_path()
    return ImageFont.truetype(os.path.join(folder, "fonts", "ttf", "DejaVuSans.ttf"), 15)


def _png(image: Image.Image) -> bytes:
    if image.mode == "RGB":
        # Takes half the time of Pillow's writer: 60 instead of 133 ms for an overlay.
        return encode_png(np.asarray(image))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=False)
    return buffer.getvalue()
