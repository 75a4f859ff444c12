"""Defines the mirrored images over which predictions can be averaged.

Imports no TensorFlow, so that options can name them.
"""

from typing import Literal

Flips = Literal["none", "horizontal", "vertical", "both"]


def mirrored_axes(flips: Flips) -> list[list[int]]:
    """Returns the axes of (B, H, W, C) to reverse for each prediction; [] for the first."""
    axes = {"none": [], "horizontal": [2], "vertical": [1], "both": [2, 1]}[flips]
    mirrored: list[list[int]] = [[]]
    for axis in axes:
        mirrored += [[*each, axis] for each in mirrored]
    return mirrored
