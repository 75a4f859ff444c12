"""Counts the regions of a mask that downscaling removes from the stored mask.

An evaluation on stored masks cannot count such a region as missed, so they are counted here. As in
an evaluation, a region is a set of pixels of one class that touch, also at a corner.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from data_prep.imaging.geometry import Geometry, kept_lines


@dataclasses.dataclass(frozen=True)
class RegionCounts:
    """The number of regions of one mask by class id; always 0 for class 0.

    Attributes:
        regions: regions of the source mask.
        lost: lost regions, without a pixel in the stored mask.
    """

    regions: tuple[int, ...]
    lost: tuple[int, ...]

    @property
    def is_emptied(self) -> bool:
        """Whether the source mask has foreground and the stored mask has none."""
        return any(self.regions) and self.regions == self.lost


def count_regions(mask: np.ndarray, geometry: Geometry, num_classes: int) -> RegionCounts | None:
    """Counts the regions of a source mask (H, W) uint8; returns None without downscaling.

    Reads only the box around the foreground: 0.2 ms for 1024x1024 pixels with a mass.
    """
    part = geometry.part
    if geometry.height >= part.height and geometry.width >= part.width:
        return None
    regions, lost = [0] * num_classes, [0] * num_classes
    for class_id, count, labels, corner in _labelled(mask, num_classes):
        regions[class_id] = count - 1
        lost[class_id] = int(np.count_nonzero(_is_lost(labels, count, corner, geometry)))
    return RegionCounts(tuple(regions), tuple(lost))


def regions_at(
    mask: np.ndarray, geometries: Sequence[Geometry], num_classes: int
) -> dict[int, tuple[np.ndarray, list[np.ndarray]]]:
    """Returns the areas of the regions of a source mask, and which regions each geometry loses.

    Args:
        mask: (H, W) uint8 class ids.

    Returns:
        By the id of each class but the first: (N,) areas in pixels, and for each geometry (N,)
        bool. Classes without a pixel may be missing.
    """
    found = {}
    for class_id, count, labels, corner in _labelled(mask, num_classes):
        areas = np.bincount(labels.reshape(-1), minlength=count)[1:]
        found[class_id] = areas, [_is_lost(labels, count, corner, each) for each in geometries]
    return found


def _labelled(
    mask: np.ndarray, num_classes: int
) -> Iterator[tuple[int, int, np.ndarray, tuple[int, int]]]:
    """Yields for each foreground class (id, number of labels, labels of the box, its corner).

    The box is around all foreground; its corner is (row, column). Label 0 is no region.
    """
    import cv2

    left, top, width, height = cv2.boundingRect(mask)
    box = mask[top : top + height, left : left + width]
    for class_id in range(1, num_classes if box.size else 0):
        inside = (box == class_id).view(np.uint8)
        count, labels = cv2.connectedComponents(inside, connectivity=8)
        yield class_id, count, labels, (top, left)


def _is_lost(
    labels: np.ndarray, count: int, corner: tuple[int, int], geometry: Geometry
) -> np.ndarray:
    """Returns for each label but 0 whether the geometry keeps none of its pixels, (N,) bool."""
    (top, left), (height, width) = corner, labels.shape
    rows, columns = kept_lines(geometry)
    rows = rows[(rows >= top) & (rows < top + height)] - top
    columns = columns[(columns >= left) & (columns < left + width)] - left
    kept = np.bincount(labels[np.ix_(rows, columns)].reshape(-1), minlength=count)
    return np.asarray(kept[1:] == 0)
