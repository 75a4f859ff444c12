"""Builds the tables and figures that the report's templates show, and reads the files they need."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
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

_IMAGE_SIDE = 640  # pixels; pictures of cases are made smaller, so that the page stays small
_JPEG_QUALITY = 85


@dataclass(frozen=True)
class Table:
    """Cells of a table; numbers stand at the right, None is a dash."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Figure:
    """A picture inside of the page, a `data:` URL; None where its file is missing."""

    source: str | None
    caption: str


def png_figure(png: bytes, caption: str) -> Figure:
    """Returns a picture as it is."""
    return Figure(_inline(png, "png"), caption)


def small_figure(png: bytes | None, caption: str) -> Figure:
    """Returns a picture small enough for a page that holds many."""
    from PIL import Image

    if png is None:
        return Figure(None, caption)
    image = Image.open(io.BytesIO(png)).convert("RGB")
    image.thumbnail((_IMAGE_SIDE, _IMAGE_SIDE))
    buffer = io.BytesIO()
    # Colour at full resolution: contours are one or two pixels wide.
    image.save(buffer, format="JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return Figure(_inline(buffer.getvalue(), "jpeg"), caption)


def _inline(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def number(value: float | None) -> str:
    """Returns a number as the page shows it: whole ones in full, others with 4 decimals."""
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def cell_value(cell: str) -> float | str | None:
    """Returns a cell of a CSV as a number where it is one, None where it is empty."""
    try:
        return float(cell) if cell else None
    except ValueError:
        return cell


def read_config(store: ObjectStore) -> dict[str, Any]:
    """Returns the config of a run, empty where there is none."""
    text = read_text(store, "config.yaml")
    return {} if text is None else read_yaml(text, join_url(store.url, "config.yaml"))


def read_dataset_copy(store: ObjectStore) -> Manifest | None:
    """Returns the run's copy of its dataset's manifest."""
    data = read_bytes(store, MANIFEST_NAME)
    return None if data is None else parse_manifest(data, join_url(store.url, MANIFEST_NAME))


def read_bytes(store: ObjectStore, name: str) -> bytes | None:
    """Returns an object of the run, None where there is none."""
    try:
        return store.get(name)
    except NotFound:
        return None


def read_text(store: ObjectStore, name: str) -> str | None:
    """Returns a file of the run, None where there is none."""
    data = read_bytes(store, name)
    return None if data is None else data.decode(errors="replace")


def trained_fold(store: ObjectStore) -> str | None:
    """Returns which fold a run trains, in words; None: the dataset's own splits."""
    config = read_config(store)
    if config.get("fold") is None:
        return None
    fold = fold_words((int(config["fold"]), int(config["folds"])))
    return fold.capitalize()


def missing_groups(manifest: Manifest | None) -> str | None:
    """Returns "by file" where no groups were given, "unknown" where that is not recorded."""
    rules = {GROUPS_BY_FILE: "by file", GROUPS_UNKNOWN: "unknown"}
    return None if manifest is None else rules.get(manifest.group_rule)
