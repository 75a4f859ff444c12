"""Reads pixels, full scale and pixel spacing of a DICOM file, and nothing else of it.

Supports one grey frame of unsigned values of 8 to 16 bits. The module does not depend on datasets,
annotations or storage, or on the format of compressed frames.

- Only the necessary elements are parsed; text, private elements and sequences are skipped. No error
  quotes the value of an element, because it could identify the patient.
- The header is checked before any pixel is decoded: transfer syntax, size, length of the pixels.
  The size stated by a compressed frame must be the same.
- MONOCHROME1 (white is 0) is inverted, so that dense tissue is bright in every image. Rescaling and
  windows are for viewers and are not applied: pixels are the stored values.
- An image marked to have burned-in text is rejected. An image without the mark may still have some.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from data_prep.imaging.dicom.frames import CODECS, Bits, Codec, decode_frame
from data_prep.imaging.dicom.preamble import (
    SIGNATURE_BYTES,
    describe_other,
    has_meta,
    is_bare,
    is_dicom,
    with_preamble,
)
from data_prep.imaging.quiet import quiet_pydicom
from flexunet.errors import ContentError

if TYPE_CHECKING:
    from pydicom import FileDataset

    from data_prep.imaging.pixels import Pixels

DICOM_ENDINGS = (".dcm", ".dic", ".dicom", ".ima")

Reader = Literal["pydicom", "tfio"]

_META_GROUP = 0x0002
_PIXEL_DATA = 0x7FE00010
_MAX_HEADER_BYTES = 64 * 2**20
_MAX_SPACING_MM = 10.0
_SYNTAXES = {
    "1.2.840.10008.1.2": "implicit little endian",
    "1.2.840.10008.1.2.1": "explicit little endian",
}
_REFUSED_SYNTAXES = {
    "1.2.840.10008.1.2.1.99": ("deflated", "dcmconv +te of DCMTK"),
    "1.2.840.10008.1.2.2": ("big endian", "dcmconv +te of DCMTK"),
}
_ELEMENTS = [
    *("SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "Rows", "Columns"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("ImagerPixelSpacing", "PixelSpacing", "BurnedInAnnotation", "PixelData"),
]


@dataclass(frozen=True)
class Radiograph:
    """The content read from a DICOM file.

    Attributes:
        pixels: (H, W, 1) uint8 or uint16; larger is brighter.
        value_max: the value of full intensity, 2**(bits stored) - 1.
        spacing_mm: height and width of a pixel at the detector; None if the file lacks them.
    """

    pixels: "Pixels"
    value_max: int
    spacing_mm: tuple[float, float] | None


def read_dicom(
    data: bytes, *, name: str, max_pixels: int, reader: Reader = "pydicom"
) -> Radiograph:
    """Returns the image of a DICOM file.

    Args:
        data: the whole file; its preamble and file meta information may be missing.
        name: name of the file in errors.
        max_pixels: larger images are rejected before they are decoded.
        reader: decoder of uncompressed pixels; both give the same pixels.

    Raises:
        UsageError: the reader is not installed.
        ContentError: not DICOM, an unsupported compression, not one grey frame of unsigned values,
            too large, truncated, or marked to have burned-in text.
    """
    has_syntax = True
    if not is_dicom(data):
        if not is_bare(data):
            raise ContentError(f"{name}: not a DICOM file: {describe_other(data)}")
        has_syntax = has_meta(data)
        data = with_preamble(data)
    # Invalid values are rejected or not used; a warning would quote them.
    with quiet_pydicom():
        dataset, codec = _parsed(data, name)
        if not has_syntax:
            _refuse_unknown_compression(dataset, name)
        _check_kind(dataset, name)
        _check_size(dataset, len(data), name, max_pixels, is_compressed=codec is not None)
        is_inverted = dataset.PhotometricInterpretation == "MONOCHROME1"
        pixels = _pixels_of(dataset, codec, name, reader)
        value_max = 2 ** int(dataset.BitsStored) - 1
        if is_inverted:
            pixels = pixels.dtype.type(value_max) - pixels
        return Radiograph(pixels[:, :, np.newaxis], value_max, _spacing_of(dataset, name))


def _parsed(data: bytes, name: str) -> tuple["FileDataset", Codec | None]:
    """Returns the necessary elements, and the codec, which is None for uncompressed pixels."""
    import pydicom

    with _parsing(name):
        # Only the meta information of a deflated file may be read: it may decompress endlessly.
        file = io.BytesIO(data[SIGNATURE_BYTES:])
        meta = pydicom.filereader.read_dataset(
            file,
            is_implicit_VR=False,
            is_little_endian=True,
            stop_when=lambda tag, *_: tag >> 16 != _META_GROUP,
        )
        syntax = str(meta.TransferSyntaxUID)
    codec = CODECS.get(syntax)
    if codec is None and syntax not in _SYNTAXES:
        raise ContentError(f"{name}: {_why_refused(syntax)}")
    with _parsing(name):
        dataset = pydicom.dcmread(io.BytesIO(data), specific_tags=list(_ELEMENTS))
        for keyword in _ELEMENTS:
            _ = dataset.get(keyword)  # elements are converted on access
    return dataset, codec


def _refuse_unknown_compression(dataset: "FileDataset", name: str) -> None:
    """Rejects compressed pixels if the file does not state the compression."""
    with _parsing(name):
        pixel_data = dataset.get_item(_PIXEL_DATA)
        is_compressed = pixel_data is not None and pixel_data.is_undefined_length
    if is_compressed:
        raise ContentError(
            f"{name}: its pixels are compressed, but the file meta information, which states how, "
            "is missing; export it again as a DICOM file"
        )


def _why_refused(syntax: str) -> str:
    """Returns why a transfer syntax is not supported; does not quote an unknown one."""
    if syntax in _REFUSED_SYNTAXES:
        what, tool = _REFUSED_SYNTAXES[syntax]
        return f"stored as {what}, which is not supported; convert it, for example with {tool}"
    known = ", ".join(
        dict.fromkeys([*_SYNTAXES.values(), *(each.name for each in CODECS.values())])
    )
    return (
        f"unsupported compression or storage (supported: {known}); convert it to explicit little "
        "endian with the program that wrote it"
    )


@contextmanager
def _parsing(name: str) -> Iterator[None]:
    """Converts any error of pydicom into a ContentError that quotes nothing of the file."""
    try:
        yield
    except (ContentError, MemoryError):
        raise
    # pydicom raises KeyError, ValueError, struct.error, EOFError and more; these quote values.
    except Exception:
        raise ContentError(f"{name}: damaged or incomplete DICOM file; replace it") from None


def _check_kind(dataset: "FileDataset", name: str) -> None:
    """Rejects all files except those with one grey frame of unsigned values."""
    bits = [_number(dataset, key) for key in ("BitsAllocated", "BitsStored", "HighBit")]
    allocated, stored, high = bits
    kinds = {
        "samples per pixel": (_number(dataset, "SamplesPerPixel", 1), 1),
        "frames": (_number(dataset, "NumberOfFrames", 1), 1),
        "pixel representation (1: signed)": (_number(dataset, "PixelRepresentation"), 0),
    }
    for what, (found, wanted) in kinds.items():
        if found != wanted:
            raise ContentError(f"{name}: {what} {found}, only {wanted} is supported; convert it")
    if dataset.get("PhotometricInterpretation") not in ("MONOCHROME1", "MONOCHROME2"):
        raise ContentError(f"{name}: not a grey image (MONOCHROME1 or MONOCHROME2); convert it")
    if allocated not in (8, 16) or stored is None or not 8 <= stored <= allocated:
        raise ContentError(
            f"{name}: {stored} bits stored in {allocated}, 8 to 16 are supported; convert it"
        )
    if high != stored - 1:
        raise ContentError(f"{name}: highest bit {high}, {stored - 1} is supported; convert it")
    if "YES" in str(dataset.get("BurnedInAnnotation", "")).upper():  # it may hold several values
        raise ContentError(
            f"{name}: is marked to have text burned into its pixels, which may name the patient; "
            "blank the text and mark it BurnedInAnnotation NO, or leave the file out"
        )


def _check_size(
    dataset: "FileDataset", num_bytes: int, name: str, max_pixels: int, *, is_compressed: bool
) -> None:
    height, width = _number(dataset, "Rows", 0), _number(dataset, "Columns", 0)
    pixel_data = dataset.get("PixelData")
    # A damaged file may have numbers instead of pixels, and negative sizes.
    if min(height, width) < 1 or not isinstance(pixel_data, bytes) or not pixel_data:
        raise ContentError(f"{name}: contains no image; leave the file out")
    if height * width > max_pixels:
        raise ContentError(
            f"{name}: {width}x{height} is {height * width} pixels, more than {max_pixels}; "
            "downscale the image, or increase --max-pixels"
        )
    wanted = height * width * int(dataset.BitsAllocated) // 8
    found = len(pixel_data)
    if not is_compressed and found not in (wanted, wanted + wanted % 2):
        raise ContentError(
            f"{name}: {found} bytes of pixels, but {width}x{height} need {wanted}; replace the file"
        )
    if num_bytes - found > _MAX_HEADER_BYTES:
        raise ContentError(
            f"{name}: {num_bytes - found} bytes besides the pixels, more than {_MAX_HEADER_BYTES}; "
            "replace the file"
        )


def _pixels_of(
    dataset: "FileDataset", codec: Codec | None, name: str, reader: Reader
) -> np.ndarray:
    """Returns the pixels (H, W) uint8 or uint16, with the bits stored only."""
    if codec is not None:
        size = int(dataset.Rows), int(dataset.Columns)
        bits = Bits(int(dataset.BitsAllocated), int(dataset.BitsStored))
        return decode_frame(dataset.PixelData, codec, size, bits, name=name)
    if reader == "tfio":
        from data_prep.imaging.dicom.tfio import decode

        pixels = decode(_plain_file(dataset), name)
        return pixels.astype(np.uint8 if dataset.BitsAllocated == 8 else np.uint16, copy=False)
    with _parsing(name):
        return np.array(dataset.pixel_array)


def _plain_file(dataset: "FileDataset") -> bytes:
    """Returns a file with only the checked elements, as MONOCHROME2.

    tensorflow-io applies rescaling, and inverts MONOCHROME1 wrongly: 4095 becomes 1 instead of 0.
    """
    dataset.PhotometricInterpretation = "MONOCHROME2"
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


def _number(dataset: "FileDataset", keyword: str, default: int | None = None) -> Any:
    """Returns an element that is a whole number, else `default`."""
    value = dataset.get(keyword)
    return int(value) if isinstance(value, int) else default


def _spacing_of(dataset: "FileDataset", name: str) -> tuple[float, float] | None:
    """Returns the spacing at the detector, else that of the image; None if neither is plausible.

    Source: DICOM PS3.3 C.8.11.7 (ImagerPixelSpacing: rows first, at the detector's plane).
    """
    from pydicom.multival import MultiValue

    for keyword in ("ImagerPixelSpacing", "PixelSpacing"):
        values = dataset.get(keyword)
        if isinstance(values, MultiValue) and len(values) == 2:
            with _parsing(name):
                height, width = (float(value) for value in values)
            if 0 < height <= _MAX_SPACING_MM and 0 < width <= _MAX_SPACING_MM:
                return height, width
    return None
