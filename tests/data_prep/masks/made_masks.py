"""Makes mask files with known values, in the formats in which people save masks."""

import io
import struct
import zlib
from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from data_prep.masks.statistics import MaskStatistics, read_statistics

Mask = npt.NDArray[np.integer]
SIDE = 96
GREYS = [level for level in range(256) for _ in range(3)]


def areas(values: Sequence[int], *, side: int = SIDE, seed: int = 0) -> npt.NDArray[np.uint16]:
    """Returns (side, side): a disc of each value but the first on the first one."""
    mask = np.full((side, side), values[0], np.uint16)
    rng = np.random.default_rng(seed)
    cells = rng.permutation(16)[: len(values) - 1]
    for value, cell in zip(values[1:], cells, strict=True):
        row, column = divmod(int(cell), 4)
        step = side // 4
        center = (column * step + step // 2, row * step + step // 2)
        cv2.circle(mask, center, int(step * rng.uniform(0.3, 0.45)), int(value), -1)
    return mask


def outlined(mask: Mask, value: int = 255) -> Mask:
    """Returns the mask with a border of 3 pixels around its areas."""
    edges = np.zeros(mask.shape, np.uint8)
    edges[:-1] |= mask[:-1] != mask[1:]
    edges[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    result = mask.copy()
    result[cv2.dilate(edges, np.ones((3, 3), np.uint8)) > 0] = value
    return result


def image_file(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """Returns the bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def grey_file(mask: Mask, kind: str = "PNG", **options: object) -> bytes:
    """Returns a grey file of 8 bits, or of 16 bits if the mask is uint16."""
    dtype = np.uint16 if mask.dtype == np.uint16 and mask.max() > 255 else np.uint8
    return image_file(Image.fromarray(mask.astype(dtype)), kind, **options)


def packed_rows(levels: Mask, bits: int) -> list[bytes]:
    """Returns the rows of `levels` (H, W) with `bits` bits a pixel, which Pillow cannot write."""
    places = np.arange(bits - 1, -1, -1)
    flags = levels[..., np.newaxis] >> places & 1
    return [row.tobytes() for row in np.packbits(flags.reshape(len(levels), -1), axis=1)]


def grey_png(levels: Mask, bits: int) -> bytes:
    """Returns a grey PNG with `bits` bits a pixel."""
    height, width = levels.shape
    pixels = zlib.compress(b"".join(b"\0" + row for row in packed_rows(levels, bits)))
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def palette_file(mask: Mask, palette: Sequence[int], kind: str = "PNG") -> bytes:
    """Returns a file with a palette: red, green and blue of each index."""
    image = Image.fromarray(mask.astype(np.uint8))
    image.putpalette(list(palette))
    return image_file(image, kind)


def color_file(
    mask: Mask, colors: Sequence[Sequence[int]], kind: str = "PNG", **options: object
) -> bytes:
    """Returns an RGB file with `colors[i]` where the mask is i."""
    return image_file(Image.fromarray(np.array(colors, np.uint8)[mask]), kind, **options)


def statistics(*files: bytes, name: str = "m.png") -> MaskStatistics:
    """Returns the statistics of all files."""
    parts = [read_statistics(data, name=name, max_pixels=10**7) for data in files]
    return sum(parts, MaskStatistics())
