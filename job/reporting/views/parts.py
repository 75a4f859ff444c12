"""Builds the tables and figures of the report, and reads the files that they need."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_prep.shards.manifest import (
    GROUPS_BY_FILE,
    GROUPS_UNKNOWN,
    MANIFEST_NAME,
    Manifest,
    parse_manifest,
)
from flexunet.settings import read_yaml
from flexunet.storage import NotFound, ObjectStore, join_url
from job.data.folds import fold_words

# Images of cases get the best quality that keeps them below this size: the page stays small,
# whatever they show. Each try is the divisor of the sides and the quality.
_IMAGE_BYTES = 90_000
_JPEG_TRIES = ((1, 85), (1, 75), (1, 60), (1, 45), (2, 60), (2, 45), (3, 45), (4, 30))

Rgb = tuple[int, int, int]


@dataclass(frozen=True)
class Table:
    """The cells of a table; numbers are right-aligned, None is a dash.

    Attributes:
        colors: of classes by name, shown beside names in the first column.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    colors: Mapping[str, Rgb] = field(default_factory=dict)

    def is_number(self, column: int) -> bool:
        """Returns whether the cells of a column are numbers or empty."""
        cells = [row[column] for row in self.rows if row[column] is not None]
        return bool(cells) and all(isinstance(each, int | float) for each in cells)


def name_once(rows: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
    """Returns the rows of a table; the first cell is empty where it repeats the one above."""
    above = [None, *(row[0] for row in rows)]
    return [
        row if row[0] != name else ("", *row[1:]) for name, row in zip(above, rows, strict=False)
    ]


@dataclass(frozen=True)
class Figure:
    """An image embedded as a `data:` URL, with a caption; the source is None without a file."""

    source: str | None
    caption: str


def png_figure(png: bytes, caption: str) -> Figure:
    """Returns a figure with the unchanged image."""
    return Figure(_inline(png, "png"), caption)


def small_figure(png: bytes | None, caption: str, side: int) -> Figure:
    """Returns a figure with a reduced JPEG image, for a page with many images.

    Args:
        side: most pixels of the longer side.
    """
    from PIL import Image

    if png is None:
        return Figure(None, caption)
    image = Image.open(io.BytesIO(png)).convert("RGB")
    for part, quality in _JPEG_TRIES:
        image.thumbnail((side // part, side // part))
        buffer = io.BytesIO()
        # Colour at full resolution: contours are one or two pixels wide.
        image.save(buffer, format="JPEG", quality=quality, subsampling=0)
        if buffer.tell() <= _IMAGE_BYTES:
            break
    return Figure(_inline(buffer.getvalue(), "jpeg"), caption)


def _inline(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def number(value: float | None) -> str:
    """Formats a number for the page: integers in full, floats with 4 decimals."""
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def interval_words(measure: Mapping[str, Any]) -> str | None:
    """Returns the interval of a measure in words, None if it has none."""
    if measure["low"] is None:
        return None
    return f"{measure['low']:.4f} to {measure['high']:.4f}"


def cell_value(cell: str) -> float | str | None:
    """Returns a cell of a CSV as a number if it is one, or None if it is empty."""
    try:
        return float(cell) if cell else None
    except ValueError:
        return cell


def read_config(store: ObjectStore) -> dict[str, Any]:
    """Returns the config of a run, or an empty dict without one."""
    text = read_text(store, "config.yaml")
    return {} if text is None else read_yaml(text, join_url(store.url, "config.yaml"))


def read_dataset_copy(store: ObjectStore) -> Manifest | None:
    """Returns the run's copy of its dataset's manifest."""
    data = read_bytes(store, MANIFEST_NAME)
    return None if data is None else parse_manifest(data, join_url(store.url, MANIFEST_NAME))


def read_bytes(store: ObjectStore, name: str) -> bytes | None:
    """Returns an object of the run, or None if it is missing."""
    try:
        return store.get(name)
    except NotFound:
        return None


def read_text(store: ObjectStore, name: str) -> str | None:
    """Returns the text of a file of the run, or None if it is missing."""
    data = read_bytes(store, name)
    return None if data is None else data.decode(errors="replace")


def trained_fold(store: ObjectStore) -> str | None:
    """Returns which fold a run trains, in words, or None if it uses the splits of the dataset."""
    config = read_config(store)
    if config.get("fold") is None:
        return None
    fold, num_folds = int(config["fold"]), int(config["folds"])
    return fold_words((fold, num_folds)).capitalize()


def class_colors(manifest: Manifest | None) -> dict[str, Rgb]:
    """Returns the colour of each class by name; empty without a manifest."""
    return {} if manifest is None else {each.name: each.color for each in manifest.classes}


def missing_groups(manifest: Manifest | None) -> str | None:
    """Returns "by file" if no groups were given, "unknown" if that is not recorded, else None."""
    rules = {GROUPS_BY_FILE: "by file", GROUPS_UNKNOWN: "unknown"}
    return None if manifest is None else rules.get(manifest.group_rule)
