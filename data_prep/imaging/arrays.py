"""Reads images of any number of channels from NumPy files, and lays channels out as one PNG.

Like `codecs.py`, the module checks the header before it reads pixels, and never loads objects.
"""

import io
import math

import numpy as np

from data_prep.imaging.codecs import DEFAULT_MAX_PIXELS, encode_png, read_image
from data_prep.imaging.pixels import MAX_CHANNELS, Pixels
from flexunet.errors import ContentError

NPY_ENDING = ".npy"
_SIGNATURE = b"\x93NUMPY"
_MAX_HEADER_CHARS = 2000  # of an image: dtype, order and three numbers take about 80
_MAX_PLANE_PIXELS = 2**29 - 1  # of a PNG that TensorFlow decodes
_MAX_PLANE_ROWS = 2**20 - 1  # of a PNG that OpenCV decodes


def is_npy(data: bytes) -> bool:
    """Returns whether `data` starts like a file of `numpy.save`."""
    return data.startswith(_SIGNATURE)


def read_npy(data: bytes, *, name: str, max_pixels: int = DEFAULT_MAX_PIXELS) -> Pixels:
    """Returns the pixels of a .npy image: (H, W, C) uint8 or uint16, C from 1 to 64.

    Args:
        data: the whole file: an array (H, W) or (H, W, C).
        name: name of the file in errors.
        max_pixels: larger images are rejected; channels do not count.

    Raises:
        ContentError: not such an array, truncated, too large, or channels that are not last.
    """
    try:
        shape, dtype = _header(data)
        _check(shape, dtype, name=name, max_pixels=max_pixels)
        pixels = np.load(io.BytesIO(data), allow_pickle=False, max_header_size=_MAX_HEADER_CHARS)
    except (ContentError, MemoryError):
        raise
    # The parser of the header raises SyntaxError, TypeError, UnicodeError and more.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ContentError(f"{name}: damaged .npy file ({reason}); replace the file") from error
    if pixels.ndim == 2:
        pixels = pixels[:, :, np.newaxis]
    return np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("="))


def _header(data: bytes) -> tuple[tuple[int, ...], np.dtype]:
    """Returns shape and dtype; checks that the file has exactly that many bytes."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"version {version[0]}.{version[1]}")
    shape, _, dtype = read(file, max_header_size=_MAX_HEADER_CHARS)
    expected = math.prod(shape) * dtype.itemsize
    found = len(data) - file.tell()
    if not dtype.hasobject and found != expected:
        raise ValueError(f"{found} bytes of pixels, expected {expected}")
    return shape, dtype


def _check(shape: tuple[int, ...], dtype: np.dtype, *, name: str, max_pixels: int) -> None:
    if dtype.kind != "u" or dtype.itemsize > 2:
        raise ContentError(
            f"{name}: an array of {dtype}, expected uint8 or uint16; scale the values and save "
            "them as unsigned integers"
        )
    if len(shape) not in (2, 3) or 0 in shape:
        raise ContentError(f"{name}: an array of shape {shape}, expected (height, width, channels)")
    height, width, channels = (*shape, 1)[:3]
    if channels > MAX_CHANNELS or (len(shape) == 3 and height < min(width, channels)):
        raise ContentError(
            f"{name}: an array of shape {shape}, expected (height, width, channels) with at most "
            f"{MAX_CHANNELS} channels; move the channels to the end"
        )
    if height * width > max_pixels:
        raise ContentError(
            f"{name}: {width}x{height} is {height * width} pixels, more than {max_pixels}; "
            "downscale the image, or increase --max-pixels"
        )


def check_storable(height: int, width: int, channels: int, *, name: str) -> None:
    """Refuses a stored image whose channels do not fit into one PNG.

    Raises:
        ContentError: names the image and what to reduce.
    """
    rows = height * channels
    if channels > 3 and (rows > _MAX_PLANE_ROWS or rows * width > _MAX_PLANE_PIXELS):
        raise ContentError(
            f"{name}: {channels} channels of {height}x{width} pixels are too large to store; "
            "reduce --image-size or --tile"
        )


def has_planes(channels: int) -> bool:
    """Returns whether images of this number of channels are stored as planes of a grey PNG."""
    return channels not in (1, 3)


def encode_image(image: Pixels) -> bytes:
    """Returns `image`, (H, W, C), as a lossless PNG; see `decode_image`.

    Grey and RGB images are plain PNGs. Others are a grey PNG of H * C rows: the channels one below
    the other.
    """
    height, width, channels = image.shape
    if not has_planes(channels):
        return encode_png(image)
    planes = np.ascontiguousarray(np.moveaxis(image, 2, 0)).reshape(height * channels, width)
    return encode_png(planes)


def decode_image(data: bytes, channels: int, *, name: str) -> Pixels:
    """Returns the image (H, W, C) that `encode_image` stored.

    Args:
        channels: C.
        name: of the image, for errors.

    Raises:
        ContentError: the data are damaged, or of another number of channels.
    """
    pixels = read_image(data, name=name, max_pixels=2**31)
    if not has_planes(channels):
        return pixels
    rows, width, found = pixels.shape
    if found != 1 or rows % channels:
        raise ContentError(f"{name}: not an image of {channels} channels; prepare it again")
    planes = pixels.reshape(channels, rows // channels, width)
    return np.ascontiguousarray(np.moveaxis(planes, 0, 2))
