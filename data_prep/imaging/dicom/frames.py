"""Decodes the compressed frame of a DICOM file to its stored values.

The module defines the supported compressions, parses their codestreams, and selects the library
that decodes them. It does not read the elements of a file.

- A codestream states its size. Before decoding, it must equal the size in the header, which is
  within the limit: a decoded frame is never larger than the header states.
- RLE states no size. It is decompressed here, up to the expected size and no further.
- The others are decoded by imagecodecs (libjpeg-turbo, CharLS and OpenJPEG), from the extra
  `dicom`, which the default installation does not include. The other libraries that pydicom can use
  have the GPL license (pylibjpeg-libjpeg), or crash the process on a damaged JPEG (python-gdcm).

Sources: DICOM PS3.5 A.4 (fragments) and G (RLE); ITU-T T.81 B (JPEG), T.87 C (JPEG-LS) and
T.800 A (JPEG 2000).
"""

import importlib.util
import itertools
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from flexunet.errors import ContentError

Values = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

EXTRA = "pip install 'flexunet[dicom]'"

_DCMTK_JPEG = "dcmdjpeg of DCMTK"
_DCMTK_JPEG_LS = "dcmdjpls of DCMTK"
_GDCM = "gdcmconv --raw of GDCM"

_ITEM = b"\xfe\xff\x00\xe0"
_END_OF_ITEMS = b"\xfe\xff\xdd\xe0"
_END_OF_IMAGE = b"\xff\xd9"  # of JPEG and JPEG-LS; in JPEG 2000 the end of the codestream
_START_OF_SCAN = 0xDA
# DHT, JPG and DAC have numbers in the range of the frame headers.
_FRAME_HEADERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
_FIRST_MARKER = 0xC0  # TEM and reserved markers have lower numbers; 0 is no marker
_WITHOUT_SEGMENT = range(0xD0, 0xDA)  # restarts, the start and the end of an image
_J2K_START = b"\xff\x4f\xff\x51"
_MIN_TILE_PIXELS = 256  # on average; OpenJPEG needs some kilobytes per tile
_MIN_BLOCK_EXPONENT = 8  # 256 pixels; the usual block has 4096
_COD, _COC = 0xFF52, 0xFF53
_START_OF_TILE_PART, _START_OF_DATA, _END_OF_CODESTREAM = 0xFF90, 0xFF93, 0xFFD9
_RLE_HEADER = struct.Struct("<16I")


@dataclass(frozen=True)
class Codec:
    """A compression of DICOM files.

    Attributes:
        name: name in messages.
        frame_headers: the frame-header markers allowed in this kind of JPEG.
        tool: a program that decompresses such files.
    """

    name: str
    family: Literal["rle", "jpeg", "jpeg-ls", "jpeg 2000"]
    frame_headers: tuple[int, ...]
    is_lossless: bool
    tool: str


CODECS = {
    "1.2.840.10008.1.2.5": Codec("RLE lossless", "rle", (), True, "dcmdrle of DCMTK"),
    "1.2.840.10008.1.2.4.50": Codec("JPEG baseline", "jpeg", (0xC0,), False, _DCMTK_JPEG),
    "1.2.840.10008.1.2.4.51": Codec("JPEG extended", "jpeg", (0xC0, 0xC1), False, _DCMTK_JPEG),
    "1.2.840.10008.1.2.4.57": Codec("JPEG lossless", "jpeg", (0xC3,), True, _DCMTK_JPEG),
    "1.2.840.10008.1.2.4.70": Codec("JPEG lossless", "jpeg", (0xC3,), True, _DCMTK_JPEG),
    "1.2.840.10008.1.2.4.80": Codec("JPEG-LS lossless", "jpeg-ls", (0xF7,), True, _DCMTK_JPEG_LS),
    "1.2.840.10008.1.2.4.81": Codec(
        "JPEG-LS near-lossless", "jpeg-ls", (0xF7,), False, _DCMTK_JPEG_LS
    ),
    "1.2.840.10008.1.2.4.90": Codec("JPEG 2000 lossless", "jpeg 2000", (), True, _GDCM),
    "1.2.840.10008.1.2.4.91": Codec("JPEG 2000", "jpeg 2000", (), False, _GDCM),
}


@dataclass(frozen=True)
class Bits:
    """The bits of a value: allocated (8 or 16), and stored (the bits in use)."""

    allocated: int
    stored: int


@dataclass(frozen=True)
class _Said:
    """The image properties stated by a codestream."""

    height: int
    width: int
    samples: int
    bits: int


class _Damaged(Exception):
    """The codestream is damaged or contradicts the header."""


