"""Predicts images of any size in overlapping windows of network size.

An image of network size is predicted at once. Windows are added with Gaussian weights, because a
window is least reliable at its border. The caller passes the network as a function.

Source of the weights, sigma an eighth of a window: nnU-Net, Isensee et al. 2021,
doi:10.1038/s41592-020-01008-z.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.imaging.tiles import starts
from flexunet.progress import Heartbeat, no_heartbeat

Probabilities = npt.NDArray[np.float32]
# Stored pixels (B, H, W, C) -> (B, H, W, K) float32, as a tensor; K = 1 is a sigmoid output.
Step = Callable[[np.ndarray], Any]

_SIGMA = 1 / 8  # of the side of a window


@dataclass(frozen=True)
class Windows:
    """The windows into which images are cut.

    Attributes:
        height, width: of a window, pixels.
        overlap: of windows, minimum, pixels.
        batch_size: windows per batch; a smaller last batch is filled up.
    """

    height: int
    width: int
    overlap: int
    batch_size: int


def window_weights(length: int, size: int, begins: Sequence[int]) -> npt.NDArray[np.float64]:
    """Returns the weights of windows along one axis, (windows, size); at each pixel they add to 1.

    Args:
        length: of the image, pixels.
        begins: starts of the windows, which cover the image.
    """
    offsets = (np.arange(size) - (size - 1) / 2) / (size * _SIGMA)
    bell = np.exp(-(offsets**2) / 2)
    total = np.zeros(max(length, size))
    for begin in begins:
        total[begin : begin + size] += bell
    return np.stack([bell / total[begin : begin + size] for begin in begins])


def slide(
    image: np.ndarray, step: Step, windows: Windows, *, heartbeat: Heartbeat = no_heartbeat
) -> Iterator[Probabilities]:
    """Yields the probabilities of `image` as bands of rows, top to bottom: (h, W, K) float32 each.

    A band is at most as high as a window, so memory does not depend on the height of the image,
    except for the image itself. An image smaller than a window is filled up with 0.

    Args:
        image: (H, W, C) stored pixels.
        heartbeat: called for every batch.
    """
    height, width, batch_size = windows.height, windows.width, windows.batch_size
    num_rows, num_columns = image.shape[:2]
    tops = starts(num_rows, height, windows.overlap)
    lefts = starts(num_columns, width, windows.overlap)
    down, right = (
        window_weights(num_rows, height, tops).astype(np.float32),
        window_weights(num_columns, width, lefts).astype(np.float32),
    )
    sums: Probabilities | None = None
    for i, top in enumerate(tops):
        for first in range(0, len(lefts), batch_size):
            part = lefts[first : first + batch_size]
            pieces = [_window(image, top, left, height, width) for left in part]
            pieces += pieces[:1] * (batch_size - len(part))
            found = np.asarray(step(np.stack(pieces)), np.float32)
            heartbeat()
            if sums is None:
                sums = np.zeros((height, max(num_columns, width), found.shape[-1]), np.float32)
            for j, left in enumerate(part):
                weights = down[i][:, np.newaxis] * right[first + j]
                sums[:, left : left + width] += weights[..., np.newaxis] * found[j]
        assert sums is not None  # noqa: S101 - there is a window in every row
        end = tops[i + 1] if i + 1 < len(tops) else num_rows
        num_done = end - top
        yield sums[:num_done, :num_columns].copy()
        sums = np.concatenate([sums[num_done:], np.zeros_like(sums[:num_done])])


def _window(image: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
    found = image[top : top + height, left : left + width]
    if found.shape[:2] == (height, width):
        return found
    result = np.zeros((height, width, image.shape[2]), image.dtype)
    result[: found.shape[0], : found.shape[1]] = found
    return result


def probabilities_of(
    image: np.ndarray, step: Step, windows: Windows, *, heartbeat: Heartbeat = no_heartbeat
) -> Probabilities:
    """Returns the probabilities (H, W, K) of an image (H, W, C) of any size, at that size.

    Args:
        windows: of network size; an image of that size is predicted at once.
        heartbeat: called for every batch of windows, or for the image.
    """
    if image.shape[:2] == (windows.height, windows.width):
        found: Probabilities = np.asarray(step(image[np.newaxis]))[0]
        heartbeat()
        return found
    return np.concatenate(list(slide(image, step, windows, heartbeat=heartbeat)))
