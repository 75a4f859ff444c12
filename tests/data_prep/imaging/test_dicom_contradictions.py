"""Headers and codestreams that contradict each other: one error, or the pixels that were promised.

An error of another kind would end the preparation of a whole data set for one of its files.
"""

import functools
import io
import struct
import tempfile
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st
from pydicom import uid

from data_prep.imaging.dicom.frames import CODECS
from flexunet.errors import ContentError
from tests.data_prep.imaging.compressed_dicom import (
    BITS,
    HEIGHT,
    LOSSLESS,
    LOSSY,
    WIDTH,
    changed,
    compressed,
    dataset_of,
    frame_of,
    pixels_of,
    read,
    saved,
)

PLAIN = uid.ExplicitVRLittleEndian
KEYWORDS = (
    *("SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "Rows", "Columns"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData"),
)


@functools.cache
def _codestream(syntax, bits):
    """Returns the compressed `pixels_of(bits)`, 2 to 16 bits; of plain files their pixels."""
    pixels = pixels_of(bits).astype(np.uint8 if bits <= 8 else np.uint16)
    family = CODECS[str(syntax)].family if syntax != PLAIN else "plain"
    if family == "plain":
        return pixels.tobytes()
    if family == "jpeg 2000":
        return imagecodecs.jpeg2k_encode(
            pixels, bitspersample=bits, codecformat="j2k", level=0, reversible=True
        )
    if syntax in (uid.JPEGLossless, uid.JPEGLosslessSV1):
        return imagecodecs.jpeg8_encode(pixels, bitspersample=bits, lossless=True)
    if family == "jpeg":
        with tempfile.TemporaryDirectory() as folder:
            return frame_of(compressed(syntax, bits, Path(folder)))
    dataset = dataset_of(pixels_of(bits), bits)
    if bits < 8:
        dataset.BitsAllocated, dataset.PixelData = 8, pixels.tobytes()
        dataset["PixelData"].VR = "OB"
    dataset.compress(syntax)
    return frame_of(saved(dataset))


def _element(keyword, kind, value):
    tag = pydicom.datadict.tag_for_keyword(keyword)
    start = struct.pack("<HH2s", tag >> 16, tag & 0xFFFF, kind.encode())
    if kind in ("OB", "OW", "UN"):
        return start + struct.pack("<HI", 0, len(value)) + value
    return start + struct.pack("<H", len(value)) + value


def _fragments(codestream):
    """Returns the element PixelData of a codestream."""
    item, end = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"
    start = struct.pack("<HH2sHI", 0x7FE0, 0x10, b"OB", 0, 0xFFFFFFFF)
    body = struct.pack("<4sI4sI", item, 0, item, len(codestream)) + codestream
    return start + body + struct.pack("<4sI", end, 0)


def _file(syntax, pixel_data, changes):
    """Returns a DICOM file of 12 bits whose elements are `changes`, (VR, bytes) by keyword.

    `pixel_data` is a whole element. A value of None leaves an element out.
    """
    name = str(syntax).encode()
    name += b"\0" * (len(name) % 2)
    meta = struct.pack("<HH2sH", 2, 0x10, b"UI", len(name)) + name
    numbers = {
        "SamplesPerPixel": 1,
        "Rows": HEIGHT,
        "Columns": WIDTH,
        "BitsAllocated": 16,
        "BitsStored": 12,
        "HighBit": 11,
        "PixelRepresentation": 0,
    }
    elements = {keyword: ("US", struct.pack("<H", each)) for keyword, each in numbers.items()}
    elements["PhotometricInterpretation"] = ("CS", b"MONOCHROME2 ")
    elements |= changes
    body = b"".join(
        _element(keyword, *elements[keyword])
        for keyword in sorted(elements, key=pydicom.datadict.tag_for_keyword)
        if elements[keyword] is not None
    )
    group_length = struct.pack("<HH2sHI", 2, 0, b"UL", 4, len(meta))
    return bytes(128) + b"DICM" + group_length + meta + body + pixel_data


def _bits(allocated, stored):
    numbers = {"BitsAllocated": allocated, "BitsStored": stored, "HighBit": stored - 1}
    return {keyword: ("US", struct.pack("<H", each)) for keyword, each in numbers.items()}


@pytest.mark.parametrize("syntax", [*LOSSLESS, *LOSSY])
def test_a_codestream_of_8_bits_is_read_in_a_file_of_12(syntax, tmp_path):
    """As it is: 255 of 4095, as an uncompressed file with such values would be read."""
    eight = compressed(syntax, 8, tmp_path)

    def change(dataset):
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11

    if syntax == uid.RLELossless:  # one segment, where 16 bits have two
        with pytest.raises(ContentError, match="RLE lossless pixels are damaged"):
            read(changed(eight, change))
        return
    found, true = read(changed(eight, change)), read(eight)
    assert (found.pixels.dtype, found.value_max) == (np.uint16, 4095)
    assert np.array_equal(found.pixels, true.pixels)


