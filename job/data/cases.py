"""Groups the samples of a split into cases: images stored whole or as tiles."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.imaging.geometry import Geometry
from data_prep.imaging.tiles import around, joined
from job.data.dataset import Split
from job.data.reader import RecordReader, read_sample


@dataclass(frozen=True)
class Case:
    """Describes a case: one image, stored as one sample or as several tiles.

    Attributes:
        geometry: position of the source image in the pixels of `read_case`.
        spacing: mm (rows, columns) of a source pixel, if known.
        samples: indices in the split.
        tiles: geometries of the samples, if they are tiles to join.
    """

    id: str
    filename: str
    group: str
    geometry: Geometry
    spacing: tuple[float, float] | None
    samples: tuple[int, ...]
    tiles: tuple[Geometry, ...] = ()


def cases_of(split: Split, *, is_by_tile: bool = False) -> tuple[Case, ...]:
    """Returns the cases of `split`, in the order of their first samples.

    Args:
        is_by_tile: make each tile a case.
    """
    members: dict[str, list[int]] = {}
    for index, (sample, case) in enumerate(zip(split.ids, split.source_images, strict=True)):
        is_tile = case is not None and not is_by_tile
        members.setdefault(str(case) if is_tile else sample, []).append(index)
    return tuple(_case(split, name, found, is_by_tile) for name, found in members.items())


def _case(split: Split, name: str, samples: Sequence[int], is_by_tile: bool) -> Case:
    first = samples[0]
    tiles: tuple[Geometry, ...] = ()
    geometry = split.geometries[first]
    if split.source_images[first] is not None and is_by_tile:
        size = geometry.height, geometry.width
        geometry = Geometry(geometry.kind, *size, 0, 0, *size)
    elif split.source_images[first] is not None:
        tiles = tuple(split.geometries[index] for index in samples)
        geometry = around(tiles)
    return Case(
        id=name,
        filename=split.filenames[first],
        group=split.groups[first],
        geometry=geometry,
        spacing=split.spacings[first],
        samples=tuple(samples),
        tiles=tiles,
    )


def read_case(reader: RecordReader, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Returns image (H, W, C) and mask (H, W) uint8 of a case; joins its tiles."""
    read = [read_sample(reader, index) for index in case.samples]
    if not case.tiles:
        return read[0]
    image, mask = (joined(pieces, case.tiles) for pieces in zip(*read, strict=True))
    return image, mask
