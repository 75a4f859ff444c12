"""Counts lesions: the connected regions of a mask, and which of them a prediction found.

A true and a predicted region match if their intersection over union is high enough; each region has
at most one match. So one large region that covers several lesions does not find them, and pieces
other than the matching one are false positives.

A true region of a few pixels is a tiny region: an artefact of drawing and resizing, not a lesion.
It is counted apart, and a predicted region that finds it is not a false positive.

Sources: matching, Baumgartner et al. 2021 (nnDetection), arXiv:2106.00817, with an IoU of 0.1 for
medical images; tiny regions, the lesion-wise scores of BraTS 2023, which leave out true regions
below a size (2 to 50 voxels by task). Pure functions on numpy arrays.

Regions are numbered in the order of their first 2x2 block of pixels, row by row. Between pairs that
fit equally well, this order decides. So a part of an image starts at an even row: its regions then
keep their order. The column has no effect, because regions of one block would touch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
Ids = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.int64]
Box = tuple[slice, slice]  # rows and columns of a part of an image

MIN_IOU = 0.1
MIN_PIXELS = 6  # of a lesion, at the network's size; smaller true regions are tiny regions

_MAX_TABLE = 2**20  # entries of a table of all pairs of regions: 8 MB


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

    mask = np.ascontiguousarray(mask)
    num_labels, found = cv2.connectedComponents(mask.view(np.uint8), connectivity=8)
    labels = np.asarray(found, np.int32)
    # OpenCV's own statistics take four times as long as its labels. Count no pixel outside: one
    # counter that is used all the time is slow.
    inside = labels[mask]
    sizes = np.bincount(inside, minlength=num_labels)
    sizes[0] = labels.size - inside.size
    return labels, sizes


def box_of(mask: Mask | Ids) -> Box | None:
    """Returns the part of `mask` (H, W), bool or uint8, with all pixels but 0; None if all are 0.

    The part starts at an even row, so that its regions keep their order.
    """
    import cv2

    left, top, width, height = cv2.boundingRect(np.ascontiguousarray(mask).view(np.uint8))
    if not width:
        return None
    return slice(top - top % 2, top + height), slice(left, left + width)


@dataclass(frozen=True)
class TrueRegions:
    """The regions of a true mask.

    Attributes:
        box: a part of the image with all pixels; None if there are none.
        rows, columns, labels: (N,) of the pixels; the labels are 1, 2, ...
        sizes: (regions + 1,) pixels of each region, from label 1; the first value has no meaning.
        is_tiny: (regions + 1,) bool, whether a region is a tiny region; the first value is False.
    """

    box: Box | None
    rows: Numbers
    columns: Numbers
    labels: Numbers
    sizes: Numbers
    is_tiny: Mask

    @property
    def num_tiny(self) -> int:
        """The number of tiny regions."""
        return int(np.count_nonzero(self.is_tiny))

    @property
    def num_lesions(self) -> int:
        """The number of other regions."""
        return len(self.sizes) - 1 - self.num_tiny


def true_regions(
    truth: Mask, *, tiny_regions: Mask | None = None, min_pixels: int = 1
) -> TrueRegions:
    """Returns the regions of `truth` (H, W) bool.

    Args:
        tiny_regions: (H, W) bool; a region of such pixels only is a tiny region.
        min_pixels: a region of fewer pixels is a tiny region, too.
    """
    box = box_of(truth)
    if box is None:
        nothing = np.zeros(0, np.int64)
        return TrueRegions(
            None, nothing, nothing, nothing, np.zeros(1, np.int64), np.zeros(1, bool)
        )
    part = np.ascontiguousarray(truth[box])
    regions, sizes = label_regions(part)
    labels = regions[part].astype(np.int64)
    pixels = np.flatnonzero(part)
    rows = pixels // part.shape[1]
    columns = pixels - rows * part.shape[1]
    rows += box[0].start
    columns += box[1].start
    is_tiny = sizes < min_pixels
    if tiny_regions is not None:
        large = labels[~tiny_regions[rows, columns]]
        is_tiny |= np.bincount(large, minlength=len(sizes)) == 0
    is_tiny[0] = False
    return TrueRegions(box, rows, columns, labels, sizes, is_tiny)


def regions_of_classes(
    truth: Ids, num_classes: int, *, tiny_regions: Mask | None = None, min_pixels: int = 1
) -> tuple[TrueRegions, ...]:
    """Returns the regions of each foreground class (1, 2, ...) of `truth` (H, W) class ids.

    Args:
        tiny_regions, min_pixels: as in `true_regions`.
    """
    return tuple(
        true_regions(truth == class_id, tiny_regions=tiny_regions, min_pixels=min_pixels)
        for class_id in range(1, num_classes)
    )


def tiny_pixels(regions: Sequence[TrueRegions], shape: tuple[int, int]) -> Mask:
    """Returns the pixels (H, W) bool of the tiny regions of all classes.

    Args:
        shape: (H, W) of the truth.
    """
    result = np.zeros(shape, bool)
    for each in regions:
        is_tiny = each.is_tiny[each.labels]
        result[each.rows[is_tiny], each.columns[is_tiny]] = True
    return result


@dataclass(frozen=True)
class Matches:
    """The regions of several predictions of one case, (N,) int64 each.

    Attributes:
        num_predicted: regions that match no tiny region.
        num_found: pairs of a lesion and a predicted region.
        tp: pixels in the truth and in the prediction.
    """

    num_predicted: Numbers
    num_found: Numbers
    tp: Numbers


def match_regions(
    truth: TrueRegions,
    predictions: Mask,
    *,
    origin: tuple[int, int] = (0, 0),
    min_iou: float = MIN_IOU,
) -> Matches:
    """Matches true regions with those of each of several predictions.

    Pairs are matched in order of falling intersection over union, down to `min_iou`.

    Args:
        predictions: (N, H, W) bool, of a part of the image with all predicted pixels.
        origin: even row, and column, where the part starts.
    """
    number = len(predictions)
    labels, sizes, ends = _label_predictions(predictions)
    labels_there = _labels_in_truth(truth, labels, origin)
    is_common = labels_there[1] > 0
    codes = (labels_there[1] + labels_there[0] * len(sizes))[is_common]
    pairs, overlaps = _count_codes(codes, len(truth.sizes) * len(sizes))
    true, predicted = np.divmod(pairs, len(sizes))
    ious = overlaps / (truth.sizes[true] + sizes[predicted] - overlaps)
    # The pairs are in order of true and predicted region: the stable sort keeps it among equals.
    order = np.argsort(-ious, kind="stable")
    order = order[ious[order] >= min_iou]
    true, predicted = true[order], predicted[order]
    index = np.searchsorted(ends, predicted)  # of the prediction
    matched = _matched(index * len(truth.sizes) + true, predicted)
    is_tiny = truth.is_tiny[true]
    num_tiny_found = np.bincount(index[matched & is_tiny], minlength=number)
    return Matches(
        num_predicted=np.diff(ends, prepend=0) - num_tiny_found,
        num_found=np.bincount(index[matched & ~is_tiny], minlength=number),
        tp=np.count_nonzero(is_common, axis=1),
    )


def _label_predictions(predictions: Mask) -> tuple[npt.NDArray[np.int32], Numbers, Numbers]:
    """Labels all predictions (N, H, W) together: fewer calls, and one range of labels.

    Returns:
        The labels (N, H or more, W), the sizes (labels,), and the last label (N,) of each.
    """
    number, height, width = predictions.shape
    # An empty row keeps predictions apart, and each starts at an even row.
    padded = height if number == 1 else height + 2 - height % 2
    stack = np.zeros((number, padded, width), bool)
    stack[:, :height] = predictions
    labels, sizes = label_regions(stack.reshape(number * padded, width))
    num_pixels = np.array([np.count_nonzero(each) for each in predictions])
    ends = np.searchsorted(np.cumsum(sizes[1:]), np.cumsum(num_pixels), side="right")
    return labels.reshape(stack.shape), sizes, ends


def _labels_in_truth(
    truth: TrueRegions, labels: npt.NDArray[np.int32], origin: tuple[int, int]
) -> tuple[Numbers, npt.NDArray[np.int32]]:
    """Returns the true labels (pixels,) and the predicted ones (N, pixels) of the same pixels.

    The pixels are those of the truth in `labels` (N, H, W), a part of the image.
    """
    number, height, width = labels.shape
    rows, columns, true = truth.rows - origin[0], truth.columns - origin[1], truth.labels
    if truth.box and not _contains(origin, (height, width), truth.box):
        is_inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        rows, columns, true = rows[is_inside], columns[is_inside], true[is_inside]
    rows *= width
    rows += columns
    return true, labels.reshape(number, -1).take(rows, axis=1)


def _contains(origin: tuple[int, int], shape: tuple[int, int], box: Box) -> bool:
    """Returns whether the part of an image from `origin` on, of `shape`, contains `box`."""
    return all(
        first <= inner.start and inner.stop <= first + length
        for first, length, inner in zip(origin, shape, box, strict=True)
    )


def _count_codes(codes: Numbers, num_codes: int) -> tuple[Numbers, Numbers]:
    """Returns the codes that occur, rising, and how often; codes are below `num_codes`."""
    # There may be thousands of regions of both kinds.
    if num_codes > _MAX_TABLE:
        return np.unique(codes, return_counts=True)
    counts = np.bincount(codes)
    found = np.flatnonzero(counts)
    return found, counts[found]


def _matched(true: Numbers, predicted: Numbers) -> Mask:
    """Returns which pairs (N,) match: the first ones first, and each number at most once."""
    # Most pairs have no rival.
    has_rival = (np.bincount(true)[true] > 1) | (np.bincount(predicted)[predicted] > 1)
    matched = ~has_rival
    taken_true, taken_predicted = set[int](), set[int]()
    for index in np.flatnonzero(has_rival).tolist():
        first, second = int(true[index]), int(predicted[index])
        if first not in taken_true and second not in taken_predicted:
            taken_true.add(first)
            taken_predicted.add(second)
            matched[index] = True
    return matched


def count_lesions(
    truth: TrueRegions,
    prediction: Mask,
    *,
    origin: tuple[int, int] = (0, 0),
    min_iou: float = MIN_IOU,
) -> LesionCounts:
    """Counts true, predicted and found regions.

    Args:
        prediction: (H, W) bool.
        origin, min_iou: as in `match_regions`.
    """
    matches = match_regions(truth, prediction[np.newaxis], origin=origin, min_iou=min_iou)
    return LesionCounts(
        num_true=truth.num_lesions,
        num_predicted=int(matches.num_predicted[0]),
        num_found=int(matches.num_found[0]),
        num_tiny_regions=truth.num_tiny,
    )


def without_small_regions(mask: Mask, min_pixels: int) -> Mask:
    """Returns `mask` (H, W) bool without its regions of fewer than `min_pixels` pixels."""
    if min_pixels <= 1:
        return mask
    labels, sizes = label_regions(mask)
    kept = sizes >= min_pixels
    kept[0] = False
    return kept[labels]