HEADERS = [(8, 1), (8, 7), (8, 8), (16, 1), (16, 8), (16, 9), (16, 12), (16, 15), (16, 16)]


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("syntax", [*LOSSLESS, *LOSSY])
def test_any_number_of_bits_in_any_header_is_an_error_or_the_image(syntax, photometric):
    kind = {"PhotometricInterpretation": ("CS", photometric.encode() + b" ")}
    num_read = 0
    for bits in BITS.get(syntax, range(2, 17)):
        pixel_data = _fragments(_codestream(syntax, bits))
        for allocated, stored in HEADERS:
            file = _file(syntax, pixel_data, kind | _bits(allocated, stored))
            try:
                found = read(file)
            except ContentError:
                is_rle_of_another = syntax == uid.RLELossless and (bits > 8) != (allocated > 8)
                assert stored < 8 or bits > allocated or is_rle_of_another
                continue
            num_read += 1
            assert found.pixels.dtype == (np.uint8 if allocated == 8 else np.uint16)
            assert (found.pixels.shape, found.value_max) == ((HEIGHT, WIDTH, 1), 2**stored - 1)
            if CODECS[str(syntax)].is_lossless:
                true = pixels_of(bits) & found.value_max
                true = found.value_max - true if photometric == "MONOCHROME1" else true
                assert np.array_equal(found.pixels[:, :, 0], true)
    assert num_read >= 6


NUMBERS = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FD": "d", "FL": "f"}


@st.composite
def _values(draw):
    """Draws (VR, bytes) of an element: mostly a number that is near what a header may say."""
    kinds = [*["US"] * 4, "SS", "UL", "SL", "FD", "FL", "IS", "DS", "OB", "UN"]
    kind = draw(st.sampled_from(kinds))
    plausible = st.sampled_from([0, 1, 2, 7, 8, 9, 11, 12, 15, 16, 17, 32, HEIGHT, WIDTH, 2000])
    number = draw(st.one_of(plausible, st.integers(0, 0x7FFF)))
    if kind not in ("US", "UL") and draw(st.booleans()):
        number = -number
    count = draw(st.sampled_from([1, 1, 1, 1, 0, 2]))
    if kind in NUMBERS:
        return kind, struct.pack(f"<{count}{NUMBERS[kind]}", *[number] * count)
    if kind in ("IS", "DS"):
        text = "\\".join([str(number)] * count).encode()
        return kind, text + b" " * (len(text) % 2)
    return kind, draw(st.binary(max_size=9))


TEXTS = st.sampled_from([b"MONOCHROME1 ", b"MONOCHROME2 ", b"RGB ", b"", b"MONOCHROME1\\X "])
CHANGES = st.fixed_dictionaries(
    {},
    optional={keyword: st.one_of(_values(), st.none()) for keyword in KEYWORDS}
    | {"PhotometricInterpretation": st.tuples(st.just("CS"), TEXTS)},
).map(lambda drawn: drawn if len(drawn) < 3 else dict(list(drawn.items())[:1]))
STREAMS = st.sampled_from(
    [
        (syntax, bits)
        for syntax in (PLAIN, *LOSSLESS, *LOSSY)
        for bits in BITS.get(syntax, (2, 8, 9, 12, 16))
    ]
)
BYTES = st.lists(st.tuples(st.integers(132, 330), st.integers(0, 255)), max_size=2)
NEGATIVE = {  # both sides negative, so that their product is not
    "Rows": ("SS", struct.pack("<h", -HEIGHT)),
    "Columns": ("SS", struct.pack("<h", -WIDTH)),
}


@given(STREAMS, CHANGES, BYTES)
@example((uid.JPEGBaseline8Bit, 8), {}, [])
@example((uid.RLELossless, 12), NEGATIVE, [])
@example((PLAIN, 12), NEGATIVE, [])
@example((PLAIN, 12), {"PixelData": ("US", b"12")}, [])
@example((uid.JPEG2000, 12), {"PixelData": ("US", b"12")}, [])
@settings(max_examples=300, deadline=None)
def test_any_header_is_an_error_or_the_image_that_it_promises(stream, changes, bytes_changed):
    syntax, bits = stream
    codestream = _codestream(syntax, bits)
    elements = {keyword: each for keyword, each in changes.items() if keyword != "PixelData"}
    pixel_data = _fragments(codestream)
    if syntax == PLAIN:
        pixel_data = _element("PixelData", "OW", codestream)
    if changes.get("PixelData") is not None:
        pixel_data = _element("PixelData", *changes["PixelData"])
    data = bytearray(_file(syntax, pixel_data, elements))
    for position, value in bytes_changed:
        data[position % len(data)] = value
    try:
        found = read(bytes(data))
    except ContentError as error:
        assert str(error).startswith("a.dcm: ")
        return
    event("read")
    header = pydicom.dcmread(io.BytesIO(data))
    assert found.pixels.shape == (header.Rows, header.Columns, 1)
    assert found.pixels.dtype == (np.uint8 if header.BitsAllocated == 8 else np.uint16)
    assert found.value_max == 2**header.BitsStored - 1
    assert found.pixels.max() <= found.value_max