def has_decoders() -> bool:
    """Returns whether the decoder of all compressions except RLE is installed."""
    return importlib.util.find_spec("imagecodecs") is not None


def decoder_problem() -> str:
    """Returns why only RLE can be decoded; empty if all compressions can."""
    if not has_decoders():
        return "imagecodecs is not installed"
    try:
        import imagecodecs

        codecs = imagecodecs.JPEG8, imagecodecs.JPEGLS, imagecodecs.JPEG2K
        is_whole = all(codec.available for codec in codecs)
    except Exception as error:  # a damaged installation may raise any error
        return f"imagecodecs cannot be imported: {type(error).__name__}"
    return "" if is_whole else "imagecodecs lacks decoders"


def decode_frame(
    pixel_data: bytes, codec: Codec, size: tuple[int, int], bits: Bits, *, name: str
) -> Values:
    """Returns the stored values (height, width), uint8 or uint16 according to the bits allocated.

    For lossless codecs, bits above the bits stored are dropped, as in uncompressed files. For lossy
    codecs, values that became too large are clipped to the largest allowed value.

    Args:
        pixel_data: the value of the element, in fragments.
        size: height and width from the header.
        name: name of the file in errors.

    Raises:
        ContentError: the decoder is not installed; the codestream is damaged, truncated, of another
            kind, or has another size than the header states.
    """
    try:
        frame = _joined(pixel_data)
        if codec.family == "rle":
            values = _rle_decoded(frame, size, bits.allocated // 8)
        else:
            values = _decoded(frame, codec, size, bits.allocated, name)
    except (_Damaged, struct.error, IndexError):
        raise ContentError(
            f"{name}: its {codec.name} pixels are damaged, truncated or of another kind; replace "
            "the file"
        ) from None
    # A codestream may have fewer bits than its file, and uint8 cannot be compared with 4095.
    values = values.astype(np.uint8) if bits.allocated == 8 else values.astype(np.uint16)
    value_max = 2**bits.stored - 1
    return values & value_max if codec.is_lossless else np.minimum(values, value_max)


def _joined(pixel_data: bytes) -> bytes:
    """Returns the joined fragments; skips the first item, a table of offsets."""
    fragments: list[bytes] = []
    position = 0
    while position + 8 <= len(pixel_data):  # a zero byte may pad an odd length
        tag, length = struct.unpack_from("<4sI", pixel_data, position)
        if tag == _END_OF_ITEMS:
            break
        position += 8
        if tag != _ITEM or position + length > len(pixel_data):
            raise _Damaged
        fragments.append(pixel_data[position : position + length])
        position += length
    if len(fragments) < 2:
        raise _Damaged
    return b"".join(fragments[1:])


def _decoded(
    frame: bytes, codec: Codec, size: tuple[int, int], bits_allocated: int, name: str
) -> Values:
    try:
        import imagecodecs
    except ImportError:
        raise ContentError(
            f"{name}: compressed as {codec.name}; install its decoder ({EXTRA}), or decompress the "
            f"file, for example with {codec.tool}"
        ) from None
    said = _j2k_header(frame) if codec.family == "jpeg 2000" else _jpeg_header(frame, codec)
    if (said.height, said.width) != size:
        height, width = size
        raise ContentError(
            f"{name}: its {codec.name} pixels are {said.width}x{said.height}, but its header "
            f"states {width}x{height}; replace the file"
        )
    if said.samples != 1 or not 2 <= said.bits <= bits_allocated:
        raise ContentError(
            f"{name}: its {codec.name} pixels have {said.samples} samples of {said.bits} bits, but "
            f"its header states 1 of up to {bits_allocated}; replace the file"
        )
    if not frame.rstrip(b"\0").endswith(_END_OF_IMAGE):
        raise _Damaged
    out = np.zeros(size, np.uint8 if said.bits <= 8 else np.uint16)
    decode = {
        "jpeg": imagecodecs.jpeg8_decode,
        "jpeg-ls": imagecodecs.jpegls_decode,
        "jpeg 2000": imagecodecs.jpeg2k_decode,
    }[codec.family]
    try:
        decode(frame, out=out)
    except MemoryError:
        raise
    # Each codec raises its own error class, or ValueError or RuntimeError.
    except Exception:
        raise _Damaged from None
    return out


def _jpeg_header(frame: bytes, codec: Codec) -> _Said:
    """Returns the properties from the only frame header of a JPEG or JPEG-LS."""
    if frame[:2] != b"\xff\xd8":
        raise _Damaged
    said = None
    position = 2
    while True:
        if frame[position] != 0xFF:
            raise _Damaged
        while frame[position] == 0xFF:  # fill bytes may precede a marker
            position += 1
        marker = frame[position]
        (length,) = struct.unpack_from(">H", frame, position + 1)
        # Decoders continue right after a marker without a segment; if its next bytes were read as a
        # segment here, a frame header could hide in it.
        if marker < _FIRST_MARKER or marker in _WITHOUT_SEGMENT or length < 2:
            raise _Damaged
        if marker == _START_OF_SCAN:
            break
        if marker in _FRAME_HEADERS:
            if said is not None or marker not in codec.frame_headers:
                raise _Damaged
            bits, height, width, samples = struct.unpack_from(">BHHB", frame, position + 3)
            said = _Said(height, width, samples, bits)
        position += 1 + length
    if said is None:
        raise _Damaged
    return said


def _j2k_header(frame: bytes) -> _Said:
    """Returns the properties from the first segment of a JPEG 2000 codestream."""
    if not frame.startswith(_J2K_START):
        raise _Damaged
    right, bottom, left, top = struct.unpack_from(">4I", frame, 8)
    tile_width, tile_height, tile_left, tile_top = struct.unpack_from(">4I", frame, 24)
    samples, depth, step_x, step_y = struct.unpack_from(">H3B", frame, 40)
    width, height = right - left, bottom - top
    if min(width, height, tile_width, tile_height) < 1 or (step_x, step_y) != (1, 1) or depth > 127:
        raise _Damaged
    across, down = -(-(right - tile_left) // tile_width), -(-(bottom - tile_top) // tile_height)
    if across * down > 1 and across * down * _MIN_TILE_PIXELS > width * height:
        raise _Damaged
    for body in _j2k_coding_styles(frame):
        _check_blocks(body)
    return _Said(height, width, samples, depth + 1)


def _j2k_coding_styles(frame: bytes) -> Iterator[bytes]:
    """Yields the bodies of all COD and COC segments from the style byte on, also in tiles."""
    position, part_end = 2, 0
    while position + 2 <= len(frame):
        (marker,) = struct.unpack_from(">H", frame, position)
        if marker == _END_OF_CODESTREAM:
            return
        if marker == _START_OF_DATA:
            if part_end <= position:
                raise _Damaged
            position = part_end
            continue
        (length,) = struct.unpack_from(">H", frame, position + 2)
        if marker == _START_OF_TILE_PART:
            (part_length,) = struct.unpack_from(">I", frame, position + 6)
            part_end = position + part_length if part_length else len(frame) - 2
        if marker == _COD:
            body = frame[position + 4 : position + 2 + length]
            yield body[:1] + body[5:]
        elif marker == _COC:
            yield frame[position + 5 : position + 2 + length]  # after the component number
        position += 2 + length


def _check_blocks(style: bytes) -> None:
    """Rejects blocks or precincts of few pixels, because OpenJPEG needs memory for each of them.

    Args:
        style: style of a COD or COC segment: whether precincts follow, levels, exponents of a
            block's sides minus 2, two bytes, and the exponents of each level's precincts.
    """
    exponents = [(style[2] & 15) + (style[3] & 15) + 4]
    if style[0] & 1:
        exponents += [(each & 15) + (each >> 4) for each in style[6 : 7 + style[1]]]
    if min(exponents) < _MIN_BLOCK_EXPONENT:
        raise _Damaged


def _rle_decoded(frame: bytes, size: tuple[int, int], num_planes: int) -> Values:
    """Returns values of shape `size`; each byte of a value has its own segment, highest first."""
    num_segments, *offsets = _RLE_HEADER.unpack_from(frame)
    if num_segments != num_planes:
        raise _Damaged
    bounds = [*offsets[:num_segments], len(frame)]
    if bounds[0] < _RLE_HEADER.size or bounds != sorted(bounds):
        raise _Damaged
    planes = [
        np.frombuffer(_unpacked(frame[start:end], size[0] * size[1]), np.uint8)
        for start, end in itertools.pairwise(bounds)
    ]
    if num_planes == 1:
        return planes[0].reshape(size)
    return np.stack(planes[::-1], axis=-1).view("<u2").reshape(size)


def _unpacked(segment: bytes, num_bytes: int) -> bytes:
    """Returns the first `num_bytes` bytes of a decompressed PackBits segment."""
    out = bytearray()
    position = 0
    while len(out) < num_bytes:
        count = segment[position]
        if count < 128:
            out += segment[position + 1 : position + 2 + count]
            position += 2 + count
        elif count > 128:
            out += segment[position + 1 : position + 2] * (257 - count)
            position += 2
        else:
            position += 1
    return bytes(out[:num_bytes])
