"""Reads the tags of a TIFF, and rewrites them so that Pillow can decode the pixels.

The module handles the tags; it does not decode pixels.

Pillow decodes every compression, but only one channel of 16 bits at a time. `plane` and `as_rgba8`
turn other files into files that Pillow decodes without loss: they prepend a directory of tags that
describes the same bytes in another way.
"""

import io
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

_BIG_SIGNATURE = b"II+\0"
_BIG_ENDIAN_BIG_SIGNATURE = b"MM\0+"
# The third and fourth mix both byte orders; some programs write and read them.
TIFF_SIGNATURES = (
    b"II*\0",
    b"MM\0*",
    b"II\0*",
    b"MM*\0",
    _BIG_SIGNATURE,
    _BIG_ENDIAN_BIG_SIGNATURE,
)
WHITE_IS_ZERO = 0
BLACK_IS_ZERO = 1
RGB = 2
PALETTE = 3

_PHOTOMETRICS = {
    WHITE_IS_ZERO: "white-is-zero grey",
    BLACK_IS_ZERO: "grey",
    RGB: "RGB",
    PALETTE: "palette",
    5: "CMYK",
    6: "YCbCr",
    8: "CIELab",
}
_COMPRESSIONS = {
    1: "not compressed",
    5: "LZW",
    7: "JPEG",
    8: "deflate",
    32773: "packbits",
    32946: "deflate",
    34925: "LZMA",
    50000: "Zstandard",
    50001: "WebP",
}
_DIFFERENCED = (5, 8, 32946, 34925, 50000)  # the compressions that use the predictor
_PREFIX_BYTES = 8
_PLANAR = 2
_HORIZONTAL_PREDICTOR = 2
_UNASSOCIATED_ALPHA = 2

_WIDTH = 256
_HEIGHT = 257
_BITS_PER_SAMPLE = 258
_COMPRESSION = 259
_PHOTOMETRIC = 262
_FILL_ORDER = 266
_STRIP_OFFSETS = 273
_ORIENTATION = 274
_SAMPLES_PER_PIXEL = 277
_ROWS_PER_STRIP = 278
_STRIP_BYTE_COUNTS = 279
_PLANAR_CONFIGURATION = 284
_PREDICTOR = 317
_COLOR_MAP = 320
_TILE_WIDTH = 322
_TILE_HEIGHT = 323
_TILE_OFFSETS = 324
_TILE_BYTE_COUNTS = 325
_EXTRA_SAMPLES = 338
_SAMPLE_FORMAT = 339

_KEPT = (
    *(_WIDTH, _HEIGHT, _COMPRESSION, _FILL_ORDER, _ORIENTATION, _ROWS_PER_STRIP),
    *(_TILE_WIDTH, _TILE_HEIGHT, _PREDICTOR),
)
_OFFSETS = (_STRIP_OFFSETS, _TILE_OFFSETS)
_PER_STRIP = (*_OFFSETS, _STRIP_BYTE_COUNTS, _TILE_BYTE_COUNTS)
_SHORT_TAGS = (
    *(_BITS_PER_SAMPLE, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _ORIENTATION),
    *(_SAMPLES_PER_PIXEL, _PREDICTOR, _EXTRA_SAMPLES),
)


