"""Pixels of DICOM files by tensorflow-io, for pipelines that are built on it.

The one module of `data_prep` that imports TensorFlow, and only inside the function that decodes:
who does not choose this reader pays nothing for it. It must not know what is in the header.
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
        UsageError: tensorflow-io is not installed, or not beside its own TensorFlow.
        ContentError: it cannot decode the file.
    """
    tf, tfio = _libraries()
    try:
        frames = tfio.image.decode_dicom_image(
            data, dtype=tf.uint16, scale="preserve", on_error="strict"
        ).numpy()
    except tf.errors.InvalidArgumentError:
        # Its message may quote the file.
        raise ContentError(f"{name}: tensorflow-io cannot decode it; use pydicom") from None
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
            "(Python 3.11 or 3.12), or use pydicom"
        ) from error
    # Every process that prepares would take the memory of the GPU.
    tf.config.set_visible_devices([], "GPU")
    return tf, tfio
