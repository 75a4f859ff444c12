"""Turns probabilities into masks, at network size and at the original size of the image.

The class of a pixel is decided by a threshold for each class but 0. With two classes, class 1 is
predicted where its probability is at least the threshold. With more, the probability of each class
with threshold t is multiplied by (1 - t) / t, that of class 0 is not, and the largest product wins;
the lower class wins a tie. So a threshold of 0.5 for every class predicts the most probable class.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_prep.imaging.geometry import Geometry, undo_geometry
from job.metrics.lesions import without_small_regions

Ids = npt.NDArray[np.uint8]

DEFAULT_THRESHOLD = 0.5
_VALUES = {  # in words, by their keys in summary.json and inference.json
    "thresholds": "thresholds",
    "min_region": "smallest regions",
    "temperature": "temperature",
}


@dataclass(frozen=True)
class Postprocessing:
    """How probabilities become masks, and how they are calibrated.

    Attributes:
        thresholds: of each class but 0; empty: 0.5 for each.
        min_pixels: of each class but 0, at network size; smaller regions become background. Empty:
            regions of every size are kept.
        temperature: by which logits are divided before probabilities are shown; 1: unchanged.
            Thresholds are for probabilities without it.
    """

    thresholds: tuple[float, ...] = ()
    min_pixels: tuple[int, ...] = ()
    temperature: float = 1.0

    @property
    def changes_masks(self) -> bool:
        """Whether masks differ from the most probable classes."""
        return not has_default_thresholds(self.thresholds) or any(self.min_pixels)

    def simplified(self) -> "Postprocessing":
        """Returns the same with empty tuples instead of defaults for all classes."""
        thresholds = () if has_default_thresholds(self.thresholds) else self.thresholds
        min_pixels = self.min_pixels if any(self.min_pixels) else ()
        return Postprocessing(thresholds, min_pixels, self.temperature)


def has_default_thresholds(thresholds: Sequence[float]) -> bool:
    """Returns whether the most probable class is predicted."""
    return all(each == DEFAULT_THRESHOLD for each in thresholds)


def class_weights(thresholds: Sequence[float]) -> npt.NDArray[np.float32]:
    """Returns the factors of the probabilities of all classes, (K,) float32, for K > 2."""
    return np.array([1.0, *((1 - each) / each for each in thresholds)], np.float32)


def class_ids(probabilities: np.ndarray, thresholds: Sequence[float] = ()) -> Ids:
    """Returns the class (...) uint8 of (..., K); K = 1 is a sigmoid output.

    Args:
        thresholds: of each class but 0; empty: the most probable class is predicted.
    """
    num_outputs = probabilities.shape[-1]
    if has_default_thresholds(thresholds):
        if num_outputs == 1:
            return (probabilities[..., 0] > DEFAULT_THRESHOLD).astype(np.uint8)
        return np.argmax(probabilities, axis=-1).astype(np.uint8)
    if num_outputs <= 2:
        return (probabilities[..., -1] >= np.float32(thresholds[0])).astype(np.uint8)
    return np.argmax(probabilities * class_weights(thresholds), axis=-1).astype(np.uint8)


def class_ids_at_source(
    probabilities: np.ndarray, geometry: Geometry, thresholds: Sequence[float] = ()
) -> Ids:
    """Returns the mask at the original size of the image: (h, w) uint8.

    Probabilities are enlarged before the class is chosen, so that contours stay smooth. This is
    done for one class at a time: an image of 100 megapixels takes 400 MB per class.

    Args:
        probabilities: (H, W, K) float32 at network size; K = 1 is a sigmoid output.
        thresholds: as for `class_ids`.
    """
    num_outputs, is_default = probabilities.shape[-1], has_default_thresholds(thresholds)
    if not is_default and num_outputs <= 2:
        plane = undo_geometry(probabilities[..., -1], geometry, nearest=False)
        return (plane >= np.float32(thresholds[0])).astype(np.uint8)
    highest = undo_geometry(probabilities[..., 0], geometry, nearest=False)
    if num_outputs == 1:
        return (highest > DEFAULT_THRESHOLD).astype(np.uint8)
    weights = None if is_default else class_weights(thresholds)
    ids = np.zeros(highest.shape, np.uint8)
    for class_id in range(1, num_outputs):
        plane = undo_geometry(probabilities[..., class_id], geometry, nearest=False)
        if weights is not None:
            plane *= weights[class_id]
        ids[plane > highest] = class_id
        np.maximum(highest, plane, out=highest)
    return ids


def masked(probabilities: np.ndarray, postprocessing: Postprocessing) -> Ids:
    """Returns the mask (H, W) of probabilities (H, W, K) at network size."""
    ids = class_ids(probabilities, postprocessing.thresholds)
    return without_small(ids, postprocessing.min_pixels)


def masked_at_source(
    probabilities: np.ndarray, geometry: Geometry, postprocessing: Postprocessing
) -> Ids:
    """Returns the mask (h, w) at the original size of probabilities (H, W, K)."""
    ids = class_ids_at_source(probabilities, geometry, postprocessing.thresholds)
    return without_small(ids, postprocessing.min_pixels, area_scale(geometry))


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


def given_words(given: Sequence[str]) -> str:
    """Returns the values that options replaced in words; `given` as in a record."""
    return " and ".join(_VALUES[name] for name in given)
