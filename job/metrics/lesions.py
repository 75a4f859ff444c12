"""Lesions: the connected regions of a mask, and which of them a prediction has found.

A true and a predicted region are the same lesion when their intersection over union is high
enough; each belongs to one at most. So one large region that covers several lesions does not find
them, and pieces beside the one that fits are false positives.

A true region of a few pixels, a speck, is what drawing and resizing leave rather than a lesion. It
is counted apart, and a predicted region that finds it is no false positive.

Sources: of the matching, Baumgartner et al. 2021 (nnDetection), arXiv:2106.00817, which takes an
IoU of 0.1 for medical pictures; of specks, the lesion-wise scores of BraTS 2023, which leave out
true regions below a size (2 to 50 voxels by task). Pure functions on numpy arrays.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]

MIN_IOU = 0.1
MIN_PIXELS = 6  # of a lesion, at the network's size; smaller true regions are specks


@dataclass(frozen=True)
class LesionCounts:
    """Regions of one class in one case."""

    num_true: int
    num_predicted: int
    num_found: int  # pairs of a true and a predicted region
    num_tiny_regions: int = (
        0  # true regions that are too small; neither they nor their pairs are above
    )

    @property
    def num_false_positives(self) -> int:
        """Predicted regions that are no lesion, and no speck."""
        return self.num_predicted - self.num_found


def label_regions(mask: Mask) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Returns the region 1, 2, ... of each pixel of `mask` (H, W), 0 outside, and their pixels.

    Pixels that touch at a corner are of one region. The second array is (regions + 1,): pixels
    outside first.
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
    """Returns how many regions there are and how many are found, for masks (H, W) bool.

    Pairs are taken by falling intersection over union, as long as it is at least `min_iou`.

    Args:
        tiny_regions: (H, W) bool; a true region that is all of such pixels is a speck.
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
