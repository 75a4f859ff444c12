"""Writes the probabilities of an image as a file, at the size of the image.

A TIFF has a page of 16 bits for each class, class 0 first; 65535 is probability 1. An .npy file
has the shape (h, w, classes). A network with one output gives one page or one class: class 1.
"""

import io
from collections.abc import Iterable
from typing import Literal

import numpy as np
from PIL import Image

from data_prep.imaging.geometry import Geometry
from data_prep.sources.dicom_files import stem_of
from job.inference.prediction import planes_at_source
from job.postprocessing.temperature import calibrated

PROBABILITIES_FOLDER = "probabilities"

FileFormat = Literal["tiff", "float16", "float32"]

_FULL = 65535  # the stored value of probability 1
_ENDINGS = {"tiff": ".tif", "float16": ".npy", "float32": ".npy"}


def probability_name(image_name: str, file_format: FileFormat) -> str:
    """Returns the object name of the probabilities of `image_name`."""
    return f"{PROBABILITIES_FOLDER}/{stem_of(image_name)}{_ENDINGS[file_format]}"


def probability_names(image_names: Iterable[str], *, without: str = "none") -> list[str]:
    """Returns the object names of the probabilities of images, in every format.

    Args:
        without: a format whose names are left out.
    """
    kept = _ENDINGS.get(without)
    endings = sorted({each for each in _ENDINGS.values() if each != kept})
    return [
        f"{PROBABILITIES_FOLDER}/{stem_of(name)}{ending}"
        for name in image_names
        for ending in endings
    ]


def probability_file(
    probabilities: np.ndarray, geometry: Geometry, temperature: float, file_format: FileFormat
) -> bytes:
    """Returns the file of the probabilities of an image, at the size of the image.

    Args:
        probabilities: (H, W, K) float32 at network size.
        temperature: by which their logits are divided before.
    """
    planes = planes_at_source(calibrated(probabilities, temperature), geometry)
    buffer = io.BytesIO()
    if file_format == "tiff":
        pages = [Image.fromarray(_rounded(plane)) for plane in planes]
        pages[0].save(
            buffer,
            format="TIFF",
            save_all=True,
            append_images=pages[1:],
            compression="tiff_adobe_deflate",
        )
    else:
        dtype = np.dtype(file_format)
        found = np.stack([plane.astype(dtype) for plane in planes], axis=-1)
        np.save(buffer, found, allow_pickle=False)
    return buffer.getvalue()


def _rounded(plane: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(plane, 0, 1) * np.float32(_FULL)).astype(np.uint16)
