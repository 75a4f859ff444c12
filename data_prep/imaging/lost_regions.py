"""Counts the regions of a mask that downscaling removes from the stored mask.

An evaluation on stored masks cannot count such a region as missed, so they are counted here. As in
an evaluation, a region is a set of pixels of one class that touch, also at a corner.
"""

import dataclasses

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
    import cv2

    part = geometry.part
    if geometry.height >= part.height and geometry.width >= part.width:
        return None
    left, top, width, height = cv2.boundingRect(mask)
    rows, columns = kept_lines(geometry)
    rows = rows[(rows >= top) & (rows < top + height)] - top
    columns = columns[(columns >= left) & (columns < left + width)] - left
    box = mask[top : top + height, left : left + width]
    regions, lost = [0] * num_classes, [0] * num_classes
    for class_id in range(1, num_classes if box.size else 0):
        count, labels = cv2.connectedComponents((box == class_id).view(np.uint8), connectivity=8)
        kept = np.bincount(labels[np.ix_(rows, columns)].reshape(-1), minlength=count)
        regions[class_id] = count - 1
        lost[class_id] = int(np.count_nonzero(kept[1:] == 0))
    return RegionCounts(tuple(regions), tuple(lost))
