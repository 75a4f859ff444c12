"""Decodes image files with limits, and encodes pixels losslessly.

The module handles the image formats; it does not depend on classes, datasets or storage.

Decoding rules, the same for images and masks:
- The format is detected from the content, never from the extension: PNG, JPEG, TIFF, BMP or GIF.
- The header is checked before any pixel is decoded: size, one frame, upright.
- The frame of a GIF must fill the image: no background is invented around it.
- Alpha is dropped, not composited: the colours under it are data, and no background is invented.
- A palette is replaced by its 8-bit colours. CMYK and YCbCr become RGB. 1-, 2- and 4-bit grey is
  scaled to 0..255, as the formats define it, so 1-bit gives 0 and 255.
- 16-bit values are kept, grey or colour. Signed, float and 32-bit values are rejected.
- An EXIF orientation other than upright is rejected: the mask may have been drawn on the rotated or
  on the stored image, and a wrong guess would not be noticed.
- Metadata is dropped: the module returns only pixels.
"""

import io
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from data_prep.imaging.pixels import Pixels
from data_prep.imaging.quiet import quiet_pillow
from data_prep.imaging.tiff import (
    PALETTE,
    RGB,
    TIFF_SIGNATURES,
    WHITE_IS_ZERO,
    Kind,
    Tiff,
    tiff_kind,
)
from flexunet.errors import ContentError

if TYPE_CHECKING:
    from PIL import Image

DEFAULT_MAX_PIXELS = 100_000_000

_PILLOW_LIMIT = threading.Lock()  # of all threads of the process
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF")
_GIF_SIGNATURES = (b"GIF87a", b"GIF89a")
_SIGNATURES = (b"\x89PNG", b"\xff\xd8", b"BM", *_GIF_SIGNATURES, *TIFF_SIGNATURES)
_MAX_BYTES_PER_PIXEL = 8  # four channels of 16 bits, not compressed
_MAX_METADATA_BYTES = 64 * 2**20
_EXIF_ORIENTATION = 0x0112
_PNG_SIGNATURE_BYTES = 8
_PNG_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_PNG_GREY_TYPES = (0, 4)  # grey, grey with alpha
_BMP_BITS = 28  # position of the byte
_GIF_HEADER_BYTES = 13  # signature and logical screen
# Measured on 24 mammograms of 512x512, grey, one core: run lengths with the Paeth filter 2.2 ms and
# 56.6 kB; OpenCV's default 1.9 ms, 60.7 kB; deflate level 6 with all filters 5.8 ms, 60.3 kB; level
# 9 11 ms, 59.9 kB. Film grain has no repetitions for deflate to find.
_PNG_LEVEL = 1


def is_image(data: bytes) -> bool:
    """Returns whether `data` starts like a PNG, JPEG, TIFF, BMP or GIF file."""
    return data.startswith(_SIGNATURES)


def read_image(data: bytes, *, name: str, max_pixels: int = DEFAULT_MAX_PIXELS) -> Pixels:
    """Returns the pixels of an image: (H, W, C) uint8 or uint16, C is 1 (grey) or 3 (RGB).

    Args:
        data: the whole file: PNG, JPEG, TIFF, BMP or GIF.
        name: name of the file in errors.
        max_pixels: larger images are rejected before they are decoded.

    Raises:
        ContentError: not an image, corrupt, truncated, too large, more than one frame, rotated by
            EXIF, or values that are not unsigned integers of at most 16 bits.
    """
    pixels = _decode(data, name=name, max_pixels=max_pixels)
    return pixels[:, :, np.newaxis] if pixels.ndim == 2 else pixels


def read_mask_pixels(data: bytes, *, name: str, max_pixels: int = DEFAULT_MAX_PIXELS) -> Pixels:
    """Returns the pixels of a mask: (H, W) uint8 or uint16 grey, or (H, W, 3) uint8 RGB.

    A palette is replaced by its colours, as in an image viewer. 16-bit colours keep their upper 8
    bits.

    Raises:
        ContentError: see `read_image`.
    """
    pixels = _decode(data, name=name, max_pixels=max_pixels)
    if pixels.ndim == 3 and pixels.dtype == np.uint16:
        return (pixels >> 8).astype(np.uint8)
    return pixels


