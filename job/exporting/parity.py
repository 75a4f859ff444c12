"""Compares what an exported file computes with what `infer` computes from the checkpoint."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flexunet.errors import ContentError
from job.postprocessing.masks import (
    DEFAULT_THRESHOLD,
    class_ids,
    class_weights,
    has_default_thresholds,
)

# Stored pixels (B, H, W, C) -> probabilities (B, H, W, K) float32, class ids (B, H, W) uint8.
Predict = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]

# Names of the input and the outputs of every exported model.
INPUT, PROBABILITIES, CLASS_IDS = "image", "probabilities", "class_ids"

PROBABILITY_LIMIT = 1e-5  # largest allowed difference of two probabilities
TIE_MARGIN = 1e-4  # the class of a pixel is compared if its two best classes differ by more


@dataclass(frozen=True)
class Expected:
    """A batch, and what `infer` computes for it.

    Attributes:
        pixels: (B, H, W, C), as the dataset stores them.
        probabilities: (B, H, W, K) float32.
    """

    pixels: np.ndarray
    probabilities: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Parity:
    """How far an exported file agrees with `infer`.

    Attributes:
        max_probability_difference: the largest one, over all pixels and classes.
        num_pixels: pixels of all batches.
        num_ties: pixels whose class was not compared, because two classes are equally probable.
        num_other_ids: compared pixels that have another class.
    """

    max_probability_difference: float
    num_pixels: int
    num_ties: int
    num_other_ids: int

    @property
    def has_passed(self) -> bool:
        """Whether the file computes the same as `infer`; a NaN never does."""
        return self.max_probability_difference <= PROBABILITY_LIMIT and not self.num_other_ids


def compare(predict: Predict, batches: Sequence[Expected], thresholds: Sequence[float]) -> Parity:
    """Returns how far `predict` agrees with the expected probabilities and their classes."""
    differences, num_pixels, num_ties, num_other_ids = [0.0], 0, 0, 0
    for batch in batches:
        probabilities, ids = predict(batch.pixels)
        if probabilities.shape != batch.probabilities.shape or ids.shape != ids_shape(batch):
            raise ContentError(
                f"the exported model returns probabilities of shape {probabilities.shape} and "
                f"classes of shape {ids.shape} for images of shape {batch.pixels.shape}"
            )
        differences.append(float(np.abs(probabilities - batch.probabilities).max()))
        is_clear = _margins(batch.probabilities, thresholds) > TIE_MARGIN
        is_other = ids != class_ids(batch.probabilities, thresholds)
        num_pixels += ids.size
        num_ties += int(np.count_nonzero(~is_clear))
        num_other_ids += int(np.count_nonzero(is_other & is_clear))
    return Parity(float(np.max(differences)), num_pixels, num_ties, num_other_ids)


def ids_shape(batch: Expected) -> tuple[int, ...]:
    """Returns the shape (B, H, W) of the classes of a batch."""
    return batch.probabilities.shape[:-1]


def _margins(
    probabilities: npt.NDArray[np.float32], thresholds: Sequence[float]
) -> npt.NDArray[np.float32]:
    """Returns by how much the best class of each pixel is ahead of the second, (B, H, W)."""
    if probabilities.shape[-1] <= 2:
        threshold = thresholds[0] if len(thresholds) else DEFAULT_THRESHOLD
        margins: npt.NDArray[np.float32] = 2 * np.abs(probabilities[..., -1] - threshold)
        return margins
    if not has_default_thresholds(thresholds):
        probabilities = probabilities * class_weights(thresholds)
    best = np.partition(probabilities, -2, axis=-1)
    margins = best[..., -1] - best[..., -2]
    return margins
