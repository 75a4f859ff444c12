"""DICOM data without the preamble is read; anything else is named for what it is."""

import gzip
import io
import struct

import numpy as np
import pydicom
import pytest
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from data_prep.imaging.dicom.preamble import SIGNATURE_BYTES, is_bare, is_dicom, with_preamble
from data_prep.imaging.dicom.reader import read_dicom
from data_prep.phantoms.inbreast_release import dicom_bytes
from flexunet.errors import ContentError

PIXELS = np.array([[0, 1, 4095], [7, 300, 2000]], np.uint16)
WHOLE = dicom_bytes(PIXELS, 12, spacing_mm=0.07, key="x")


def _read(data):
    return read_dicom(data, name="a.dcm", max_pixels=100)


def _alone(*, is_implicit):
    """Returns the data set alone, as it is sent over a network."""
    dataset = pydicom.dcmread(io.BytesIO(WHOLE))
    file = DicomBytesIO()
    file.is_implicit_VR, file.is_little_endian = is_implicit, True
    write_dataset(file, pydicom.Dataset({each.tag: each for each in dataset}))
    return file.getvalue()


BARE = {
    "meta": WHOLE[SIGNATURE_BYTES:],
    # The length of the group, 12 bytes, is often left out; the next element has a long header.
    "meta, no length": WHOLE[SIGNATURE_BYTES + 12 :],
    "explicit": _alone(is_implicit=False),
    "implicit": _alone(is_implicit=True),
}


@pytest.mark.parametrize("kind", BARE)
def test_data_without_a_preamble_are_read(kind):
    data = BARE[kind]
    assert (is_dicom(data), is_bare(data)) == (False, True)
    found = _read(data)
    assert np.array_equal(found.pixels[:, :, 0], PIXELS)
    assert (found.value_max, found.spacing_mm) == (4095, (0.07, 0.07))
    assert is_dicom(with_preamble(data))
    assert not is_bare(with_preamble(data))


def test_a_file_with_a_preamble_is_not_bare():
    assert (is_dicom(WHOLE), is_bare(WHOLE)) == (True, False)


def test_a_compressed_data_set_without_its_syntax_is_refused():
    data = BARE["explicit"]
    place = data.index(b"\xe0\x7f\x10\x00OW") + 8
    frame = struct.pack("<4sI", b"\xfe\xff\x00\xe0", 4) + b"abcd"
    end = struct.pack("<4sI", b"\xfe\xff\xdd\xe0", 0)
    hostile = data[:place] + b"\xff\xff\xff\xff" + frame + end
    with pytest.raises(
        ContentError, match="compressed, but the file meta information, which states"
    ):
        _read(hostile)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it is empty; replace it"),
        (bytes(5000), "it starts with zeros only; replace it"),
        (b"\x89PNG\r\n\x1a\n" + bytes(200), "it is a PNG image; replace it"),
        (gzip.compress(WHOLE), "it is packed with gzip; unpack it"),
        (b"PK\x03\x04" + bytes(200), "it is a ZIP archive; unpack it"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS; fetch the file with git lfs"),
        (b"<!DOCTYPE html>" + b" " * 200, "it is an XML or HTML document; replace it"),
        (b"text" * 100, "neither DICM at byte 128 nor an element of group 0002 or 0008"),
        (WHOLE[:131], "neither DICM"),
        (b"\x08\x00", "neither DICM"),
        (b"\x08\x00\x16\x00UI", "neither DICM"),
        # An element of the right group, and nothing that could follow it.
        (b"\x08\x00\x16\x00UI\x02\x001\x00" + b"\x08\x00\x05\x00" + bytes(99), "neither DICM"),
        (b"\x08\x00\x16\x00UI\x02\x001\x00" + b"\xff\xff\x05\x00" + bytes(99), "neither DICM"),
        (b"\x08\x00\x16\x00\xff\xff\xff\xff" + bytes(999), "neither DICM"),
        # Meta information is explicit.
        (b"\x02\x00\x10\x00\x02\x00\x00\x001\x00" + b"\x08\x00\x05\x00" + bytes(9), "neither DICM"),
        # Big endian.
        (b"\x00\x08\x00\x16UI\x00\x021\x00" + b"\x00\x08\x00\x18" + bytes(99), "neither DICM"),
    ],
)
def test_what_is_not_dicom_is_named(data, words):
    assert not is_bare(data)
    with pytest.raises(ContentError, match=rf"^a\.dcm: not a DICOM file: .*{words}"):
        _read(data)


@pytest.mark.parametrize("kind", BARE)
def test_damaged_data_without_a_preamble_are_one_error_or_an_image(kind):
    data = BARE[kind]
    rng = np.random.default_rng(1)
    broken = [data[:length] for length in range(0, len(data), 3)]
    for i in range(400):
        changed = bytearray(data)
        for position in rng.integers(0, len(data) if i % 2 else 60, 1 + i % 4):
            changed[position] = rng.integers(256)
        broken.append(bytes(changed))
    num_refused = 0
    for each in broken:
        try:
            assert _read(each).pixels.ndim == 3
        except ContentError as error:
            num_refused += 1
            assert str(error).startswith("a.dcm: ")
            assert "\n" not in str(error)
    assert num_refused > 200
