"""Turns probabilities into masks, at network size and at the original size of the image."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from data_prep.imaging.geometry import Geometry, undo_geometry
from job.metrics.lesions import without_small_regions

Ids = npt.NDArray[np.uint8]


def class_ids(probabilities: np.ndarray) -> Ids:
    """Returns the most probable class (...) uint8 of (..., K); K = 1 is a sigmoid output."""
    if probabilities.shape[-1] == 1:
        return (probabilities[..., 0] > 0.5).astype(np.uint8)
    return np.argmax(probabilities, axis=-1).astype(np.uint8)


def class_ids_at_source(probabilities: np.ndarray, geometry: Geometry) -> Ids:
    """Returns the mask at the original size of the image: (h, w) uint8.

    Probabilities are enlarged before the class is chosen, so that contours stay smooth. This is
    done for one class at a time: an image of 100 megapixels takes 400 MB per class.

    Args:
        probabilities: (H, W, K) float32 at network size; K = 1 is a sigmoid output.
    """
    highest = undo_geometry(probabilities[..., 0], geometry, nearest=False)
    if probabilities.shape[-1] == 1:
        return (highest > 0.5).astype(np.uint8)
    ids = np.zeros(highest.shape, np.uint8)
    for class_id in range(1, probabilities.shape[-1]):
        plane = undo_geometry(probabilities[..., class_id], geometry, nearest=False)
        ids[plane > highest] = class_id
        np.maximum(highest, plane, out=highest)
    return ids


def without_small(ids: Ids, min_pixels: Sequence[int], scale: float = 1.0) -> Ids:
    """Returns a mask (H, W) without small regions.

    Args:
        min_pixels: of each class but 0, at network size; smaller regions become background.
        scale: pixels of this mask per pixel at network size.
    """
    result = ids.copy()
    for index, limit in enumerate(min_pixels):
        region = ids == index + 1
        result[region & ~without_small_regions(region, math.ceil(limit * scale))] = 0
    return result


def area_scale(geometry: Geometry) -> float:
    """Returns the number of source pixels per stored pixel."""
    part = geometry.part
    return part.height * part.width / (geometry.height * geometry.width)