@dataclass(frozen=True)
class Kind:
    """The properties of a TIFF from its first directory.

    Attributes:
        order: "<" little-endian or ">" big-endian.
        width: pixels.
        height: pixels.
        bits: bits of each sample.
        sample_formats: 1 unsigned, 2 signed, 3 float, 4 undefined.
        photometric: meaning of the samples.
        samples: number per pixel, alpha included.
        is_planar: each sample is stored as a separate plane.
        compression: the number of the compression.
        predictor: 1 none, 2 the difference to the previous pixel in the row of a strip or tile.
        tile_width: pixels; 0: stored in strips.
        tile_height: pixels; 0: stored in strips.
        orientation: as in EXIF; 1 is upright.
        has_more_frames: another directory follows.
    """

    order: str
    width: int
    height: int
    bits: tuple[int, ...]
    sample_formats: tuple[int, ...]
    photometric: int
    samples: int
    is_planar: bool
    compression: int
    predictor: int
    tile_width: int
    tile_height: int
    orientation: int
    has_more_frames: bool

    @property
    def is_16_bit(self) -> bool:
        """Whether every sample has 16 bits."""
        return set(self.bits) == {16}

    @property
    def has_differences(self) -> bool:
        """Whether samples are stored as the difference to those of the previous pixel."""
        return self.predictor == _HORIZONTAL_PREDICTOR and self.compression in _DIFFERENCED

    @property
    def is_grey(self) -> bool:
        """Whether the first sample is grey; others are alpha or have no meaning."""
        return self.photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO)

    def __str__(self) -> str:
        """Returns a description: `16-bit RGB of 3 samples, planar, LZW, big-endian`."""
        bits = "/".join(str(each) for each in sorted(set(self.bits)))
        photometric = _PHOTOMETRICS.get(self.photometric, f"photometric {self.photometric}")
        samples = "1 sample" if self.samples == 1 else f"{self.samples} samples"
        compression = _COMPRESSIONS.get(self.compression, f"compression {self.compression}")
        predictor = "" if self.predictor == 1 else f" with predictor {self.predictor}"
        return (
            f"{bits}-bit {photometric} of {samples}, "
            f"{'planar' if self.is_planar else 'contiguous'}, {compression}{predictor}, "
            f"{'big' if self.order == '>' else 'little'}-endian"
        )


