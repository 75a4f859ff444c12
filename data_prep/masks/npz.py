"""Reads masks from .npz files: ids, grey levels or one-hot classes.

Nothing is unpickled, and sizes are checked before anything is decompressed.
"""

import io
import math
import zipfile
import zlib
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from data_prep.imaging.codecs import DEFAULT_MAX_PIXELS
from data_prep.imaging.pixels import Pixels
from data_prep.masks.color_map import MAX_CLASSES
from data_prep.masks.files import MaskFile
from flexunet.errors import ContentError

NPZ_KEY = "mask"

_NPZ_BYTES_PER_PIXEL = 64  # eight one-hot classes as float64, or 64 as uint8


def read_npz_mask(
    data: bytes,
    name: str,
    *,
    num_classes: int | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> Pixels:
    """Returns the mask in an .npz file: (H, W) uint8 or uint16."""
    return read_npz_file(data, name, num_classes=num_classes, max_pixels=max_pixels).pixels


def read_npz_file(
    data: bytes,
    name: str,
    *,
    num_classes: int | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> MaskFile:
    """Returns the mask in an .npz file, with one-hot classes as ids.

    The array `mask` is (H, W) with ids or grey levels, or (H, W, C) one-hot with C in the order of
    the ids; (H, W, 1) is read as (H, W). Pickled objects are never loaded, and the size is checked
    before anything is decompressed.

    Args:
        data: the whole file.
        name: name of the file in errors.
        num_classes: the number of classes that a one-hot mask must have; None: any.
        max_pixels: larger masks are rejected.

    Raises:
        ContentError: another kind of file, too large, values other than whole numbers 0..65535, or
            not one-hot.
    """
    try:
        array = _read_npz_array(data, name, max_pixels)
    # The errors that zipfile, zlib and numpy raise for damaged archives.
    except (
        *(zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError),
        *(RuntimeError, NotImplementedError, SyntaxError, TypeError),
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ContentError(f"{name}: not a readable .npz mask: {reason}; replace it") from error
    if array.ndim == 3 and array.shape[2] > 1:
        ids = _from_one_hot(array, name=name, num_classes=num_classes)
        return MaskFile(ids, is_ids=True)
    plane = array.reshape(array.shape[:2])
    if not np.all((plane >= 0) & (plane <= 65535) & (plane == np.floor(plane))):
        raise ContentError(
            f"{name}: the mask has values that are not whole numbers 0..65535; replace it"
        )
    return MaskFile(plane.astype(np.uint8 if plane.max() < MAX_CLASSES else np.uint16))


def _read_npz_array(data: bytes, name: str, max_pixels: int) -> npt.NDArray[Any]:
    """Returns the array `mask`: (H, W) or (H, W, C) of bool, integers or floats."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        member = f"{NPZ_KEY}.npy"
        if member not in archive.namelist():
            held = ", ".join(entry.removesuffix(".npy") for entry in archive.namelist()[:5])
            raise ContentError(
                f"{name}: has no array {NPZ_KEY!r}, only {held or 'nothing'}; rename the array"
            )
        # zipfile never decompresses more than the size stated in the directory.
        stated = archive.getinfo(member).file_size
        if stated > max_pixels * _NPZ_BYTES_PER_PIXEL:
            raise ContentError(
                f"{name}: decompresses to {stated} bytes, more than a mask of {max_pixels} pixels "
                "can need; downscale the mask, or increase --max-pixels"
            )
        with archive.open(member) as file:
            shape, fortran, dtype = _read_npy_header(file)
            _check_npy(shape, dtype, name=name, max_pixels=max_pixels)
            payload = file.read(math.prod(shape) * dtype.itemsize)
    return np.frombuffer(payload, dtype).reshape(shape, order="F" if fortran else "C")


def _read_npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"npy version {version}")


def _check_npy(shape: tuple[int, ...], dtype: np.dtype[Any], *, name: str, max_pixels: int) -> None:
    if len(shape) not in (2, 3) or 0 in shape or dtype.kind not in "buif":
        raise ContentError(
            f"{name}: the mask is {shape} {dtype}; expected (H, W) ids or (H, W, C) one-hot numbers"
        )
    if shape[0] * shape[1] > max_pixels:
        raise ContentError(
            f"{name}: {shape[1]}x{shape[0]} is more than {max_pixels} pixels; "
            "downscale the mask, or increase --max-pixels"
        )


def _from_one_hot(array: npt.NDArray[Any], *, name: str, num_classes: int | None) -> Pixels:
    if array.shape[2] != (num_classes or array.shape[2]) or array.shape[2] > MAX_CLASSES:
        raise ContentError(
            f"{name}: one-hot mask of {array.shape[2]} classes; "
            f"expected {num_classes or f'at most {MAX_CLASSES}'}"
        )
    is_one = array == 1
    if not (np.all(is_one | (array == 0)) and np.all(is_one.sum(axis=2) == 1)):
        raise ContentError(f"{name}: not one-hot: a pixel does not have exactly one 1; replace it")
    ids: Pixels = is_one.argmax(axis=2).astype(np.uint8)
    return ids
