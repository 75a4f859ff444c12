"""DICOM files: 16 bits kept, photometric interpretation, limits, hostile and broken files."""

import io

import numpy as np
import pydicom
import pytest
from pydicom.uid import ImplicitVRLittleEndian

from data_prep.imaging.dicom.reader import read_dicom
from data_prep.phantoms.inbreast_release import dicom_bytes
from flexunet.errors import ContentError

PIXELS = np.array([[0, 1, 4095], [7, 300, 2000]], np.uint16)


def _file(pixels=PIXELS, bits=12, photometric="MONOCHROME2"):
    return dicom_bytes(pixels, bits, spacing_mm=0.07, key="x", photometric=photometric)


def _changed(change, **saving):
    """Returns the file after `change(dataset)`."""
    dataset = pydicom.dcmread(io.BytesIO(_file()))
    change(dataset)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True, **saving)
    return buffer.getvalue()


def _set(**values):
    def change(dataset):
        for key, value in values.items():
            setattr(dataset, key, value)

    return change


def _read(data, max_pixels=100):
    return read_dicom(data, name="a.dcm", max_pixels=max_pixels)


def test_read_dicom_keeps_the_stored_values_scale_and_spacing():
    found = _read(_file())
    assert (found.pixels.dtype, found.pixels.shape) == (np.uint16, (2, 3, 1))
    assert np.array_equal(found.pixels[:, :, 0], PIXELS)
    assert (found.value_max, found.spacing_mm) == (4095, (0.07, 0.07))
    assert _read(_file(PIXELS * 16, bits=16)).value_max == 65535


def test_read_dicom_reads_implicit_little_endian():
    def implicit(dataset):
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian

    found = _read(_changed(implicit, implicit_vr=True, little_endian=True))
    assert np.array_equal(found.pixels[:, :, 0], PIXELS)


def test_read_dicom_makes_dense_tissue_bright_where_white_is_zero():
    found = _read(_file(photometric="MONOCHROME1"))
    # 4095 - v
    assert found.pixels[:, :, 0].tolist() == [[4095, 4094, 0], [4088, 3795, 2095]]


def test_read_dicom_reads_8_bits_as_8_bits():
    def shallow(dataset):
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
        dataset.PixelData = bytes([0, 1, 2, 3, 4, 255])
        dataset["PixelData"].VR = "OB"

    found = _read(_changed(shallow))
    assert found.pixels.dtype == np.uint8
    assert found.pixels.ravel().tolist() == [0, 1, 2, 3, 4, 255]
    assert found.value_max == 255


def test_read_dicom_drops_what_is_above_the_bits_stored():
    """Old files keep overlays there. 4095 of 11 bits is 2047."""
    found = _read(_changed(_set(BitsStored=11, HighBit=10)))
    assert found.pixels.ravel().tolist() == [0, 1, 2047, 7, 300, 2000]
    assert found.value_max == 2047


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        ([0.05, 0.07], (0.05, 0.07)),
        ([0, 0.07], None),
        (["inf", "0.07"], None),
        ([0.07, 0.07, 0.07], None),
        (None, None),
    ],
)
def test_read_dicom_takes_a_spacing_that_makes_sense(spacing, expected):
    def change(dataset):
        dataset["ImagerPixelSpacing"].value = spacing

    with pydicom.config.disable_value_validation():
        data = _changed(change)
    assert _read(data).spacing_mm == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set(PixelRepresentation=1), r"pixel representation \(1: signed\) 1, only 0"),
        (_set(NumberOfFrames=2), "frames 2, only 1"),
        (_set(SamplesPerPixel=3), "samples per pixel 3, only 1"),
        (_set(PhotometricInterpretation="PALETTE COLOR"), "not a grey image"),
        (_set(BitsAllocated=32, BitsStored=32, HighBit=31), "32 bits stored in 32"),
        (_set(BitsStored=7, HighBit=6), "7 bits stored in 16"),
        (_set(HighBit=15), "highest bit 15, 11 is supported"),
        (_set(BurnedInAnnotation="YES"), "text burned into its pixels"),
        (_set(BurnedInAnnotation=["NO", "YES"]), "text burned into its pixels"),
        (_set(Rows=3), "12 bytes of pixels, but 3x3 need 18"),
        (_set(Rows=0), "contains no image"),
        (_set(Rows=60000, Columns=60000), "is 3600000000 pixels, more than 100"),
        (lambda dataset: dataset.pop("PixelData"), "contains no image"),
    ],
)
def test_read_dicom_refuses_in_one_line(change, message):
    with pytest.raises(ContentError, match=rf"^a\.dcm: .*{message}"):
        _read(_changed(change))


def test_read_dicom_refuses_what_is_no_dicom_file():
    for data in (b"", b"\x89PNG", bytes(200)):
        with pytest.raises(ContentError, match="not a DICOM file"):
            _read(data)


def test_read_dicom_of_a_damaged_file_is_one_error_or_an_image():
    whole = _file()
    rng = np.random.default_rng(1)
    num_refused = 0
    for i in range(600):
        data = bytearray(whole[: rng.integers(140, len(whole))] if i % 3 == 0 else whole)
        for position in rng.integers(132, len(data), 1 + i % 3):
            data[position] = rng.integers(256)
        try:
            assert _read(bytes(data)).pixels.size <= 100
        except ContentError as error:
            num_refused += 1
            assert str(error).startswith("a.dcm: ")
    assert num_refused > 200  # every third is cut off
