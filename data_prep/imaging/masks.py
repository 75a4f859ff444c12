"""Converts colours and grey levels of a mask to class ids and back.

The module defines the meaning of mask pixels; it does not depend on where masks come from.

Rules for reading a mask of any file format:
- A mask whose colours are all grey is a grey mask, also if it is stored as RGB or as a palette.
- A grey mask with only class ids (0..K-1, and the ignore id) is an index mask, such as a 0/1 mask
  of two classes.
- In other masks, each pixel gets the class with the nearest colour. A pixel is counted as unmapped
  if its colour is not exactly that of a class: resampled masks have such pixels along their edges.
  16-bit grey masks are compared with the colours times 257 (65535 is white).
- The ignore id is read as the grey level `ignore_id`, or that grey as a colour.
"""

import io
import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from data_prep.imaging.codecs import DEFAULT_MAX_PIXELS
from data_prep.imaging.color_map import MAX_CLASSES, ClassColor, Color, check_ignore_id, grey_level
from data_prep.imaging.pixels import Pixels, grey_channel
from flexunet.errors import ContentError

ClassIds = npt.NDArray[np.uint8]
"""(H, W) uint8 class ids."""

NPZ_KEY = "mask"

_NUM_COLORS_NAMED = 5
_LEVELS_16_BIT = 257  # 65535 / 255: one 8-bit grey level in 16 bits
_MAX_DISTANCES = 2**18  # colours x classes compared at once: 6 MB
_NOT_A_BLEND = 128  # a blend of two colours is closer than this to one of them
_MAX_ID_LIKE = 64
_SOLID_SIDE = 3  # pixels; blends along edges are thinner
_NPZ_BYTES_PER_PIXEL = 64  # eight one-hot classes as float64, or 64 as uint8


def to_class_ids(
    pixels: Pixels,
    classes: Sequence[ClassColor],
    *,
    name: str,
    ignore_id: int | None = None,
) -> tuple[ClassIds, int, list[Color]]:
    """Returns class ids (H, W) uint8, the number of unmapped pixels, and their commonest colours.

    Args:
        pixels: (H, W) or (H, W, 1) grey, uint8 or uint16, or (H, W, 3) uint8 RGB.
        classes: the classes in the order of their ids.
        name: name of the mask in errors.
        ignore_id: id of pixels that are ignored everywhere.

    Raises:
        ContentError: the mask would be read as empty although it has areas of other colours or
            ids, so the classes do not match it.
        UsageError: `ignore_id` is a class id, or the grey level of a class.
    """
    check_ignore_id(classes, ignore_id)
    colors = [entry.color for entry in classes]
    ids = [entry.id for entry in classes]
    if ignore_id is not None:
        colors, ids = [*colors, (ignore_id,) * 3], [*ids, ignore_id]
    plane = grey_channel(pixels)
    if plane is None:
        reading = _read_colors(pixels, np.array(colors), np.array(ids))
    else:
        reading = _read_grey(plane, np.array(colors), np.array(ids))
    unmapped = int(reading.off_counts.sum())
    commonest = np.argsort(-reading.off_counts, kind="stable")[:_NUM_COLORS_NAMED]
    named = [_as_color(color) for color in reading.off_colors[commonest]]
    if unmapped and _is_empty(reading.ids, ignore_id):
        is_solid = 2 * _num_solid(pixels, colors) > unmapped
        _refuse_unexplained(reading, classes, named, name=name, is_solid=is_solid)
    return reading.ids, unmapped, named


def to_colors(class_ids: npt.NDArray[Any], classes: Sequence[ClassColor]) -> Pixels:
    """Returns the colours (H, W, 3) uint8 of class ids (H, W); an ignore id becomes its own grey.

    `to_class_ids` converts them back to the same ids.
    """
    table = np.repeat(np.arange(MAX_CLASSES, dtype=np.uint8)[:, np.newaxis], 3, axis=1)
    for entry in classes:
        table[entry.id] = entry.color
    return np.take(table, class_ids, axis=0)


