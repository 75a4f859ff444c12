"""Masks in .npz files: ids and one-hot classes, and archives that are damaged or too large."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest

from data_prep.imaging.pixels import Pixels
from data_prep.masks.npz import read_npz_mask
from flexunet.errors import ContentError


def npz(**arrays: object) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


@pytest.mark.parametrize(
    "mask",
    [
        np.array([[0, 1, 2]], np.uint8),
        np.array([[0, 1, 2]], np.int64),
        np.array([[0, 1, 2]], np.float32),
        np.array([[[0], [1], [2]]], np.uint8),
        np.array([[[1, 0, 0], [0, 1, 0], [0, 0, 1]]], np.uint8),
        np.array([[[1, 0, 0], [0, 1, 0], [0, 0, 1]]], bool),
        np.asfortranarray(np.array([[[1, 0, 0], [0, 1, 0], [0, 0, 1]]], np.float64)),
    ],
)
def test_read_npz_mask_reads_ids_and_one_hot(mask: Pixels) -> None:
    for data in (npz(mask=mask), npz(other=np.zeros(3), mask=mask)):
        pixels = read_npz_mask(data, "a.npz", num_classes=3)
        assert pixels.dtype == np.uint8
        assert pixels.tolist() == [[0, 1, 2]]


def test_read_npz_mask_keeps_grey_levels() -> None:
    assert read_npz_mask(npz(mask=np.array([[0, 255]])), "a").tolist() == [[0, 255]]
    assert read_npz_mask(npz(mask=np.array([[0, 65535]])), "a").dtype == np.uint16
    assert read_npz_mask(npz(mask=np.array([[False, True]])), "a").tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a readable .npz mask"),
        (b"PK\3\4 and nothing", "not a readable .npz mask"),
        (npz(mask=np.zeros((9, 9)))[:-40], "not a readable .npz mask"),
        (npz(label=np.zeros((9, 9))), "no array 'mask', only label"),
        (npz(mask=np.zeros(9)), r"the mask is \(9,\) float64"),
        (npz(mask=np.zeros((2, 2, 2, 2))), r"the mask is \(2, 2, 2, 2\)"),
        (npz(mask=np.zeros((0, 5))), r"the mask is \(0, 5\)"),
        (npz(mask=np.array([["a"]])), r"the mask is \(1, 1\) <U1"),
        (npz(mask=np.array([[{}]], object)), r"the mask is \(1, 1\) object"),
        (npz(mask=np.array([[-1]])), "values that are not whole numbers"),
        (npz(mask=np.array([[0.5]])), "values that are not whole numbers"),
        (npz(mask=np.array([[np.nan]])), "values that are not whole numbers"),
        (npz(mask=np.array([[65536]])), "values that are not whole numbers"),
        (npz(mask=np.array([[[1, 1, 0]]])), "not one-hot"),
        (npz(mask=np.array([[[0, 0, 0]]])), "not one-hot"),
        (npz(mask=np.array([[[0.4, 0.6, 0]]])), "not one-hot"),
        (npz(mask=np.array([[[1, 0]]])), "one-hot mask of 2 classes; expected 3"),
    ],
)
def test_read_npz_mask_names_what_is_wrong(data: bytes, message: str) -> None:
    with pytest.raises(ContentError, match=rf"^a\.npz: .*{message}") as caught:
        read_npz_mask(data, "a.npz", num_classes=3)
    assert "\n" not in str(caught.value)


def test_read_npz_mask_refuses_a_bomb_before_it_inflates() -> None:
    data = npz(mask=np.zeros((8000, 8000), np.uint8))
    assert len(data) < 70_000
    tracemalloc.start()
    with pytest.raises(ContentError, match="decompresses to 64000128 bytes"):
        read_npz_mask(data, "a", max_pixels=10_000)
    with pytest.raises(ContentError, match="8000x8000 is more than 2000000 pixels"):
        read_npz_mask(data, "a", max_pixels=2_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6


def test_read_npz_mask_refuses_a_header_that_promises_more_than_there_is() -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (9000, 9000)}
    )
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("mask.npy", header.getvalue() + b"\0\1\1")
    with pytest.raises(ContentError, match="^a: not a readable"):  # noqa: RUF043
        read_npz_mask(archive.getvalue(), "a")


def archive(member: bytes, kind: int = zipfile.ZIP_DEFLATED, name: str = "mask.npy") -> bytes:
    """Returns a zip file with one member, compressed as `kind`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as file:
        file.writestr(name, member)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def header(text: str) -> bytes:
    return b"\x93NUMPY\x02\x00" + len(text).to_bytes(4, "little") + text.encode() + b"\0\1\1\0"