class Tiff:
    """A TIFF file and its first directory.

    Args:
        data: the whole file; classic or BigTIFF.

    Raises:
        ValueError: the directory is truncated or lacks the size.
    """

    def __init__(self, data: bytes):
        self._data = data
        self._tags = _read_directory(data)
        self.kind = self._read_kind()

    def palette(self) -> tuple[int, ...]:
        """Returns the colours: all red, then all green, then all blue values, 0..65535.

        Raises:
            ValueError: the number of colours does not match the bits of a pixel.
        """
        colors = self._values(_COLOR_MAP, ())
        if len(colors) != 3 * 2 ** self.kind.bits[0]:
            raise ValueError(f"a palette of {len(colors)} values")
        return colors

    def plane(self, index: int) -> bytes:
        """Returns a grey TIFF with only one sample of each pixel.

        The file must have one sample or be planar.

        Raises:
            ValueError: the number of strips or tiles is not a multiple of the samples.
        """
        tags = {tag: self._values(tag, ()) for tag in _KEPT}
        for tag in _PER_STRIP:
            values = self._values(tag, ())
            each, rest = divmod(len(values), self.kind.samples)
            if rest:
                raise ValueError(f"{len(values)} strips or tiles of {self.kind.samples} samples")
            tags[tag] = values[index * each : (index + 1) * each]
        return self._restated(
            tags
            | {
                _BITS_PER_SAMPLE: (self.kind.bits[0],),
                _PHOTOMETRIC: (BLACK_IS_ZERO,),
                _SAMPLES_PER_PIXEL: (1,),
            }
        )

    def as_rgba8(self) -> bytes:
        """Returns an RGBA TIFF whose four channels are the bytes of two 16-bit samples.

        The bytes are in the order of the file, and are differences if the file has a predictor.
        """
        tags = {tag: self._values(tag, ()) for tag in (*_KEPT, *_PER_STRIP)}
        return self._restated(
            tags
            | {
                _BITS_PER_SAMPLE: (8, 8, 8, 8),
                _PHOTOMETRIC: (RGB,),
                _SAMPLES_PER_PIXEL: (4,),
                _PREDICTOR: (),
                _EXTRA_SAMPLES: (_UNASSOCIATED_ALPHA,),
            }
        )

    def _values(self, tag: int, default: tuple[int, ...]) -> tuple[int, ...]:
        value: Any = self._tags.get(tag, default)
        values = value if isinstance(value, tuple) else (value,)
        if not all(isinstance(each, int) for each in values):
            raise ValueError(f"tag {tag} has values that are not whole numbers")
        return values

    def _value(self, tag: int, default: int) -> int:
        return (*self._values(tag, (default,)), default)[0]

    def _read_kind(self) -> Kind:
        width, height = self._value(_WIDTH, 0), self._value(_HEIGHT, 0)
        if min(width, height) < 1:
            raise ValueError("the tags lack the size")
        return Kind(
            order="<" if self._data.startswith(b"II") else ">",
            width=width,
            height=height,
            bits=self._values(_BITS_PER_SAMPLE, (1,)) or (1,),
            sample_formats=self._values(_SAMPLE_FORMAT, (1,)),
            photometric=self._value(_PHOTOMETRIC, WHITE_IS_ZERO),
            samples=self._value(_SAMPLES_PER_PIXEL, 1),
            is_planar=self._value(_PLANAR_CONFIGURATION, 1) == _PLANAR,
            compression=self._value(_COMPRESSION, 1),
            predictor=self._value(_PREDICTOR, 1),
            tile_width=self._value(_TILE_WIDTH, 0),
            tile_height=self._value(_TILE_HEIGHT, 0),
            orientation=self._value(_ORIENTATION, 1),
            has_more_frames=self._tags.next != 0,
        )

    def _restated(self, tags: dict[int, tuple[int, ...]]) -> bytes:
        """Returns the file with a new directory of `tags` before it; skips tags without values.

        The pixels stay at the end, so that missing pixels of a truncated file are still detected.
        """
        order = self.kind.order
        entries = sorted((tag, values) for tag, values in tags.items() if values)
        start = _PREFIX_BYTES + 2 + 12 * len(entries) + 4
        shift = start + sum(_num_bytes_outside(tag, len(values)) for tag, values in entries)
        directory, outside = struct.pack(f"{order}H", len(entries)), b""
        for tag, values in entries:
            kind, code, _ = _type_of(tag)
            moved = [each + shift for each in values] if tag in _OFFSETS else values
            packed = struct.pack(f"{order}{len(moved)}{code}", *moved)
            if _num_bytes_outside(tag, len(moved)):
                packed, outside = struct.pack(f"{order}I", start + len(outside)), outside + packed
            directory += struct.pack(f"{order}HHI4s", tag, kind, len(moved), packed)
        prefix = struct.pack(f"{order}2sHI", self._data[:2], 42, _PREFIX_BYTES)
        return b"".join((prefix, directory, bytes(4), outside, self._data))


def _type_of(tag: int) -> tuple[int, str, int]:
    """Returns the TIFF type number, the `struct` code and the bytes of the type of `tag`.

    All lengths are even, so that all offsets stay even.
    """
    return (3, "H", 2) if tag in _SHORT_TAGS else (4, "I", 4)


def _num_bytes_outside(tag: int, num_values: int) -> int:
    num_bytes = num_values * _type_of(tag)[2]
    return num_bytes if num_bytes > 4 else 0


def tiff_kind(data: bytes) -> str:
    """Returns a description of the TIFF `data`; empty if it is no TIFF or is damaged."""
    try:
        return str(Tiff(data).kind) if data.startswith(TIFF_SIGNATURES) else ""
    except Exception:
        return ""


def _read_directory(data: bytes) -> "ImageFileDirectory_v2":
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    if data.startswith(_BIG_ENDIAN_BIG_SIGNATURE):
        # Pillow would read it as a classic TIFF.
        raise ValueError("big-endian BigTIFF; save it as little-endian")
    is_big = data.startswith(_BIG_SIGNATURE)
    tags = ImageFileDirectory_v2(data[: 16 if is_big else _PREFIX_BYTES])
    file = io.BytesIO(data)
    file.seek(tags.next)
    tags.load(file)
    if tags.next == tags.offset:  # unchanged: Pillow only warns of an early end
        raise ValueError("the tags are truncated")
    return tags
