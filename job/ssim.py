"""Computes the structural similarity (SSIM) of images, in float32 and float64."""

import tensorflow as tf

from job.config import SSIM_SIZE, check_ssim_sides

# Constants: Wang et al. 2004, doi:10.1109/TIP.2003.819861; images in [0, 1].
_SSIM_SIGMA = 1.5
_SSIM_C1 = 0.01**2
_SSIM_C2 = 0.03**2


def structural_similarity(first: tf.Tensor, second: tf.Tensor) -> tf.Tensor:
    """Returns the SSIM of each pair of images: (B,) in [-1, 1], the mean over pixels and channels.

    The Gaussian window of 11 x 11 with sigma 1.5 stays inside the image; K1 = 0.01, K2 = 0.03,
    images in [0, 1]. Equals `tf.image.ssim(max_val=1)`, which would round float64 to float32.

    Args:
        first, second: (B, H, W, C) float32 or float64, H and W at least 11.

    Raises:
        UsageError: the images are smaller than the window.
    Source: Wang et al. 2004, doi:10.1109/TIP.2003.819861.
    """
    check_ssim_sides(first.shape[1] or SSIM_SIZE, first.shape[2] or SSIM_SIZE)
    mean_1, mean_2 = _blur(first), _blur(second)
    product, squares = mean_1 * mean_2, mean_1**2 + mean_2**2
    covariance = _blur(first * second) - product
    variances = _blur(first**2 + second**2) - squares
    luminance = (2 * product + _SSIM_C1) / (squares + _SSIM_C1)
    structure = (2 * covariance + _SSIM_C2) / (variances + _SSIM_C2)
    return tf.reduce_mean(luminance * structure, axis=(1, 2, 3))


def _blur(images: tf.Tensor) -> tf.Tensor:
    """Returns `images` averaged with the Gaussian window, (B, H - 10, W - 10, C)."""
    offsets = tf.range(SSIM_SIZE, dtype=images.dtype) - (SSIM_SIZE - 1) / 2
    kernel = tf.nn.softmax(-(offsets**2) / (2 * _SSIM_SIGMA**2))
    kernel = tf.tile(kernel[:, tf.newaxis, tf.newaxis, tf.newaxis], [1, 1, images.shape[-1], 1])
    rows = tf.nn.depthwise_conv2d(images, kernel, [1, 1, 1, 1], "VALID")
    return tf.nn.depthwise_conv2d(rows, tf.transpose(kernel, (1, 0, 2, 3)), [1, 1, 1, 1], "VALID")