def read_npz_mask(
    data: bytes,
    name: str,
    *,
    num_classes: int | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> Pixels:
    """Returns the mask in an .npz file: (H, W) uint8 or uint16, for `to_class_ids`.

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
        return _from_one_hot(array, name=name, num_classes=num_classes)
    plane = array.reshape(array.shape[:2])
    if not np.all((plane >= 0) & (plane <= 65535) & (plane == np.floor(plane))):
        raise ContentError(
            f"{name}: the mask has values that are not whole numbers 0..65535; replace it"
        )
    return plane.astype(np.uint8 if plane.max() < MAX_CLASSES else np.uint16)


@dataclass(frozen=True)
class _Reading:
    """Class ids, and the M distinct unmapped colours."""

    ids: ClassIds
    off_colors: npt.NDArray[np.int64]  # (M, 3)
    off_counts: npt.NDArray[np.int64]  # (M,) pixels of each colour
    off_distances: npt.NDArray[np.int64]  # (M,) to the assigned class, in 8-bit levels


_NOTHING_OFF = (np.zeros((0, 3), np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64))


def _read_grey(
    plane: Pixels, colors: npt.NDArray[np.int64], ids: npt.NDArray[np.int64]
) -> _Reading:
    import cv2

    exact = _read_exact(plane, colors, ids)
    if exact is not None:
        return _Reading(exact, *_NOTHING_OFF)
    counts = _counts(plane)
    levels = np.flatnonzero(counts)
    if set(levels.tolist()) <= set(ids.tolist()):
        return _Reading(plane.astype(np.uint8), *_NOTHING_OFF)
    scale = _LEVELS_16_BIT if levels[-1] > 255 else 1
    shades = np.repeat(levels[:, np.newaxis], 3, axis=1)
    nearest, distances = _nearest(shades, colors * scale)
    table = np.zeros(max(256, len(counts)), np.uint8)
    table[levels] = ids[nearest]
    off = distances > 0
    # OpenCV's table is four times as fast, but has only 256 entries.
    read = cv2.LUT(plane, table) if plane.dtype == np.uint8 else np.take(table, plane)
    return _Reading(
        np.asarray(read, np.uint8), shades[off], counts[levels[off]], distances[off] // scale
    )


def _read_exact(
    plane: Pixels, colors: npt.NDArray[np.int64], ids: npt.NDArray[np.int64]
) -> ClassIds | None:
    """Returns the class ids of a mask with only the grey levels of the classes, like most masks.

    Returns None for other masks. No level of one class is the id of another, see
    `parse_color_map`. Takes half the time of counting the levels.
    """
    import cv2

    is_grey = (colors == colors[:, :1]).all(axis=1)
    no_class = MAX_CLASSES - 1
    if plane.dtype != np.uint8 or ids.max() == no_class:
        return None
    table = np.full(256, no_class, np.uint8)
    # If classes share a level, the first one is used.
    table[colors[is_grey, 0][::-1]] = ids[is_grey][::-1]
    read = np.asarray(cv2.LUT(plane, table), np.uint8)
    return None if read.max() == no_class else read


def _counts(plane: Pixels) -> npt.NDArray[np.int64]:
    """Returns the count of each value, up to the largest of the type or of `plane`."""
    import cv2

    if plane.dtype == np.uint8 and plane.size < 2**24:
        # Five times as fast; counts in float32, which is exact up to 2**24 pixels.
        histogram = cv2.calcHist([plane], [0], None, [256], [0, 256])
        return histogram.ravel().astype(np.int64)
    return np.bincount(plane.ravel())


def _read_colors(
    pixels: Pixels, colors: npt.NDArray[np.int64], ids: npt.NDArray[np.int64]
) -> _Reading:
    codes = pixels[..., 0].astype(np.uint32)
    for channel in (1, 2):
        codes <<= 8
        codes |= pixels[..., channel]
    result = np.zeros(codes.shape, np.uint8)
    rest = np.ones(codes.shape, bool)
    # Most pixels have exactly a class colour: only the others are sorted and compared.
    for (red, green, blue), class_id in zip(colors.tolist(), ids, strict=True):
        exact = codes == (red << 16 | green << 8 | blue)
        np.putmask(result, exact, class_id)
        rest ^= exact
    others, where, counts = np.unique(codes[rest], return_inverse=True, return_counts=True)
    shades = np.stack([others >> 16, (others >> 8) & 255, others & 255], axis=1).astype(np.int64)
    nearest, distances = _nearest(shades, colors)
    result[rest] = ids[nearest][where]
    off = distances > 0
    return _Reading(result, shades[off], counts[off], distances[off])


def _nearest(
    shades: npt.NDArray[np.int64], colors: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Returns the index of the nearest of `colors` (K, 3) for each of `shades` (M, 3).

    Also returns the largest channel difference to that colour. The distance is the sum of squares;
    if several colours are equally near, the first is used.
    """
    nearest = np.zeros(len(shades), np.int64)
    block = max(1, _MAX_DISTANCES // len(colors))
    for start in range(0, len(shades), block):
        difference = shades[start : start + block, np.newaxis] - colors
        nearest[start : start + block] = (difference**2).sum(axis=2).argmin(axis=1)
    return nearest, np.abs(shades - colors[nearest]).max(axis=1, initial=0)


def _is_empty(class_ids: ClassIds, ignore_id: int | None) -> bool:
    foreground = class_ids if ignore_id is None else class_ids[class_ids != ignore_id]
    return not foreground.any()


def _num_solid(pixels: Pixels, colors: Sequence[Color]) -> int:
    """Returns the number of pixels in uniform squares whose colour is not in `colors`."""
    import cv2

    channels = pixels if pixels.ndim == 3 else pixels[:, :, np.newaxis]
    square = np.ones((_SOLID_SIDE, _SOLID_SIDE), np.uint8)
    highest, lowest = cv2.dilate(pixels, square), cv2.erode(pixels, square)
    is_centre = (highest == lowest).reshape(channels.shape).all(axis=2)
    is_solid = cv2.dilate(is_centre.astype(np.uint8), square).astype(bool)
    for color in colors:
        is_solid &= (channels != color).any(axis=2)
    return int(np.count_nonzero(is_solid))


def _refuse_unexplained(
    reading: _Reading,
    classes: Sequence[ClassColor],
    named: list[Color],
    *,
    name: str,
    is_solid: bool,
) -> None:
    """Rejects a mask that would become empty although it seems to have foreground.

    The faint rest of a lesion warped out of the image is a blend, close to the background's colour.
    A colour far from it, grey levels 0, 1, 2 and so on without a gap, or uniform areas (`is_solid`:
    most unmapped pixels are in them) indicate a mask of other classes. Below the limit for unmapped
    pixels, or with a higher limit, its foreground would be lost without a message.
    """
    levels = np.unique(reading.off_colors)
    is_grey = np.all(reading.off_colors == reading.off_colors[:, :1])
    known = [level for entry in classes if (level := grey_level(entry.color)) is not None]
    seen = np.union1d(levels, [level for level in known if level <= levels[-1]])
    is_id_like = is_grey and levels[-1] < _MAX_ID_LIKE and len(seen) == levels[-1] + 1
    # Grey of 9 to 15 bits in a 16-bit file, where white is not 65535.
    is_scaled = levels[-1] > 255
    if is_solid or is_id_like or is_scaled or reading.off_distances.max() >= _NOT_A_BLEND:
        colors = ", ".join(map(str, named))
        raise ContentError(
            f"{name}: would be read as empty, but has {reading.off_counts.sum()} pixels in colours "
            f"of no class: {colors}; give the colours of these masks with --classes"
        )


def _as_color(values: npt.NDArray[np.int64]) -> Color:
    red, green, blue = values.tolist()
    return red, green, blue


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
