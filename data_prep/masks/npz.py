"""Reads masks from .npz files: ids, grey levels or one-hot classes.

Nothing is unpickled, and sizes are checked before anything is decompressed. The array is read in
blocks, so that the memory does not depend on its type and its number of classes.
"""

import io
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from data_prep.imaging.codecs import DEFAULT_MAX_PIXELS
from data_prep.imaging.pixels import Pixels
from data_prep.masks.color_map import MAX_CLASSES
from data_prep.masks.files import MaskFile
from flexunet.errors import ContentError
from flexunet.text import join_truncated, legible

NPZ_KEY = "mask"

_NPZ_BYTES_PER_PIXEL = 64  # eight one-hot classes as float64, or 64 as uint8
_MAX_HEADER_BYTES = 10_000  # NumPy's own limit
_BLOCK_BYTES = 2**20
_NUM_NAMES = 5  # in an error
_MAX_TEXT = 200  # characters of a file that an error shows
# The compression of NumPy's files. Python decompresses others without a limit.
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_OTHER_COMPRESSIONS = {zipfile.ZIP_BZIP2: "bzip2", zipfile.ZIP_LZMA: "lzma"}


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
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            member = _check_member(archive, name=name, max_pixels=max_pixels)
            with archive.open(member) as file:
                array = _Array(file)
                _check_array(array, name=name, num_classes=num_classes, max_pixels=max_pixels)
                if array.num_channels > 1:
                    ids = _read_one_hot(array, name=name)
                    return MaskFile(ids, num_classes=array.num_channels)
                return MaskFile(_read_levels(array, name=name))
    # The errors that zipfile, zlib, struct and numpy raise for damaged archives.
    except (
        *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, OSError),
        *(RuntimeError, NotImplementedError, SyntaxError, TypeError, OverflowError),
    ) as error:
        reason = _legible(str(error)) or type(error).__name__
        raise ContentError(f"{name}: not a readable .npz mask: {reason}; replace it") from error


def _legible(text: str) -> str:
    return legible(" ".join(text[:_MAX_TEXT].split()))


def _check_member(archive: zipfile.ZipFile, *, name: str, max_pixels: int) -> zipfile.ZipInfo:
    """Returns the entry of the array `mask`, which is not decompressed yet."""
    names = archive.namelist()
    if f"{NPZ_KEY}.npy" not in names:
        held = join_truncated([_legible(each.removesuffix(".npy")) for each in names], _NUM_NAMES)
        raise ContentError(
            f"{name}: has no array {NPZ_KEY!r}, only {held or 'nothing'}; rename the array"
        )
    member = archive.getinfo(f"{NPZ_KEY}.npy")
    if member.compress_type not in _COMPRESSIONS:
        kind = _OTHER_COMPRESSIONS.get(member.compress_type, f"method {member.compress_type}")
        raise ContentError(
            f"{name}: the mask is compressed with {kind}; save it with numpy.savez_compressed"
        )
    # zipfile never decompresses more than the size stated in the directory.
    if member.file_size > max_pixels * _NPZ_BYTES_PER_PIXEL:
        raise ContentError(
            f"{name}: decompresses to {member.file_size} bytes, more than a mask of {max_pixels} "
            "pixels can need; downscale the mask, or increase --max-pixels"
        )
    return member


