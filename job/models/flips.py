"""Names the ways to mirror pictures over which a network may be averaged, and their axes.

Apart from the networks, so that options can name them without TensorFlow.
"""

from typing import Literal

Flips = Literal["none", "horizontal", "vertical", "both"]


def mirrored_axes(flips: Flips) -> list[list[int]]:
    """Returns the axes of (B, H, W, C) to reverse for each prediction; none for the first."""
    axes = {"none": [], "horizontal": [2], "vertical": [1], "both": [2, 1]}[flips]
    mirrored: list[list[int]] = [[]]
    for axis in axes:
        mirrored += [[*each, axis] for each in mirrored]
    return mirrored
