"""Counts lesions: the connected regions of a mask, and which of them a prediction found.

A true and a predicted region match if their intersection over union is high enough; each region has
at most one match. So one large region that covers several lesions does not find them, and pieces
other than the matching one are false positives.

A true region of a few pixels is a tiny region: an artefact of drawing and resizing, not a lesion.
It is counted apart, and a predicted region that finds it is not a false positive.

Sources: matching, Baumgartner et al. 2021 (nnDetection), arXiv:2106.00817, with an IoU of 0.1 for
medical images; tiny regions, the lesion-wise scores of BraTS 2023, which leave out true regions
below a size (2 to 50 voxels by task). Pure functions on numpy arrays.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]

MIN_IOU = 0.1
MIN_PIXELS = 6  # of a lesion, at the network's size; smaller true regions are tiny regions


@dataclass(frozen=True)
class LesionCounts:
    """Regions of one class in one case."""

    num_true: int
    num_predicted: int
    num_found: int  # pairs of a true and a predicted region
    num_tiny_regions: int = (
        0  # true regions that are too small; the counts above exclude them and their pairs
    )

    @property
    def num_false_positives(self) -> int:
        """Predicted regions that match neither a lesion nor a tiny region."""
        return self.num_predicted - self.num_found


def label_regions(mask: Mask) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Returns the region 1, 2, ... of each pixel of `mask` (H, W), 0 outside, and the region sizes.

    Pixels that touch at a corner belong to one region. The sizes, (regions + 1,), start with the
    number of pixels outside.
    """
    import cv2

    num_labels, labels, stats, _ = cv2.connectedComponentsWithStats(
        mask.astype(np.uint8), connectivity=8
    )
    sizes = stats[:num_labels, cv2.CC_STAT_AREA].astype(np.int64)
    return np.asarray(labels, np.int32), sizes


def count_lesions(
    truth: Mask,
    prediction: Mask,
    *,
    min_iou: float = MIN_IOU,
    tiny_regions: Mask | None = None,
) -> LesionCounts:
    """Counts true, predicted and found regions of masks (H, W) bool.

    Pairs are matched in order of falling intersection over union, down to `min_iou`.

    Args:
        tiny_regions: (H, W) bool; a true region of such pixels only is a tiny region.
    """
    true, true_sizes = label_regions(truth)
    predicted, predicted_sizes = label_regions(prediction)
    both = truth & prediction
    # Only the pairs that touch: there may be thousands of regions.
    pairs, overlaps = np.unique(np.stack([true[both], predicted[both]]), axis=1, return_counts=True)
    unions = true_sizes[pairs[0]] + predicted_sizes[pairs[1]] - overlaps
    ious = overlaps / unions
    free_true, free_predicted = set(pairs[0]), set(pairs[1])
    lesions = truth if tiny_regions is None else truth & ~tiny_regions
    is_tiny = np.bincount(true[lesions], minlength=len(true_sizes)) == 0
    num_found = num_tiny_found = 0
    for index in np.argsort(-ious, kind="stable"):
        first, second = pairs[0][index], pairs[1][index]
        if ious[index] >= min_iou and first in free_true and second in free_predicted:
            free_true.remove(first)
            free_predicted.remove(second)
            num_found += not is_tiny[first]
            num_tiny_found += bool(is_tiny[first])
    num_tiny_regions = int(np.count_nonzero(is_tiny[1:]))
    return LesionCounts(
        num_true=len(true_sizes) - 1 - num_tiny_regions,
        num_predicted=len(predicted_sizes) - 1 - num_tiny_found,
        num_found=num_found,
        num_tiny_regions=num_tiny_regions,
    )


def without_small_regions(mask: Mask, min_pixels: int) -> Mask:
    """Returns `mask` (H, W) bool without its regions of fewer than `min_pixels` pixels."""
    if min_pixels <= 1:
        return mask
    labels, sizes = label_regions(mask)
    kept = sizes >= min_pixels
    kept[0] = False
    return kept[labels]