def encode_png(pixels: Pixels, *, is_mask: bool = False) -> bytes:
    """Returns `pixels` as a lossless PNG without metadata; the same pixels give the same bytes.

    Args:
        pixels: (H, W), (H, W, 1) or (H, W, 3) RGB; uint8 or uint16.
        is_mask: mostly uniform areas, which decode faster without a PNG filter.

    Raises:
        ValueError: another shape or dtype.
    """
    import cv2

    shape_ok = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (1, 3))
    if not shape_ok or pixels.size == 0 or pixels.dtype not in (np.uint8, np.uint16):
        raise ValueError(
            f"cannot write {pixels.shape} {pixels.dtype} as PNG; "
            "give (H, W), (H, W, 1) or (H, W, 3), uint8 or uint16"
        )
    is_rgb = pixels.ndim == 3 and pixels.shape[2] == 3
    stored = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if is_rgb else pixels
    strategy = cv2.IMWRITE_PNG_STRATEGY_DEFAULT if is_mask else cv2.IMWRITE_PNG_STRATEGY_RLE
    options = [cv2.IMWRITE_PNG_COMPRESSION, _PNG_LEVEL, cv2.IMWRITE_PNG_STRATEGY, strategy]
    # OpenCV 4.11, the newest for NumPy 1, has no filter option: larger files with the same pixels.
    if hasattr(cv2, "IMWRITE_PNG_FILTER"):
        # The Paeth filter saves 2 % of a mammogram's bytes, but nearly doubles the decoding time.
        options += [
            cv2.IMWRITE_PNG_FILTER,
            cv2.IMWRITE_PNG_FILTER_NONE if is_mask else cv2.IMWRITE_PNG_FILTER_UP,
        ]
    _, encoded = cv2.imencode(".png", np.ascontiguousarray(stored), options)
    return encoded.tobytes()


def _decode(data: bytes, *, name: str, max_pixels: int) -> Pixels:
    """Returns (H, W) grey or (H, W, 3) RGB, uint8 or uint16, never read-only."""
    if len(data) > max_pixels * _MAX_BYTES_PER_PIXEL + _MAX_METADATA_BYTES:
        raise ContentError(
            f"{name}: {len(data)} bytes are more than an image of {max_pixels} pixels can need; "
            "downscale the image, or increase --max-pixels"
        )
    with decoding(data, name=name):
        if data.startswith(TIFF_SIGNATURES):
            return _decode_tiff(data, name=name, max_pixels=max_pixels)
        if data.startswith(_GIF_SIGNATURES):
            _check_gif(data, name=name, max_pixels=max_pixels)
        image = open_image(data, name=name, max_pixels=max_pixels)
        if image.format == "PNG":
            return _decode_png(data, image, name=name)
        if image.format == "BMP" and image.mode == "L" and data[_BMP_BITS] < 8:
            raise ValueError("grey of 4 bits, which Pillow takes for 8; save it as PNG")
        _refuse_orientation(image.getexif().get(_EXIF_ORIENTATION, 1), name=name)
        return _to_array(image)


@contextmanager
def decoding(data: bytes, *, name: str) -> Iterator[None]:
    """Converts any error of a decoder into a ContentError that names the file."""
    from PIL import UnidentifiedImageError

    # Pillow warns of odd but harmless tags; it raises an error if the pixels are damaged.
    with quiet_pillow():
        try:
            yield
        except (ContentError, MemoryError):
            raise
        # Damaged files make Pillow raise errors of many types; the block only decodes these bytes.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            if isinstance(error, UnidentifiedImageError):  # its text names the stream, not the file
                reason = "unknown format"
            if data.startswith(_SIGNATURES):
                why = ": ".join(filter(None, (tiff_kind(data), reason)))
                reason = f"the image is truncated, damaged or of an unsupported kind ({why})"
            elif isinstance(error, UnidentifiedImageError):
                reason = f"not a {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]} file"
            raise ContentError(f"{name}: {reason}; replace the file") from error


def open_image(data: bytes, *, name: str, max_pixels: int) -> "Image.Image":
    """Opens an image and checks its header, without decoding pixels."""
    from PIL import Image

    # Pillow's limit only warns, and is not the user's limit, which is checked on the same header.
    with _PILLOW_LIMIT:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = before
    _refuse_size(*image.size, name=name, max_pixels=max_pixels)
    # Not for TIFF, whose directory was checked before: counting frames takes quadratic time in a
    # malicious file.
    if image.format != "TIFF" and getattr(image, "n_frames", 1) > 1:
        _refuse_frames(name=name)
    return image


