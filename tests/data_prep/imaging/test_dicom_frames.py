"""Compressed DICOM files: what other programs wrote is read."""

import io
import struct
import sys

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom import uid

from data_prep.imaging.dicom.frames import CODECS, has_decoders
from data_prep.phantoms.inbreast_release import dicom_bytes
from flexunet.errors import ContentError
from tests.data_prep.imaging.compressed_dicom import (
    DECODED,
    HEIGHT,
    LOSSLESS,
    LOSSY,
    TABLE,
    WIDTH,
    by_gdcm,
    changed,
    compressed,
    dataset_of,
    frame_of,
    pixels_of,
    read,
    saved,
    with_frame,
)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(("syntax", "bits"), TABLE)
def test_what_other_programs_compressed_is_read(syntax, bits, photometric, tmp_path):
    found = read(compressed(syntax, bits, tmp_path, photometric))
    top = 2**bits - 1
    true = pixels_of(bits) if photometric == "MONOCHROME2" else top - pixels_of(bits)
    assert found.pixels.dtype == (np.uint8 if bits == 8 else np.uint16)
    assert (found.pixels.shape, found.value_max) == ((HEIGHT, WIDTH, 1), top)
    error = np.abs(found.pixels[:, :, 0].astype(int) - true).max()
    assert error <= LOSSY.get(syntax, 0) * top
    assert (error > 0) == (syntax in LOSSY)


def test_the_table_has_every_compression_that_is_read():
    assert {str(syntax) for syntax, _ in TABLE} == CODECS.keys()


@pytest.mark.parametrize("syntax", LOSSLESS)
def test_values_in_more_bits_than_are_stored_are_read_as_of_uncompressed_files(syntax, tmp_path):
    """8 bits stored in 16, and 12 bits of which the header has 11: the highest is an overlay."""
    for bits, stored in ((8, 8), (12, 11)):
        pixels = pixels_of(bits)
        plain = dicom_bytes(pixels, bits, spacing_mm=0.07, key="x")
        dataset = pydicom.dcmread(io.BytesIO(plain))
        if syntax in (uid.JPEGLSLossless, uid.JPEG2000Lossless):
            dataset.compress(syntax)
        else:  # pydicom writes RLE of 8 bits in 16 as of 8 in 8
            dataset = by_gdcm(dataset, syntax, tmp_path)

        def change(dataset, stored=stored):
            dataset.BitsStored, dataset.HighBit = stored, stored - 1

        first, second = read(changed(plain, change)), read(changed(saved(dataset), change))
        assert np.array_equal(first.pixels, second.pixels)
        assert first.pixels.dtype == second.pixels.dtype == np.uint16


def test_a_lossy_value_beyond_the_bits_stored_is_the_largest():
    codestream = imagecodecs.jpegls_encode(np.full((HEIGHT, WIDTH), 4095 + 20, np.uint16))
    dataset = dataset_of(pixels_of(12), 12)
    dataset.compress(uid.JPEGLSNearLossless, jls_error=1)
    assert set(read(with_frame(saved(dataset), codestream)).pixels.ravel()) == {4095}


@pytest.mark.parametrize("syntax", [*LOSSLESS, *LOSSY])
def test_fragments_are_joined(syntax, tmp_path):
    data = compressed(syntax, 8, tmp_path)
    frame = frame_of(data)
    third = len(frame) // 6 * 2
    pieces = [frame[:third], frame[third : 2 * third], frame[2 * third :]]
    assert np.array_equal(read(with_frame(data, pieces)).pixels, read(data).pixels)


# Missing decoders


@pytest.mark.parametrize("syntax", DECODED)
def test_without_the_extra_it_says_what_to_do(syntax, tmp_path, monkeypatch):
    data = compressed(syntax, 8, tmp_path)
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    assert not has_decoders()
    with pytest.raises(ContentError) as found:
        read(data)
    codec = CODECS[str(syntax)]
    assert str(found.value) == (
        f"a.dcm: compressed as {codec.name}; install its decoder "
        f"(pip install 'flexunet[dicom]'), or decompress the file, for example with {codec.tool}"
    )


def test_the_tools_are_those_that_decode_it():
    tools = {codec.family: codec.tool for codec in CODECS.values()}
    assert tools == {
        "rle": "dcmdrle of DCMTK",
        "jpeg": "dcmdjpeg of DCMTK",
        "jpeg-ls": "dcmdjpls of DCMTK",
        "jpeg 2000": "gdcmconv --raw of GDCM",
    }


def test_rle_needs_no_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    found = read(compressed(uid.RLELossless, 12, tmp_path))
    assert np.array_equal(found.pixels[:, :, 0], pixels_of(12))


@pytest.mark.parametrize(
    ("syntax", "said"),
    [
        (uid.DeflatedExplicitVRLittleEndian, "stored as deflated, .*dcmconv \\+te of DCMTK"),
        (uid.ExplicitVRBigEndian, "stored as big endian, .*dcmconv \\+te of DCMTK"),
        (uid.MPEG2MPML, "unsupported compression or storage"),
        ("1.2.3.4.99999", "unsupported compression or storage"),
    ],
)
def test_other_syntaxes_are_refused_before_they_are_parsed(syntax, said, tmp_path, monkeypatch):
    data = saved(dataset_of(pixels_of(12), 12))
    old, new = (str(each).encode() for each in (uid.ExplicitVRLittleEndian, syntax))
    new = new if len(new) % 2 == 0 else new + b"\0"
    place = data.index(b"\x02\x00\x10\x00UI")
    length = struct.unpack_from("<H", data, place + 6)[0]
    assert data[place + 8 : place + 8 + length].rstrip(b"\0") == old
    data = data[: place + 6] + struct.pack("<H", len(new)) + new + data[place + 8 + length :]
    # The length of the meta information.
    size = struct.unpack_from("<I", data, 140)[0] + len(new) - length
    data = data[:140] + struct.pack("<I", size) + data[144:]
    monkeypatch.setattr("zlib.decompress", None)
    with pytest.raises(ContentError, match=said) as found:
        read(data)
    assert "99999" not in str(found.value)
