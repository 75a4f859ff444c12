"""Decodes DICOM pixels with tensorflow-io, for pipelines that use it.

The only module of `data_prep` that imports TensorFlow, and only inside the decoding function, so
that other readers do not load it. It does not read the header.
"""

import functools
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from flexunet.errors import ContentError, UsageError


def decode(data: bytes, name: str) -> npt.NDArray[np.uint16]:
    """Returns the stored values of an uncompressed grey DICOM file of one frame, (H, W) uint16.

    Raises:
        UsageError: tensorflow-io is not installed, or does not match the TensorFlow version.
        ContentError: tensorflow-io cannot decode the file.
    """
    tf, tfio = _libraries()
    try:
        frames = tfio.image.decode_dicom_image(
            data, dtype=tf.uint16, scale="preserve", on_error="strict"
        ).numpy()
    except tf.errors.InvalidArgumentError:
        # The message of the error may quote the file.
        raise ContentError(
            f"{name}: tensorflow-io cannot decode it; use --dicom-reader pydicom"
        ) from None
    pixels: npt.NDArray[np.uint16] = frames[0, :, :, 0]
    return pixels


@functools.lru_cache(maxsize=1)
def _libraries() -> tuple[Any, Any]:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        import tensorflow as tf
        import tensorflow_io as tfio
    except ImportError as error:
        raise UsageError(
            "--dicom-reader tfio: tensorflow-io cannot be imported; install the extra tfio "
            "(Python 3.11 or 3.12), or use --dicom-reader pydicom"
        ) from error
    # Otherwise every worker process would reserve GPU memory.
    tf.config.set_visible_devices([], "GPU")
    return tf, tfio
