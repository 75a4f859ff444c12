"""Changes the pixel values of an image at random: light, optics, noise.

The changes follow the way of an image: the light of the scene (sharpening, brightening, contrast,
gamma), then the blur of the optics, then the noise of the sensor. Masks stay as they are. A kind
with an amount of its own has its own random stream, so that switching it on does not change the
draws of the others.
"""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from data_prep.imaging.pixels import by_channels
from job.config import AugmentationConfig
from job.data.augmentation.draws import Draws, drawn_range
from job.data.random_streams import Purpose

Pixels: TypeAlias = npt.NDArray[Any]  # uint8 or uint16
Table: TypeAlias = npt.NDArray[Any]  # of every pixel value, in the type of the pixels


def sharpened(image: Pixels, k: float, value_max: int) -> Pixels:
    """Returns `image` after a 3x3 kernel of 1 + 8k in its middle and -k around it."""
    import cv2

    kernel = np.full((3, 3), -k, np.float32)
    kernel[1, 1] = 1 + 8 * k
    changed = by_channels(lambda part: cv2.filter2D(part, -1, kernel), image).reshape(image.shape)
    limited: Pixels = np.minimum(changed, image.dtype.type(value_max))
    return limited


def brightened(image: Pixels, alpha: float, beta: float, value_max: int) -> Pixels:
    """Returns `alpha` times the values plus `beta`; a `beta` of 255 is the full scale."""
    return _looked_up(image, _table(alpha * _levels(image) + beta * value_max / 255, value_max))


def changed_appearance(
    image: Pixels, config: AugmentationConfig, draws: Draws, value_max: int
) -> Pixels:
    """Returns the image after contrast, gamma, blur and noise, as far as they are drawn.

    Args:
        value_max: largest pixel value; results are clipped to it.
    """
    factor = drawn_range(draws, Purpose.CONTRAST, config, "contrast")
    if factor is not None:
        image = _with_contrast(image, factor.log_uniform(), value_max)
    exponent = drawn_range(draws, Purpose.GAMMA, config, "gamma")
    if exponent is not None:
        scaled = np.minimum(_levels(image) / value_max, 1.0)
        table = _table(value_max * scaled ** exponent.log_uniform(), value_max)
        image = _looked_up(image, table)
    sigma = drawn_range(draws, Purpose.BLUR, config, "blur")
    if sigma is not None:
        image = _blurred(image, sigma.uniform())
    strength = drawn_range(draws, Purpose.NOISE, config, "noise")
    if strength is not None:
        scale = np.float32(strength.uniform() * value_max)
        noise = strength.generator.standard_normal(image.shape, np.float32)
        noise *= scale
        noise += image
        image = np.clip(np.rint(noise, out=noise), 0, value_max, out=noise).astype(image.dtype)
    return image


def _levels(image: Pixels) -> npt.NDArray[np.int64]:
    """Returns every value that a pixel can have."""
    return np.arange(np.iinfo(image.dtype).max + 1)


def _table(values: npt.NDArray[np.floating[Any]], value_max: int) -> Table:
    """Returns the table of new pixel values: rounded, and clipped to the full scale."""
    dtype = np.uint8 if len(values) == 256 else np.uint16
    return np.clip(np.rint(values), 0, value_max).astype(dtype)


def _looked_up(image: Pixels, table: Table) -> Pixels:
    import cv2

    if image.dtype == np.uint8:
        return np.asarray(cv2.LUT(image, table)).reshape(image.shape)
    return np.take(table, image)


def _with_contrast(image: Pixels, factor: float, value_max: int) -> Pixels:
    """Returns the image with distances from each channel's mean multiplied by `factor`."""
    changed = np.empty_like(image)
    levels = _levels(image)
    for channel in range(image.shape[2]):
        part = np.ascontiguousarray(image[..., channel])
        mean = float(part.mean())
        table = _table(mean + factor * (levels - mean), value_max)
        changed[..., channel] = _looked_up(part, table)
    return changed


def _blurred(image: Pixels, sigma: float) -> Pixels:
    """Returns the image after a Gaussian; beyond its border it continues as in a mirror."""
    import cv2

    if sigma <= 0:
        return image
    size = 2 * int(np.ceil(3 * sigma)) + 1

    def blurred(part: Pixels) -> Pixels:
        return np.asarray(cv2.GaussianBlur(part, (size, size), sigma))

    return by_channels(blurred, image).reshape(image.shape)
