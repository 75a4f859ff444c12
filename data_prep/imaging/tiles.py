"""Computes the positions of tiles in a large image; prediction windows use the same rule.

Pure functions, without files or datasets.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from data_prep.imaging.geometry import Box, Geometry
from data_prep.imaging.pixels import Pixels


def starts(length: int, size: int, overlap: int) -> list[int]:
    """Returns the starts of evenly spaced tiles of `size` that cover 0..length.

    If `length` is at most `size`, one tile starts at 0. Otherwise the last tile ends at `length`.

    Args:
        overlap: minimum overlap of neighbours; less than `size`.
    """
    rest = length - size
    if rest <= 0:
        return [0]
    num_gaps = -(-rest // (size - overlap))
    return [round(i * rest / num_gaps) for i in range(num_gaps + 1)]


def count(whole: Geometry, height: int, width: int, overlap: int) -> int:
    """Returns the number of tiles that `cut` yields."""
    part = whole.part
    return len(starts(part.height, height, overlap)) * len(starts(part.width, width, overlap))


def cut(whole: Geometry, height: int, width: int, overlap: int) -> Iterator[tuple[Box, Geometry]]:
    """Yields the tiles of `height` x `width` of an image, row by row, without resizing.

    Args:
        whole: the cropped image at its own size, as `fit` returns it for the kind "tile".

    Yields:
        The tile's box in the cropped image, and its geometry, with its part of the source. An image
        smaller than a tile is placed at the tile's upper left.
    """
    part = whole.part
    rows, columns = min(height, part.height), min(width, part.width)
    for top in starts(part.height, height, overlap):
        for left in starts(part.width, width, overlap):
            column = part.width - left - columns if whole.is_flipped else left
            box = Box(part.top + top, part.left + column, rows, columns)
            source = whole.source_height, whole.source_width
            geometry = Geometry(whole.kind, *source, 0, 0, rows, columns, box, whole.is_flipped)
            yield Box(top, left, rows, columns), geometry


def around(tiles: Sequence[Geometry]) -> Geometry:
    """Returns the geometry of the cropped image from all of its tiles."""
    first, parts = tiles[0], [tile.part for tile in tiles]
    top, left = min(part.top for part in parts), min(part.left for part in parts)
    height = max(part.top + part.height for part in parts) - top
    width = max(part.left + part.width for part in parts) - left
    box = Box(top, left, height, width)
    source = first.source_height, first.source_width
    crop = None if box == Box(0, 0, *source) else box
    return Geometry(first.kind, *source, 0, 0, height, width, crop, first.is_flipped)


def joined(pieces: Sequence[Pixels], tiles: Sequence[Geometry]) -> Pixels:
    """Joins the tiles `pieces` to the cropped image (H, W[, C]); keeps the dtype.

    Overlapping tiles must have the same pixels there.
    """
    whole = around(tiles)
    result = np.zeros((whole.height, whole.width, *pieces[0].shape[2:]), pieces[0].dtype)
    for piece, tile in zip(pieces, tiles, strict=True):
        top, left = tile.part.top - whole.part.top, tile.part.left - whole.part.left
        if whole.is_flipped:
            left = whole.width - left - tile.width
        inside = slice(top, top + tile.height), slice(left, left + tile.width)
        result[inside] = piece[: tile.height, : tile.width]
    return result
