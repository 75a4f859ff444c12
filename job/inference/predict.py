"""From a picture to its mask: what training, evaluation and inference share, and its options.

A picture of the network's size is predicted at once. A larger one is predicted in windows of that
size, which overlap and are added with Gaussian weights: a window knows least about its border.
The network is a function that the caller gives: no run is opened here, and no TensorFlow imported.

Source of the weights, sigma an eighth of a window: nnU-Net, Isensee et al. 2021,
doi:10.1038/s41592-020-01008-z.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from data_prep.imaging.breast import frame
from data_prep.imaging.geometry import Geometry, apply_geometry, undo_geometry
from data_prep.imaging.pixels import FEW_PIXELS, Target, convert
from data_prep.imaging.tiles import starts
from data_prep.shards.manifest import Manifest
from flexunet.errors import ContentError
from flexunet.progress import Alive, not_told
from flexunet.settings import Settings, option
from job.metrics.lesions import without_small_regions

logger = logging.getLogger(__name__)

Ids = npt.NDArray[np.uint8]
Probabilities = npt.NDArray[np.float32]
Flips = Literal["none", "horizontal", "vertical", "both"]
# Stored pixels (B, H, W, C) -> (B, H, W, K) float32, as a tensor; K = 1 is a sigmoid output.
Step = Callable[[np.ndarray], Any]

_SIGMA = 1 / 8  # of the side of a window

# 12-bit detectors store 0..4095 in 16-bit files.
_LARGEST_12_BIT = 4095
# Shares of the full scale that a 16-bit picture has to exceed: a picture of 12 bits is at most a
# sixteenth of 16 bits. Two bits are enough where it is darker than all pictures of the dataset.
_UNUSED, _UNUSED_AND_DARKEST = 16, 4


class PredictConfig(Settings):
    """How pictures are predicted; what `evaluate` and `infer` have in common."""

    checkpoint: Literal["best", "last"] = option("best", "Weights.")
    ensemble: tuple[str, ...] = option(
        (), "More runs, separated by commas: the mean of all their probabilities counts.", path=True
    )
    flips: Flips = option(
        "none", "Mirrored pictures that are predicted too; the mean of the probabilities counts."
    )
    overlap: int | None = option(
        None,
        "Pixels by which windows overlap at least, where pictures are predicted in windows; unset: "
        "the run's window_overlap, or half a window.",
        ge=0,
    )
    needs_gpu: bool = option(False, "Refuse a machine without a GPU instead of using its CPUs.")


def window_weights(length: int, size: int, begins: Sequence[int]) -> npt.NDArray[np.float64]:
    """Returns the weights of windows along one axis, (windows, size); at each pixel they add to 1.

    Args:
        length: of the picture, pixels.
        begins: where the windows begin; they cover it.
    """
    offsets = (np.arange(size) - (size - 1) / 2) / (size * _SIGMA)
    bell = np.exp(-(offsets**2) / 2)
    total = np.zeros(max(length, size))
    for begin in begins:
        total[begin : begin + size] += bell
    return np.stack([bell / total[begin : begin + size] for begin in begins])


def slide(
    image: np.ndarray,
    step: Step,
    *,
    height: int,
    width: int,
    overlap: int,
    batch_size: int,
    alive: Alive = not_told,
) -> Iterator[Probabilities]:
    """Yields the probabilities of `image` as bands of rows, top to bottom: (h, W, K) float32 each.

    A band is as high as a window at most, so that memory does not depend on the picture's height
    but for the picture itself. One that is smaller than a window is filled up with 0.

    Args:
        image: (H, W, C) stored pixels.
        height, width: of a window.
        batch_size: windows predicted at once; fewer are filled up, so that all batches are alike.
        alive: told of every batch.
    """
    num_rows, num_columns = image.shape[:2]
    tops, lefts = (
        starts(length, size, overlap) for length, size in ((num_rows, height), (num_columns, width))
    )
    down, right = (
        window_weights(num_rows, height, tops).astype(np.float32),
        window_weights(num_columns, width, lefts).astype(np.float32),
    )
    sums: Probabilities | None = None
    for i, top in enumerate(tops):
        for first in range(0, len(lefts), batch_size):
            part = lefts[first : first + batch_size]
            windows = [_window(image, top, left, height, width) for left in part]
            windows += windows[:1] * (batch_size - len(part))
            found = np.asarray(step(np.stack(windows)), np.float32)
            alive()
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
    image: np.ndarray,
    step: Step,
    manifest: Manifest,
    *,
    overlap: int,
    batch_size: int,
    alive: Alive = not_told,
) -> Probabilities:
    """Returns the probabilities (H, W, K) of an image (H, W, C) of any size, at that size.

    Args:
        alive: told of every batch of windows, or of the picture.
    """
    height, width = manifest.image_height, manifest.image_width
    if image.shape[:2] == (height, width):
        found: Probabilities = np.asarray(step(image[np.newaxis]))[0]
        alive()
        return found
    bands = slide(
        *(image, step),
        height=height,
        width=width,
        overlap=overlap,
        batch_size=batch_size,
        alive=alive,
    )
    return np.concatenate(list(bands))


def class_ids(probabilities: np.ndarray) -> Ids:
    """Returns the most probable class (...) uint8 of (..., K); K = 1 is a sigmoid output."""
    if probabilities.shape[-1] == 1:
        return (probabilities[..., 0] > 0.5).astype(np.uint8)
    return np.argmax(probabilities, axis=-1).astype(np.uint8)


def without_small(ids: Ids, min_pixels: Sequence[int], scale: float = 1.0) -> Ids:
    """Returns a mask (H, W) whose small regions are background.

    Args:
        min_pixels: of each class but 0, at the network's size; smaller regions go.
        scale: pixels of this mask for each of the network's.
    """
    result = ids.copy()
    for index, limit in enumerate(min_pixels):
        region = ids == index + 1
        result[region & ~without_small_regions(region, math.ceil(limit * scale))] = 0
    return result


def area_scale(geometry: Geometry) -> float:
    """Returns how many pixels of the source are one of the stored image."""
    part = geometry.part
    return part.height * part.width / (geometry.height * geometry.width)


def to_model_pixels(
    image: np.ndarray,
    manifest: Manifest,
    *,
    name: str = "image",
    value_max: int | None = None,
    kind: Literal["stretch", "pad", "tile"] | None = None,
) -> tuple[np.ndarray, Geometry]:
    """Returns `image` (h, w, 1|3) as the dataset would store it: (H, W, C), and where it lies.

    An 8-bit dataset takes the upper byte of images that use 16 bits. In a dataset of 16 bits a few
    pixels above its full scale become that, as in `prep`, and a warning tells.

    Args:
        value_max: raw value of full intensity, where it is known; a few pixels above it likewise.
        kind: of geometry; None: the dataset's. "tile" leaves the picture at its own size, uncut.

    Raises:
        ContentError: `image` has 16 bits and uses far less of them, or more, than the dataset's
            full scale, or `value_max`: whether it is dark or of a detector of fewer bits cannot be
            told.
    """
    import cv2

    takes_upper_byte = manifest.bit_depth == 8 and image.dtype == np.uint16 and value_max is None
    if takes_upper_byte:
        _refuse_unused_bits(image, name)
    elif image.dtype == np.uint16:
        _check_full_scale(image, manifest, name, value_max)
    kind = kind or manifest.geometry
    size = manifest.image_height, manifest.image_width
    geometry = frame(
        image,
        height=size[0],
        width=size[1],
        kind=kind,
        crop=manifest.crop,
        flip=manifest.flip,
    )
    if kind == "tile":
        size = geometry.height, geometry.width
    if manifest.channels == 1 and image.shape[2] == 3:
        # As prep does: the luma of ITU-R BT.601, which keeps the value of equal channels.
        image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[:, :, np.newaxis]
    pixels = apply_geometry(image, geometry, *size, nearest=False).reshape(*size, -1)
    if takes_upper_byte:
        pixels = (pixels >> 8).astype(np.uint8)
    target = Target(manifest.channels, manifest.bit_depth, manifest.value_max)
    return convert(pixels, target, value_max=value_max), geometry


def _refuse_unused_bits(image: np.ndarray, name: str) -> None:
    """The upper byte of a 12-bit picture is nearly black, and its mask would be wrong."""
    highest = int(image.max())
    if highest <= _LARGEST_12_BIT:
        raise ContentError(
            f"{name}: 16-bit file whose largest value is {highest}, but the model was trained on "
            "8-bit images; give infer its own full scale with --full-scale, or scale its range to "
            "0..255, save it with 8 bits and infer again"
        )


def _check_full_scale(
    image: np.ndarray, manifest: Manifest, name: str, value_max: int | None
) -> None:
    """Refuses a picture that is of another full scale than `value_max`, or the dataset's.

    Predicted as it is, it would be many times too bright or too dark, and its mask wrong.
    """
    brightest = image.max(axis=2)
    highest, full = int(brightest.max()), value_max or manifest.value_max
    num_above = int(np.count_nonzero(brightest > full))
    whose = "the model's dataset" if value_max is None else "this picture as it was given"
    if num_above * FEW_PIXELS > brightest.size:
        raise ContentError(
            f"{name}: 16-bit file with values up to {highest}, but full intensity is {full} in "
            f"{whose}; give infer its own with --full-scale, or scale its range to 0..{full}"
        )
    if num_above:
        logger.warning(
            "%s: %s above full intensity, up to %d, taken as %d",
            *(name, "1 pixel is" if num_above == 1 else f"{num_above} pixels are", highest, full),
        )
    if value_max is not None or highest == int(brightest.min()):
        return
    share, lowest = _UNUSED, full
    if manifest.full_scale is not None:
        share, lowest = _UNUSED_AND_DARKEST, manifest.full_scale.lowest_max
    if highest <= full // share and highest < lowest:
        raise ContentError(
            f"{name}: 16-bit file whose largest value is {highest}, but full intensity is {full} "
            f"in {whose}; give infer its own with --full-scale (4095 of 12 bits; {full} if the "
            f"picture is so dark), or scale its range to 0..{full}"
        )


def class_ids_at_source(probabilities: np.ndarray, geometry: Geometry) -> Ids:
    """Returns the mask at the image's own size: (h, w) uint8.

    Probabilities are enlarged before the class is chosen, so that contours stay smooth; one class
    at a time, because an image of 100 megapixels takes 400 MB for each.

    Args:
        probabilities: (H, W, K) float32 at the model's size; K = 1 is a sigmoid output.
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
