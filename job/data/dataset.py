"""Opens a committed dataset: reads and checks its manifest and sample table."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.imaging.geometry import Box, Geometry
from data_prep.shards.manifest import Manifest, read_manifest
from data_prep.shards.sample_table import read_samples
from flexunet.errors import ContentError, UsageError
from flexunet.settings import read_yaml
from flexunet.storage import NotFound, ObjectStore, open_store

_SIDES = ("top", "left", "height", "width")


@dataclass(frozen=True)
class Split:
    """Holds the samples of one split, in the order of the dataset."""

    name: str
    ids: tuple[str, ...]
    filenames: tuple[str, ...]
    groups: tuple[str, ...]
    shards: tuple[str, ...]  # of each sample
    offsets: np.ndarray  # (N,) int64, bytes
    lengths: np.ndarray  # (N,) int64, bytes
    geometries: tuple[Geometry, ...]  # where each source image is in the stored one
    spacings: tuple[tuple[float, float] | None, ...]  # mm (rows, columns) of a source pixel
    source_images: tuple[str | None, ...]  # of a tile, the id of its image
    has_foreground: np.ndarray  # (N,) bool: a pixel of another class than 0

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Dataset:
    """Holds a committed dataset."""

    url: str
    manifest: Manifest
    digest: str  # sha256 of the manifest
    splits: dict[str, Split]
    fold: tuple[int, int] | None = None  # (fold, number of folds) if the splits are those of a fold

    def split(self, name: str) -> Split:
        """Returns the split `name`.

        Raises:
            UsageError: the split is missing or empty.
        """
        split = self.splits.get(name)
        if split is None or not len(split):
            present = [key for key, value in self.splits.items() if len(value)]
            raise UsageError(
                f"{self.url}: split {name!r} has no samples; the dataset has {', '.join(present)}"
            )
        return split


def open_dataset(url: str) -> Dataset:
    """Returns the dataset at `url` with its tables read and checked; opens no shard.

    Raises:
        UsageError: there is no dataset; a run is not one, though it has a copy of the manifest.
        ContentError: a table is missing or damaged.
    """
    store = open_store(url)
    manifest, digest = read_manifest(store)
    try:
        table = read_samples(store, manifest)
    except ContentError:
        _refuse_run(store)
        raise
    columns = {
        name: table.column(name).to_numpy()
        for name in ("split", "id", "filename", "group", "shard", "offset", "length", "picture")
    }
    columns["foreground"] = np.array(
        [any(counts[1:]) for counts in table.column("pixels_per_class").to_pylist()], bool
    )
    geometries_and_spacings = _geometries_and_spacings(table)
    names = [str(name) for name in np.unique(columns["split"])]
    splits = {name: _split(name, columns, geometries_and_spacings) for name in names}
    return Dataset(url=store.url, manifest=manifest, digest=digest, splits=splits)


def _refuse_run(store: ObjectStore) -> None:
    """Refuses the folder of a run; names the dataset of the run if its config is readable.

    Raises:
        UsageError: it is a run.
    """
    if store.stat("identity.json") is None:
        return
    try:
        config = read_yaml(store.get("config.yaml").decode(), "config.yaml")
    except (NotFound, UnicodeDecodeError, UsageError):
        return
    data = config.get("data")
    remedy = f"its dataset is {data}" if isinstance(data, str) else "give the dataset of the run"
    raise UsageError(f"{store.url} is a run, not a dataset; {remedy}")


def _geometries_and_spacings(table: Any) -> list[tuple[Geometry, tuple[float, float] | None]]:
    """Returns the geometry and, if known, the spacing of each sample."""
    names = [*("source_height", "source_width"), *_SIDES]
    columns = ["geometry_kind", *names, *(f"crop_{side}" for side in _SIDES), "is_flipped"]
    rows = table.select([*columns, "spacing_y_mm", "spacing_x_mm"]).to_pylist()
    return [
        (_geometry_of(row), _spacing_of(row["spacing_y_mm"], row["spacing_x_mm"])) for row in rows
    ]


def _geometry_of(row: Mapping[str, Any]) -> Geometry:
    crop = {side: row[f"crop_{side}"] for side in _SIDES}
    return Geometry(
        kind=row["geometry_kind"],
        source_height=row["source_height"],
        source_width=row["source_width"],
        top=row["top"],
        left=row["left"],
        height=row["height"],
        width=row["width"],
        crop=None if None in crop.values() else Box(**crop),
        is_flipped=bool(row["is_flipped"]),
    )


def _spacing_of(y: float | None, x: float | None) -> tuple[float, float] | None:
    return None if y is None or x is None else (y, x)


def _split(
    name: str,
    columns: dict[str, np.ndarray],
    geometries_and_spacings: list[tuple[Geometry, tuple[float, float] | None]],
) -> Split:
    rows = columns["split"] == name
    chosen = [
        each for each, is_chosen in zip(geometries_and_spacings, rows, strict=True) if is_chosen
    ]
    return Split(
        name=name,
        ids=tuple(columns["id"][rows]),
        filenames=tuple(columns["filename"][rows]),
        groups=tuple(columns["group"][rows]),
        shards=tuple(columns["shard"][rows]),
        offsets=columns["offset"][rows],
        lengths=columns["length"][rows],
        geometries=tuple(geometry for geometry, _ in chosen),
        spacings=tuple(spacing for _, spacing in chosen),
        source_images=tuple(columns["picture"][rows]),
        has_foreground=columns["foreground"][rows],
    )