SMALL = npy(np.array([[0, 1]], np.uint8))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (archive(SMALL, zipfile.ZIP_BZIP2), "is compressed with bzip2; .*numpy.savez_compressed"),
        (archive(SMALL, zipfile.ZIP_LZMA), "is compressed with lzma; .*numpy.savez_compressed"),
        (archive(header(" " * 20_000)), "a header of 20000 bytes"),
        (archive(header("{'descr': '|u1', 'fortran_order': False, 'shape': (-2, -2)}")), "-2"),
        (archive(header("{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 5)}")), "-1"),
        (archive(header("-" * 9_000 + "1")), "not a readable"),
        (archive(header("(" * 9_000)), "not a readable"),
        (archive(header("{'descr': '|u1', 'fortran_order': False, 'shape': (2, 9)}")), "ends earl"),
        (archive(npy(np.zeros((1, 1, 600), np.uint8))), "one-hot mask of 600 classes"),
        (archive(SMALL, name="a\nb.npy"), "no array 'mask', only a b;"),
        (archive(SMALL, name="n" * 60_000), "no array 'mask', only nnn"),
        (
            archive(SMALL).replace(b"\x14\0\0\0\x08\0", b"\x14\0\0\0\x61\0"),
            "is compressed with method 97",
        ),
        (npz(mask=np.zeros(64 * (1,), np.uint8)), r"the mask is \(1, 1"),
    ],
)
def test_a_hostile_archive_is_one_line(data: bytes, message: str) -> None:
    with pytest.raises(ContentError, match=rf"^a\.npz: .*{message}") as caught:
        read_npz_mask(data, "a.npz", max_pixels=1000)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("seed", range(3))
def test_damaged_bytes_are_one_line(seed: int) -> None:
    rng = np.random.default_rng(seed)
    good = npz(mask=np.eye(3, dtype=np.float32)[rng.integers(0, 3, (9, 9))])
    for _ in range(200):
        data = bytearray(good)
        for _ in range(int(rng.integers(1, 4))):
            data[int(rng.integers(len(data)))] = int(rng.integers(256))
        try:
            read_npz_mask(bytes(data), "a.npz", max_pixels=100)
        except ContentError as error:
            assert str(error).startswith("a.npz: ")
            assert "\n" not in str(error)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float64, ">i2"])
def test_a_mask_of_many_blocks_is_read_as_the_whole_array(order: str, dtype: str) -> None:
    ids = np.random.default_rng(0).integers(0, 7, (300, 211)).astype(np.uint8)
    one_hot = np.eye(7)[ids].astype(dtype).copy(order)  # type: ignore[call-overload]
    for mask in (one_hot, ids.astype(dtype).copy(order)):  # type: ignore[call-overload]
        assert np.array_equal(read_npz_mask(npz(mask=mask), "a", num_classes=7), ids)
    one_hot[299, 210, 3] = one_hot[299, 210, 4] = 1
    with pytest.raises(ContentError, match="not one-hot"):
        read_npz_mask(npz(mask=one_hot), "a")


def test_the_memory_does_not_depend_on_the_type_and_the_classes() -> None:
    data = npz(mask=np.eye(8)[np.random.default_rng(0).integers(0, 8, (500, 500))])
    tracemalloc.start()
    read_npz_mask(data, "a", num_classes=8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6  # 16 MB of float64 are read in blocks
