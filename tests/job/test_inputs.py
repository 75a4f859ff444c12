"""Which files of a folder are images, and how many of them are looked into."""

import numpy as np
import pytest

from data_prep.imaging.codecs import encode_png
from data_prep.imaging.dicom.preamble import SIGNATURE_BYTES
from data_prep.phantoms.inbreast_release import dicom_bytes
from flexunet.errors import ContentError, UsageError
from flexunet.storage import LocalStore, open_store
from job.inference.inputs import find_images, read_any

DICOM = dicom_bytes(np.zeros((4, 4), np.uint16), 12, spacing_mm=0.07, key="x")


@pytest.fixture
def looked_into(monkeypatch):
    """Returns a list of the files that were read."""
    names = []
    true = LocalStore.get

    def recorded(self, name, *args):
        names.append(name)
        return true(self, name, *args)

    monkeypatch.setattr(LocalStore, "get", recorded)
    return names


def _filled(folder, files):
    store = open_store(str(folder))
    for name, data in files.items():
        store.put(name, data)
    return store


@pytest.mark.parametrize(
    "files",
    [
        {"b.png": b"x", "d.dcm": b"x", "f.tif": b"x"},
        {"IM1": DICOM, "IM2": DICOM, "IM3": DICOM, "IM4": b"x" * 200},
        {"a": DICOM, "b.png": b"x", "c": b"x" * 200, "d": DICOM, "e.png": b"x", "f": DICOM},
        {"a/1": DICOM, "a.png": b"x", "a0": DICOM, "B": DICOM, "\u00fc": DICOM, "z.json": b"x"},
    ],
)
def test_the_first_images_are_the_first_of_all(tmp_path, files):
    store = _filled(tmp_path, files)
    for count in range(len(files) + 2):
        assert find_images(store, count) == find_images(store)[:count]


def test_no_more_files_are_looked_into_than_the_first_images_take(tmp_path, looked_into):
    """In a bucket each look is a request; 32 are on their way at a time."""
    files = {f"m{i:03}": DICOM for i in range(200)}
    store = _filled(
        tmp_path, {"a1": b"x" * 200, "b.png": b"x", "c1": DICOM, "d.png": b"x", **files}
    )
    assert find_images(store, 1) == ["b.png"]
    assert looked_into == ["a1"]
    assert find_images(store, 3) == ["b.png", "c1", "d.png"]
    assert len(looked_into) < 1 + 3 + 40
    looked_into.clear()
    assert find_images(store, 10)[3:] == [f"m{i:03}" for i in range(7)]
    assert len(looked_into) < 10 + 40


def test_a_folder_that_does_not_fit_is_refused_whatever_the_count(tmp_path):
    store = _filled(tmp_path / "a", {"x.txt": b"x", "y": b"y" * 200})
    for count in (0, 1, None):
        with pytest.raises(UsageError, match="no images here"):
            find_images(store, count)
    store = _filled(tmp_path / "b", {f"{name}.png": b"x" for name in ("images/1", "masks/1")})
    for count in (0, 1, None):
        with pytest.raises(UsageError, match="has images/ and masks/"):
            find_images(store, count)


def test_a_preamble_may_be_missing_where_the_ending_is_that_of_dicom():
    bare = DICOM[SIGNATURE_BYTES:]
    for name in ("a.dcm", "a.DICOM", "a.ima"):
        pixels, value_max = read_any(bare, name=name)
        assert (pixels.shape, value_max) == ((4, 4, 1), 4095)
    with pytest.raises(ContentError, match="not a PNG, JPEG"):
        read_any(bare, name="a.png")


def test_an_image_named_as_dicom_is_read_and_anything_else_is_named():
    image = encode_png(np.zeros((5, 6), np.uint8))
    assert read_any(image, name="a.dcm")[0].shape == (5, 6, 1)
    with pytest.raises(ContentError, match=r"a\.dcm: not a DICOM file: it is empty; replace it"):
        read_any(b"", name="a.dcm")
