"""tensorflow-io gives the pixels of pydicom, on the stack that it loads with."""

import importlib.util
import io
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import ImplicitVRLittleEndian

from data_prep.config import PrepConfig
from data_prep.imaging.dicom.reader import read_dicom
from data_prep.imaging.dicom.tfio import decode
from data_prep.phantoms.inbreast_release import dicom_bytes, write_release
from data_prep.pipeline import prepare
from data_prep.prep_input import sources_of
from flexunet.errors import ContentError, UsageError

HAS_TFIO = importlib.util.find_spec("tensorflow_io") is not None
needs_tfio = pytest.mark.skipif(not HAS_TFIO, reason="needs the extra tfio (make test-oldest)")

PIXELS = np.array([[0, 1, 4095], [7, 300, 2000]], np.uint16)


def _both(data):
    """Returns what both readers make of `data`."""
    return [
        read_dicom(data, name="a", max_pixels=10**6, reader=reader)
        for reader in ("pydicom", "tfio")
    ]


def _changed(change, **saving):
    dataset = pydicom.dcmread(io.BytesIO(dicom_bytes(PIXELS, 12, spacing_mm=0.07, key="x")))
    change(dataset)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True, **saving)
    return buffer.getvalue()


@needs_tfio
def test_a_release_is_read_pixel_by_pixel_equal(tmp_path):
    write_release(str(tmp_path), 3, 192, 1)
    paths = sorted((tmp_path / "AllDICOMs").iterdir())
    assert len(paths) == 10
    for path in paths:
        # The bare decoder, and the reader around it.
        data = path.read_bytes()
        assert np.array_equal(decode(data, "a"), pydicom.dcmread(path).pixel_array)
        first, second = _both(data)
        assert np.array_equal(first.pixels, second.pixels)
        assert (first.value_max, first.spacing_mm) == (second.value_max, second.spacing_mm)


def _shallow(dataset):
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
    dataset.PixelData = bytes([0, 1, 2, 3, 4, 255])
    dataset["PixelData"].VR = "OB"


def _implicit(dataset):
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian


def _set(**values):
    return lambda dataset: [setattr(dataset, key, value) for key, value in values.items()]


@needs_tfio
@pytest.mark.parametrize(
    ("change", "saving"),
    [
        (_set(PhotometricInterpretation="MONOCHROME1"), {}),
        (_set(RescaleSlope=2, RescaleIntercept=-5), {}),
        (_set(WindowCenter=100, WindowWidth=50), {}),
        (_set(BitsStored=11, HighBit=10), {}),
        (_shallow, {}),
        (_implicit, {"implicit_vr": True, "little_endian": True}),
    ],
)
def test_every_kind_of_file_is_read_equal(change, saving):
    first, second = _both(_changed(change, **saving))
    assert first.pixels.dtype == second.pixels.dtype
    assert np.array_equal(first.pixels, second.pixels)


@needs_tfio
def test_a_file_that_cannot_be_decoded_is_one_error():
    with pytest.raises(ContentError, match=r"^a\.dcm: tensorflow-io cannot decode it"):
        decode(bytes(300), "a.dcm")


def _prepared(source, output, reader):
    config = PrepConfig(format="inbreast", image_size=32, num_processes=1, dicom_reader=reader)
    prepare(sources_of(str(source), config), str(output), config, progress=False)
    files = sorted(path for path in Path(output).rglob("*") if path.is_file())
    return {path.name: path.read_bytes() for path in files if not path.name.startswith(".")}


@needs_tfio
def test_the_dataset_is_the_same_with_either_reader(tmp_path):
    write_release(str(tmp_path / "release"), 4, 64, 1)
    first, second = (
        _prepared(tmp_path / "release", tmp_path / reader, reader) for reader in ("pydicom", "tfio")
    )
    assert first == second


@pytest.mark.skipif(HAS_TFIO, reason="needs an environment without the extra tfio")
def test_without_the_extra_the_reader_says_what_to_install(tmp_path):
    write_release(str(tmp_path / "release"), 3, 48, 1)
    with pytest.raises(UsageError, match="install the extra tfio"):
        _prepared(tmp_path / "release", tmp_path / "out", "tfio")
    assert not (tmp_path / "out" / "dataset.json").exists()