def _refuse_size(width: int, height: int, *, name: str, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ContentError(
            f"{name}: {width}x{height} is {width * height} pixels, more than {max_pixels}; "
            "downscale the image, or increase --max-pixels"
        )


def _refuse_frames(*, name: str) -> None:
    raise ContentError(f"{name}: has more than one frame; save one frame as a separate file")


def _refuse_orientation(orientation: object, *, name: str) -> None:
    if orientation in range(2, 9):
        raise ContentError(
            f"{name}: EXIF orientation {orientation} rotates the image against its mask; save it "
            "upright, without the tag"
        )


def _check_gif(data: bytes, *, name: str, max_pixels: int) -> None:
    """Checks the size of the image and of its only frame.

    Pillow would already reserve the memory of the frame when it opens the file.
    """
    size = struct.unpack_from("<HH", data, 6)
    _refuse_size(*size, name=name, max_pixels=max_pixels)
    frames = _gif_frames(data)
    box = next(frames, None)
    if box is None:
        raise ValueError("no frame")
    left, top, width, height = box
    _refuse_size(width, height, name=f"{name}: its frame", max_pixels=max_pixels)
    if (left, top, width, height) != (0, 0, *size):
        raise ContentError(
            f"{name}: its frame of {width}x{height} pixels at {left}, {top} does not fill the "
            f"image of {size[0]}x{size[1]}; save it again as PNG"
        )
    if next(frames, None) is not None:
        _refuse_frames(name=name)


def _gif_frames(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Yields (left, top, width, height) of each frame; stops at the end or at unknown data."""
    position = _GIF_HEADER_BYTES + _gif_color_bytes(data[10])
    while True:
        kind = data[position : position + 1]
        if kind == b",":
            *box, flags = struct.unpack_from("<4HB", data, position + 1)
            yield box[0], box[1], box[2], box[3]
            position += 11 + _gif_color_bytes(flags)  # and the byte with the bits of a code
        elif kind == b"!":  # an extension
            position += 2
        else:
            return
        while position < len(data) and data[position]:
            position += data[position] + 1
        position += 1


def _gif_color_bytes(flags: int) -> int:
    """Returns the bytes of the colour table that the upper bit of `flags` announces."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _decode_png(data: bytes, image: "Image.Image", *, name: str) -> Pixels:
    """Decodes a PNG with OpenCV, which keeps 16-bit colours and is 1.3 times as fast as Pillow.

    Before that, Pillow verifies the checksum of every chunk and the end of the file, so that libpng
    prints nothing about them on stderr; OpenCV rejects pixel data that ends early.
    """
    import cv2
    from PIL import Image

    image.verify()
    pixel_chunks = [data[:_PNG_SIGNATURE_BYTES]]
    color_type = -1
    for kind, chunk in _png_chunks(data):
        if kind in _PNG_PIXEL_CHUNKS:
            pixel_chunks.append(chunk)
        if kind == b"IHDR":
            color_type = chunk[17]
        elif kind == b"eXIf":
            exif = Image.Exif()
            exif.load(chunk[8:-4])
            _refuse_orientation(exif.get(_EXIF_ORIENTATION, 1), name=name)
    # Without colour profiles, transparency and text, libpng has nothing to apply or to print on
    # stderr.
    plain = np.frombuffer(b"".join(pixel_chunks), np.uint8)
    pixels = _imdecode(plain, cv2.IMREAD_UNCHANGED)
    if color_type in _PNG_GREY_TYPES:
        return pixels if pixels.ndim == 2 else np.ascontiguousarray(pixels[:, :, 0])
    return _from_bgr(pixels)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields (kind, the whole chunk) of a PNG whose structure was verified, up to IEND."""
    position = _PNG_SIGNATURE_BYTES
    kind = b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            raise ValueError("truncated chunk")  # the last one: verify skips its checksum
        yield kind, data[position:end]
        position = end


def _decode_tiff(data: bytes, *, name: str, max_pixels: int) -> Pixels:
    """Decodes a TIFF with Pillow, and 16-bit colours with OpenCV.

    Neither reads all 16-bit files, nor one plane of two; `Tiff` rewrites such files for Pillow.
    """
    import cv2

    tiff = Tiff(data)
    kind = tiff.kind
    _check_tiff(kind, name=name, max_pixels=max_pixels)

    def opened(file: bytes) -> "Image.Image":
        return open_image(file, name=name, max_pixels=max_pixels)

    if kind.is_16_bit and kind.photometric == RGB:
        if kind.is_planar:
            return np.stack([_to_array(opened(tiff.plane(i))) for i in range(3)], axis=-1)
        opened(data).load()  # checks that the file is complete: OpenCV may decode half a file
        return _from_bgr(_imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED))
    if kind.is_16_bit and kind.photometric == PALETTE and kind.samples == 1:
        return _palette_colors(tiff)[_to_array(opened(tiff.plane(0)))]
    if kind.is_grey and kind.samples == 2 and kind.is_16_bit and not kind.is_planar:
        return _from_black(_first_of_pairs(np.array(opened(tiff.as_rgba8())), kind), kind)
    # With planes, even of one sample, Pillow ignores white-is-zero and bits below 8.
    if kind.is_grey and kind.samples <= 2 and (kind.is_planar or kind.is_16_bit):
        return _from_black(_to_array(opened(tiff.plane(0))), kind)
    if kind.is_planar and kind.bits[0] < 8:
        raise ContentError(f"{name}: unsupported kind of TIFF ({kind}); save it as contiguous")
    return _to_array(opened(data))


def _check_tiff(kind: Kind, *, name: str, max_pixels: int) -> None:
    _refuse_size(kind.width, kind.height, name=name, max_pixels=max_pixels)
    # A tile is decoded completely, even if the image is smaller.
    _refuse_size(kind.tile_width, kind.tile_height, name=f"{name}: a tile", max_pixels=max_pixels)
    if kind.has_more_frames:
        _refuse_frames(name=name)
    _refuse_orientation(kind.orientation, name=name)
    formats = sorted(set(kind.sample_formats))
    if max(kind.bits) > 16 or len(set(kind.bits)) > 1 or not set(formats) <= {1, 4}:
        raise ContentError(
            f"{name}: TIFF of sample format {formats} ({kind}); "
            "save it with unsigned values of 8 or 16 bits"
        )


def _palette_colors(tiff: Tiff) -> Pixels:
    """Returns the palette (number of colours, 3) uint8: the upper 8 bits of the file's values."""
    return (np.array(tiff.palette(), np.uint16) >> 8).astype(np.uint8).reshape(3, -1).T


def _first_of_pairs(pixels: Pixels, kind: Kind) -> Pixels:
    """Returns the first of two 16-bit samples as (H, W) uint16.

    Args:
        pixels: (H, W, 4) uint8, the bytes of both samples in the order of the file.
    """
    first = pixels.view(f"{kind.order}u2")[:, :, 0].astype(np.uint16)
    if kind.has_differences:
        width = kind.tile_width or kind.width
        for left in range(0, kind.width, width):
            part = first[:, left : left + width]
            np.cumsum(part, axis=1, dtype=np.uint16, out=part)  # modulo 65536, like the encoder
    return first


def _from_black(pixels: Pixels, kind: Kind) -> Pixels:
    """Returns grey pixels with 0 as black; inverts white-is-zero."""
    return np.iinfo(pixels.dtype).max - pixels if kind.photometric == WHITE_IS_ZERO else pixels


def _to_array(image: "Image.Image") -> Pixels:
    """Returns the pixels (H, W) or (H, W, 3) of an image that Pillow decodes without loss."""
    image.load()
    if image.mode in ("L", "LA", "La", "1"):
        return np.array(image.convert("L"))
    if image.mode.startswith("I;16"):
        return np.array(image).astype(np.uint16, copy=False)
    straight = image.convert("RGBA") if image.mode == "RGBa" else image
    return np.array(straight if straight.mode == "RGB" else straight.convert("RGB"))


def _imdecode(data: npt.NDArray[np.uint8], flags: int) -> Pixels:
    import cv2

    pixels = cv2.imdecode(data, flags)
    if pixels is None:
        raise ValueError("pixel data is corrupt or ends early")
    return pixels


def _from_bgr(pixels: Pixels) -> Pixels:
    import cv2

    has_alpha = pixels.shape[2] == 4
    return cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGB if has_alpha else cv2.COLOR_BGR2RGB)
