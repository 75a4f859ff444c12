"""DICOM files without an ending are found by their first 132 bytes, and nothing more is read."""

import io
import os

import numpy as np
import pydicom
import pytest
from pydicom.uid import JPEGLSLossless, RLELossless

from data_prep import pipeline
from data_prep.config import HASH_KEY_VARIABLE, PrepConfig
from data_prep.phantoms.inbreast_release import dicom_bytes, write_release
from data_prep.prep_input import sources_of
from data_prep.sources import inbreast
from data_prep.sources.dicom_files import dicom_without_ending, stem_of
from flexunet.storage import open_source

DICOM = dicom_bytes(np.zeros((4, 4), np.uint16), 12, spacing_mm=0.07, key="x")
FOUND = ["1.2.840.113619.2", "IM000001", "a.xyz", "cd/DIR/00000002", "e.123"]
OTHERS = {
    "a.dcm": DICOM,  # found by their endings
    "a.DICOM": DICOM,
    "a.ima": DICOM,
    "a.png": DICOM,
    "DICOMDIR": DICOM,  # the contents of a CD
    "notes.txt": DICOM,  # not looked into
    "table.csv": DICOM,
    ".hidden": DICOM,
    "short": DICOM[:131],
    "empty": b"",
    "letters": b"x" * 1000,
}


class Recorded:
    """A store that records its reads."""

    def __init__(self, store):
        self.store = store
        self.reads = []

    def __getattr__(self, name):
        return getattr(self.store, name)

    def get(self, name, start=0, length=None):
        self.reads.append((name, start, length))
        return self.store.get(name, start, length)


def _filled(store):
    for name in FOUND:
        store.put(name, DICOM)
    for name, data in OTHERS.items():
        store.put(name, data)
    return Recorded(store)


def _check(store):
    assert dicom_without_ending(store, store.list()) == set(FOUND)
    assert sorted(store.reads) == sorted((name, 0, 132) for name in [*FOUND, "letters"])


def test_they_are_found_in_a_folder(tmp_path):
    _check(_filled(open_source(str(tmp_path))))


def test_they_are_found_in_a_bucket_by_a_ranged_read_each(bucket_url):
    _check(_filled(open_source(bucket_url)))


def test_what_cannot_be_read_is_none(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / ("nothing" * 30))
    (tmp_path / os.fsdecode(b"caf\xe9")).write_bytes(DICOM)
    (tmp_path / "IM1").write_bytes(DICOM)
    store = Recorded(open_source(str(tmp_path)))
    assert dicom_without_ending(store, store.list()) == {"IM1"}


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        *(("a.dcm", "a"), ("a.DCM", "a"), ("a.dicom", "a"), ("a.ima", "a"), ("x/a.png", "x/a")),
        *(("1.2.840.1", "1.2.840.1"), ("IM1", "IM1"), ("a.xyz", "a.xyz"), ("x.y/IM1", "x.y/IM1")),
    ],
)
def test_the_stem_of_a_number_is_the_whole_number(name, stem):
    assert stem_of(name) == stem


def test_a_release_without_endings_is_found(tmp_path):
    for folder, name, data in (
        ("AllDICOMs", "20_aa_MG_R_CC_ANON", DICOM),
        ("AllDICOMs", "21_bb_MG_R_CC_ANON.dicom", DICOM),
        ("AllDICOMs", "22_cc_MG_R.1", DICOM),
        ("AllDICOMs", "23_dd_notes", b"x" * 200),
        ("AllDICOMs", "readme", DICOM),  # not named as in the release
        ("AllXML", "20.xml", b"x"),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_bytes(data)
    pairs, rejects = inbreast.find_cases(inbreast.find_release(str(tmp_path)))
    assert [(pair.id, pair.mask_name) for pair in pairs] == [
        ("20_aa_MG_R_CC_ANON", "20.xml"),
        ("21_bb_MG_R_CC_ANON", None),
        ("22_cc_MG_R.1", None),
    ]
    assert rejects == []


def _prepared(source, output, **options):
    config = PrepConfig(format="inbreast", image_size=32, num_processes=1, **options)
    pipeline.prepare(sources_of(str(source), config), str(output), config, progress=False)
    return [path.read_bytes() for path in sorted(output.glob("*.tfrecord"))]


def test_a_dataset_of_compressed_files_is_that_of_plain_ones(tmp_path):
    write_release(str(tmp_path / "plain"), 4, 48, 1)
    write_release(str(tmp_path / "packed"), 4, 48, 1)
    for i, path in enumerate(sorted((tmp_path / "packed" / "AllDICOMs").iterdir())):
        dataset = pydicom.dcmread(io.BytesIO(path.read_bytes()))
        dataset.compress((RLELossless, JPEGLSLossless)[i % 2], generate_instance_uid=False)
        dataset.save_as(path, enforce_file_format=True)
    assert _prepared(tmp_path / "plain", tmp_path / "a") == _prepared(
        tmp_path / "packed", tmp_path / "b"
    )


def test_hidden_names_show_nothing_of_a_name_with_dots(tmp_path, monkeypatch):
    monkeypatch.setenv(HASH_KEY_VARIABLE, "k" * 32)
    write_release(str(tmp_path / "source"), 4, 48, 1)
    for path in (tmp_path / "source" / "AllDICOMs").iterdir():
        path.rename(path.with_suffix(".JANE"))
    assert _prepared(tmp_path / "source", tmp_path / "out", hash_names=True)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if b"JANE" in path.read_bytes() + os.fsencode(path.name)]
