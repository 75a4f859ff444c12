"""Computes distances between the contours of two masks: percentile Hausdorff, surface Dice.

A contour is a set of elements, one for each 2x2 neighbourhood of pixels that are not all equal. The
position of an element is the corner that its four pixels share, its length that of the contour
there. The shares below are shares of this length. Distances are exact: a search tree of the
elements makes time and memory depend on the contours and not on the size of the image.

Source of contours and measures: Nikolov et al. 2018, arXiv:1809.04430. Pure functions on numpy
arrays; the caller decides which masks to compare, and how an empty mask counts in a mean.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
Values = npt.NDArray[np.float64]
Spacing = tuple[float, float]  # of rows and of columns, in the unit of the distances

_SLACK = 1e-9  # relative: a distance equal to the tolerance is within it, anywhere in the image


@dataclass(frozen=True)
class Contour:
    """The contour of a mask.

    Attributes:
        points: (N, 2) row and column of each element, in the unit of the spacing.
        lengths: (N,), in the same unit.
    """

    points: Values
    lengths: Values


@dataclass(frozen=True)
class Distances:
    """The distance of each element of two contours to the other contour, and its length."""

    from_truth: Values
    truth_lengths: Values
    from_prediction: Values
    prediction_lengths: Values


def contour_of(mask: Mask, spacing: Spacing, *, origin: tuple[int, int] = (0, 0)) -> Contour:
    """Returns the contour of `mask` (H, W) bool; pixels beyond it are outside.

    Args:
        spacing: size of a pixel (rows, columns).
        origin: row and column of the image where the mask starts.
    """
    height, width = mask.shape
    inside = np.zeros((height + 2, width + 2), np.uint8)
    inside[1:-1, 1:-1] = mask
    # One bit for each of the four pixels around a corner: (H + 1, W + 1), 0..15.
    pairs = inside[:, :-1] << 1
    pairs |= inside[:, 1:]
    corners = pairs[:-1] << 2
    corners |= pairs[1:]
    # 1..14: not all pixels are equal. 0 - 1 is 255.
    found = np.flatnonzero(corners - np.uint8(1) < 14)
    rows = found // (width + 1)
    columns = found - rows * (width + 1)
    points = np.empty((len(found), 2))
    np.multiply(rows + origin[0], spacing[0], out=points[:, 0])
    np.multiply(columns + origin[1], spacing[1], out=points[:, 1])
    return Contour(points, _element_lengths(spacing)[corners.ravel()[found]])


def contour_distances(
    truth: Mask, prediction: Mask, spacing: Spacing, *, origin: tuple[int, int] = (0, 0)
) -> Distances:
    """Returns the distances between the contours of two masks (H, W) bool, neither of them empty.

    Args:
        spacing: size of a pixel (rows, columns); the distances are in its unit.
        origin: row and column of the image where both masks start.

    Raises:
        ValueError: a mask is empty, or the shapes differ.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"truth {truth.shape} and prediction {prediction.shape} differ in shape")
    true, predicted = (contour_of(each, spacing, origin=origin) for each in (truth, prediction))
    if not len(true.points) or not len(predicted.points):
        raise ValueError("an empty mask has no contour and no distance to another one")
    from_truth = _distances_to(predicted.points, true.points)
    from_prediction = _distances_to(true.points, predicted.points)
    return Distances(from_truth, true.lengths, from_prediction, predicted.lengths)


def _distances_to(targets: Values, points: Values) -> Values:
    """Returns the distance (N,) of each of `points` (N, 2) to the nearest of `targets` (M, 2)."""
    from scipy.spatial import cKDTree

    # Distances do not depend on the form of the tree. This one takes half the time to build.
    tree = cKDTree(targets, compact_nodes=False, balanced_tree=False)
    return np.asarray(tree.query(points)[0])


def hausdorff(distances: Distances, percent: float) -> float:
    """Returns the larger of the two distances that contain `percent` of a contour.

    95 gives HD95. The percentile is of length: the smallest distance for which the elements up
    to it are at least that share of their contour.
    """
    return max(
        _percentile(distances.from_truth, distances.truth_lengths, percent),
        _percentile(distances.from_prediction, distances.prediction_lengths, percent),
    )


def surface_dice(distances: Distances, tolerance: float) -> float:
    """Returns the share of both contours that is within `tolerance` of the other one, 0 to 1.

    Also called normalized surface Dice (NSD).
    """
    # Positions are rounded products: at 0.1 mm, 10 pixels are 1 mm or slightly more, by column.
    limit = tolerance * (1 + _SLACK)
    near_truth = distances.truth_lengths[distances.from_truth <= limit].sum()
    near_prediction = distances.prediction_lengths[distances.from_prediction <= limit].sum()
    whole = distances.truth_lengths.sum() + distances.prediction_lengths.sum()
    return float((near_truth + near_prediction) / whole)


def _percentile(distances: Values, lengths: Values, percent: float) -> float:
    # Sort equal distances by length, so that rounding of the sum is repeatable.
    order = np.lexsort((lengths, distances))
    share = np.cumsum(lengths[order]) / lengths.sum()
    index = int(np.searchsorted(share, percent / 100))
    return float(distances[order[min(index, len(order) - 1)]])


def _element_lengths(spacing: Spacing) -> Values:
    """Returns the contour's length by neighbourhood, (16,): 8, 4, 2, 1 for the pixels in order.

    A single pixel, or all but one, cuts the corner; two opposite ones cut it twice.
    """
    rows, columns = spacing
    corner = 0.5 * math.hypot(rows, columns)
    lengths = np.full(16, corner)
    lengths[[0b0000, 0b1111]] = 0
    lengths[[0b0011, 0b1100]] = columns
    lengths[[0b0101, 0b1010]] = rows
    lengths[[0b0110, 0b1001]] = 2 * corner
    return lengths