class _Array:
    """An array in a .npy file whose values are read in blocks.

    Attributes:
        shape: as the header states it, not checked.
        dtype: type of the values.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.shape, self._is_fortran, self.dtype = _read_npy_header(file)

    @property
    def num_channels(self) -> int:
        """The length C of (H, W, C), 1 for (H, W)."""
        return self.shape[2] if len(self.shape) == 3 else 1

    def blocks(self) -> Iterator[tuple[slice, npt.NDArray[Any]]]:
        """Yields the values of a checked shape, (N, C), with the places of these pixels.

        Places count the pixels in the order of the file: by rows, in Fortran order by columns. In
        Fortran order each channel has its own blocks: C is 1.

        Raises:
            EOFError: the file ends early.
        """
        height, width = self.shape[:2]
        channels = 1 if self._is_fortran else self.num_channels
        size = max(1, _BLOCK_BYTES // (channels * self.dtype.itemsize))
        for _ in range(self.num_channels // channels):
            for start in range(0, height * width, size):
                stop = min(start + size, height * width)
                num_bytes = (stop - start) * channels * self.dtype.itemsize
                data = self._file.read(num_bytes)
                if len(data) < num_bytes:
                    raise EOFError("the array ends early")
                yield slice(start, stop), np.frombuffer(data, self.dtype).reshape(-1, channels)

    def as_plane(self, pixels: Pixels) -> Pixels:
        """Returns pixels (H * W,) in the order of the file as (H, W)."""
        return np.ascontiguousarray(
            pixels.reshape(self.shape[:2], order="F" if self._is_fortran else "C")
        )


def _read_npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"npy version {version}")
    length_format = "<H" if version == (1, 0) else "<I"
    stated = file.read(struct.calcsize(length_format))
    (num_bytes,) = struct.unpack(length_format, stated)
    if num_bytes > _MAX_HEADER_BYTES:
        raise ValueError(f"a header of {num_bytes} bytes")
    header = io.BytesIO(stated + file.read(num_bytes))
    try:
        if version == (1, 0):
            return np.lib.format.read_array_header_1_0(header)
        return np.lib.format.read_array_header_2_0(header)
    # NumPy parses the header as Python: also tokenize.TokenError, MemoryError and RecursionError.
    except Exception as error:
        raise ValueError("the header is damaged") from error


def _check_array(array: _Array, *, name: str, num_classes: int | None, max_pixels: int) -> None:
    shape, dtype = array.shape, array.dtype
    if len(shape) not in (2, 3) or min(shape) < 1 or dtype.kind not in "buif":
        raise ContentError(
            f"{name}: the mask is {_legible(str(shape))} {_legible(str(dtype))}; "
            "expected (H, W) ids or (H, W, C) one-hot numbers"
        )
    if shape[0] * shape[1] > max_pixels:
        raise ContentError(
            f"{name}: {shape[1]}x{shape[0]} is more than {max_pixels} pixels; "
            "downscale the mask, or increase --max-pixels"
        )
    channels = array.num_channels
    if channels > 1 and channels != (num_classes or min(channels, MAX_CLASSES)):
        raise ContentError(
            f"{name}: one-hot mask of {channels} classes; "
            f"expected {num_classes or f'at most {MAX_CLASSES}'}"
        )


def _read_levels(array: _Array, *, name: str) -> Pixels:
    """Returns whole numbers (H, W): uint8 if they are ids, else uint16."""
    plane = np.empty(math.prod(array.shape), np.uint16)
    for place, values in array.blocks():
        if not np.all((values >= 0) & (values <= 65535) & (values == np.floor(values))):
            raise ContentError(
                f"{name}: the mask has values that are not whole numbers 0..65535; replace it"
            )
        plane[place] = values[:, 0]
    fits = plane.max() < MAX_CLASSES
    return array.as_plane(plane.astype(np.uint8 if fits else np.uint16, copy=False))


def _read_one_hot(array: _Array, *, name: str) -> Pixels:
    """Returns the ids (H, W) of one-hot classes."""
    num_pixels = array.shape[0] * array.shape[1]
    ids, counts = np.zeros(num_pixels, np.uint8), np.zeros(num_pixels, np.uint16)
    is_binary, first = True, 0  # the class of the first channel of a block
    for place, values in array.blocks():
        is_one = values == 1
        is_binary &= bool(np.all(is_one | (values == 0)))
        counts[place] += is_one.sum(axis=1, dtype=np.uint16)
        ids[place] += (is_one.argmax(axis=1) + first * is_one[:, 0]).astype(np.uint8)
        if place.stop == num_pixels:
            first += values.shape[1]
    if not is_binary or not (counts == 1).all():
        raise ContentError(f"{name}: not one-hot: a pixel does not have exactly one 1; replace it")
    return array.as_plane(ids)
