"""Reads mask files with all that may carry classes: colours, palette indices and alpha.

The formats and their limits are those of `imaging/codecs.py`; `reading.py` has the meaning of
colours and levels. Rules, if no encoding is given:
- A mask with a palette is read by its colours, if all of them are of classes, else by its indices,
  if all of them are ids. If both are possible and differ, it is rejected.
- Grey of 1, 2 or 4 bits is such a palette: its levels are the indices, and scaled to 0..255 they
  are the colours.
- A mask of one colour with a varying alpha channel is rejected: its shape is in the alpha channel.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data_prep.imaging.codecs import decoding, open_image, read_image
from data_prep.imaging.pixels import Pixels, grey_channel, is_uniform
from data_prep.imaging.tiff import TIFF_SIGNATURES, Tiff
from data_prep.masks.coding import level_counts, lookup
from data_prep.masks.color_map import MAX_CLASSES, Color, color_text, grey_level
from data_prep.masks.reading import (
    NUM_COLORS_NAMED,
    MaskReading,
    UnmappedColor,
    known_colors,
    read_classes,
    read_nonzero,
)
from data_prep.masks.rules import MaskRules, NoClassError, index_table, options_to_ignore_ids
from flexunet.errors import ContentError

if TYPE_CHECKING:
    from PIL import Image

_OPAQUE = 128  # of 255
_PNG_SIGNATURE = b"\x89PNG"
_PNG_BITS, _PNG_COLOR_TYPE = 24, 25  # positions of the bytes
_PNG_GREY = 0
_PNG_PLAIN_TYPES = (0, 2)  # grey and RGB, without palette and alpha
_JPEG_SIGNATURE = b"\xff\xd8"


@dataclass(frozen=True)
class MaskFile:
    """The content of a mask file.

    Attributes:
        pixels: (H, W) uint8 or uint16 grey, or (H, W, 3) uint8 RGB, without alpha.
        indices: (H, W) uint8 indices into the palette, None without a palette. Also the levels of
            grey of fewer than 8 bits, whose palette is the scale of 0..255.
        alpha: (H, W) uint8, None without alpha or if it is the same everywhere. A mask of one
            colour that is transparent everywhere has an alpha channel: its shape is empty.
        palette: colours of the indices 0, 1, 2 and so on, as far as the file has them.
        is_lossy: the file is JPEG, so that its colours have noise.
        num_classes: of a one-hot array, whose pixels are class ids whatever the encoding is.
    """

    pixels: Pixels
    indices: Pixels | None = None
    alpha: Pixels | None = None
    palette: tuple[Color, ...] = ()
    num_classes: int | None = None
    is_lossy: bool = False

    @property
    def is_transparent(self) -> bool:
        """Whether nothing is opaque."""
        return self.alpha is not None and not self.alpha.any()

    def color_of(self, index: int) -> Color:
        """Returns the colour of an index that occurs."""
        # A file may use indices beyond its palette, which decoders give a colour of their own.
        if index < len(self.palette):
            return self.palette[index]
        place = int((np.asarray(self.indices) == index).argmax())
        color = self.pixels.reshape(-1, self.pixels[0, 0].size)[place].tolist()
        return color[0], color[-1 if len(color) < 3 else 1], color[-1]


def read_mask_file(data: bytes, *, name: str, max_pixels: int) -> MaskFile:
    """Returns the content of a mask file: PNG, JPEG, TIFF, BMP or GIF.

    Raises:
        ContentError: see `read_image`.
    """
    pixels = read_image(data, name=name, max_pixels=max_pixels)
    if pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    elif pixels.dtype == np.uint16:
        pixels = _colors_of_16_bits(pixels, name=name)
    if pixels.dtype != np.uint8:
        return MaskFile(pixels)
    if is_jpeg(data):
        return MaskFile(pixels, is_lossy=True)
    if _is_plain(data):
        return _with_levels(pixels, _png_grey_bits(data))
    with decoding(data, name=name):
        image = open_image(data, name=name, max_pixels=max_pixels)
        if image.mode in ("1", "L"):
            return _with_levels(pixels, 1 if image.mode == "1" else _tiff_bits(data))
        indices = np.array(image) if image.mode == "P" else None
        palette = _palette_of(image)
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        alpha = np.array(image.getchannel("A")) if image.mode in ("LA", "RGBA") else None
    if alpha is not None and is_uniform(alpha) and (alpha.any() or not is_uniform(pixels)):
        alpha = None
    return MaskFile(pixels, indices, alpha, palette)


def _with_levels(pixels: Pixels, bits: int) -> MaskFile:
    """Returns grey `pixels` (H, W) with the levels that a file of `bits` bits has."""
    if bits >= 8 or pixels.ndim != 2:
        return MaskFile(pixels)
    step = 255 // ((1 << bits) - 1)
    palette = tuple((level,) * 3 for level in range(0, 256, step))
    return MaskFile(pixels, pixels // np.uint8(step), palette=palette)


def _png_grey_bits(data: bytes) -> int:
    """Returns the bits of a grey PNG, 8 for any other file without palette and alpha."""
    is_grey = data.startswith(_PNG_SIGNATURE) and data[_PNG_COLOR_TYPE] == _PNG_GREY
    return data[_PNG_BITS] if is_grey else 8


def _tiff_bits(data: bytes) -> int:
    """Returns the bits of a TIFF, 8 for any other file."""
    return max(Tiff(data).kind.bits) if data.startswith(TIFF_SIGNATURES) else 8


def _colors_of_16_bits(pixels: Pixels, *, name: str) -> Pixels:
    """Returns (H, W, 3) uint8 colours of 16-bit ones, or (H, W) uint16 if all are grey.

    Raises:
        ContentError: a value is no 8-bit value, times 257 or 256.
    """
    grey = grey_channel(pixels)
    if grey is not None:
        return np.ascontiguousarray(grey)
    high, low = pixels >> 8, pixels & 255
    is_odd = ((low != 0) & (low != high)).any(axis=2)
    if is_odd.any():
        row, column = np.argwhere(is_odd)[0]
        color = ",".join(map(str, pixels[row, column]))
        raise ContentError(
            f"{name}: the 16-bit colour {color} at row {row}, column {column} has no equal in 8 "
            "bits; save the mask with 8 bits a channel"
        )
    return high.astype(np.uint8)


def read_mask(mask: MaskFile, rules: MaskRules, *, name: str) -> MaskReading:
    """Returns the class ids of a mask file, and its unmapped pixels.

    Raises:
        ContentError: see `read_classes`; or the file does not have what `rules.encoding` names.
    """
    if mask.num_classes is not None:
        return MaskReading(rules.as_dataset_ids(mask.pixels))
    if rules.encoding == "alpha":
        return _read_alpha(mask, rules, name=name)
    if rules.encoding == "nonzero":
        if mask.indices is None:
            return read_nonzero(mask.pixels, rules)
        return read_nonzero(mask.indices, rules, _ignored_indices(mask, mask.indices, rules))
    if rules.encoding == "index":
        plane = grey_channel(mask.pixels) if mask.indices is None else mask.indices
        if plane is None:
            raise ContentError(
                f"{name}: is a colour image without a palette, but --mask-encoding is index; "
                "replace the file, or use --mask-encoding colour"
            )
        return _read_index(mask, plane, rules, name=name)
    if rules.encoding == "auto":
        is_shape = mask.alpha is not None and not mask.is_transparent
        if is_shape and is_uniform(mask.pixels):
            raise ContentError(
                f"{name}: has one colour, and its shape is in the alpha channel; read it with "
                "--mask-encoding alpha, or replace the file"
            )
        if mask.indices is not None and _is_index(mask, mask.indices, rules, name=name):
            return _read_index(mask, mask.indices, rules, name=name)
    return read_classes(mask.pixels, rules, name=name, is_lossy=mask.is_lossy)


def _is_index(mask: MaskFile, indices: Pixels, rules: MaskRules, *, name: str) -> bool:
    """Returns whether the palette of a mask has colours of no class, but all indices are ids.

    Raises:
        ContentError: the colours and the indices are of different classes, or two indices have the
            same colour.
    """
    used = np.flatnonzero(level_counts(indices))
    colors = [mask.color_of(index) for index in used.tolist()]
    known = known_colors(rules)
    ids = {tuple(color): class_id for color, class_id in zip(*known.lists(), strict=True)}
    by_color = [ids.get(color, -1) for color in colors]
    by_index = index_table(rules)[used].tolist()
    # Scaled levels have no palette of their own.
    kind = "index" if mask.pixels.ndim == 3 else "level"
    of_file = "of its palette" if kind == "index" else "of a file with few bits"
    if len(set(colors)) < len(colors):
        raise ContentError(
            f"{name}: different indices of its palette have the same colour; give --mask-encoding "
            "index or --mask-encoding colour"
        )
    if min(by_color) >= 0 and min(by_index) >= 0 and by_color != by_index:
        place = next(i for i in range(len(used)) if by_color[i] != by_index[i])
        raise ContentError(
            f"{name}: {kind} {used[place]} {of_file} has the colour "
            f"{','.join(map(str, colors[place]))} of class {by_color[place]}; give --mask-encoding "
            "index or --mask-encoding colour"
        )
    return min(by_color) < 0 <= min(by_index)


def _ignored_indices(mask: MaskFile, indices: Pixels, rules: MaskRules) -> list[int]:
    """Returns the indices that occur and have an ignored colour in the palette of the mask.

    Grey is left out: ignored levels are indices, and a class may have that grey in the palette.
    """
    colors = {color for color in rules.ignored if grey_level(color) is None}
    if not colors:
        return []
    used = np.flatnonzero(level_counts(indices)).tolist()
    return [index for index in used if mask.color_of(index) in colors]


def _read_index(mask: MaskFile, plane: Pixels, rules: MaskRules, *, name: str) -> MaskReading:
    counts = level_counts(plane)
    table = index_table(rules)
    if mask.indices is not None and rules.ignore_id is not None:
        table[_ignored_indices(mask, mask.indices, rules)] = rules.ignore_id
    wrong = [
        (int(value), int(counts[value]))
        for value in np.flatnonzero(counts)
        if value >= len(table) or table[value] < 0
    ]
    if wrong:
        named = ", ".join(f"{value} ({count} pixels)" for value, count in wrong[:NUM_COLORS_NAMED])
        ids = [value for value, _ in wrong[:NUM_COLORS_NAMED]]
        add = "add classes to --classes, or " if max(ids) < MAX_CLASSES else ""
        raise NoClassError(
            f"{name}: has ids of no class: {named}; the ids of the {len(rules.read_classes)} "
            f"classes are 0 to {len(rules.read_classes) - 1}; {add}ignore these pixels with "
            f"{options_to_ignore_ids(ids, rules)}",
            [(value,) * 3 for value, _ in wrong],
        )
    # Scaled levels have no palette of their own.
    if rules.palette and mask.indices is not None and mask.pixels.ndim == 3:
        found = {index: mask.color_of(index) for index in np.flatnonzero(counts).tolist()}
        _check_palette(found, dict(rules.palette), name=name)
    return MaskReading(lookup(table.astype(np.uint8), plane))


def _check_palette(found: Mapping[int, Color], expected: Mapping[int, Color], *, name: str) -> None:
    """Checks that the indices of a palette have the colours by which their meaning was decided.

    Raises:
        ContentError: one of them has another colour, so that it may mean another class.
    """
    for index, color in found.items():
        other = expected.get(index, color)
        if other != color:
            raise ContentError(
                f"{name}: index {index} of its palette has the colour {color_text(color)}, but "
                f"{color_text(other)} in the masks from which the classes were found; replace the "
                "file, or give --classes with --mask-encoding index if the indices are right, or "
                "with --mask-encoding colour if the colours are"
            )


def _read_alpha(mask: MaskFile, rules: MaskRules, *, name: str) -> MaskReading:
    """Returns the second class where a mask is opaque by half or more.

    Values between 0 and 255 are unmapped.
    """
    if mask.alpha is None:
        raise ContentError(
            f"{name}: has no alpha channel, or one value in it, but --mask-encoding is alpha; "
            "replace the file, or use another encoding"
        )
    is_soft = (mask.alpha > 0) & (mask.alpha < 255)
    values, counts = np.unique(mask.alpha[is_soft], return_counts=True)
    soft = sorted(zip(counts.tolist(), values.tolist(), strict=True), reverse=True)
    class_ids = rules.file_ids or (0, 1)
    colors = tuple(
        UnmappedColor((value,) * 3, count, class_ids[value >= _OPAQUE]) for count, value in soft
    )
    ids = rules.as_dataset_ids((mask.alpha >= _OPAQUE).astype(np.uint8))
    return MaskReading(ids, int(counts.sum()), colors)


def _is_plain(data: bytes) -> bool:
    """Returns whether a PNG has neither a palette nor alpha; false for any other file."""
    return data.startswith(_PNG_SIGNATURE) and data[_PNG_COLOR_TYPE] in _PNG_PLAIN_TYPES


def is_jpeg(data: bytes) -> bool:
    """Returns whether `data` starts like a JPEG file."""
    return data.startswith(_JPEG_SIGNATURE)


def _palette_of(image: "Image.Image") -> tuple[Color, ...]:
    channels = iter(image.getpalette() or () if image.mode == "P" else ())
    return tuple(zip(channels, channels, channels, strict=False))
