"""Images of any number of channels: read from .npy files, stored as PNG, bit for bit."""

import io
import pickle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from data_prep.imaging.arrays import (
    check_storable,
    decode_image,
    encode_image,
    is_npy,
    read_npy,
)
from data_prep.imaging.codecs import encode_png
from data_prep.imaging.geometry import apply_geometry, fit, undo_geometry
from flexunet.errors import ContentError


def saved(array: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), **options)
    return file.getvalue()


def image(channels: int, dtype: Any = np.uint8, height: int = 9, width: int = 7) -> np.ndarray:
    values = np.random.default_rng(channels).integers(
        0, np.iinfo(dtype).max, (height, width, channels), endpoint=True
    )
    return values.astype(dtype)


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 9])
def test_arrays_are_read_bit_for_bit(channels: int, dtype: str, version: tuple[int, int]) -> None:
    expected = image(channels, np.uint16 if "2" in dtype else np.uint8)
    for array in (expected.astype(dtype), np.asfortranarray(expected.astype(dtype))):
        data = saved(array, version=version)
        assert is_npy(data)
        found = read_npy(data, name="a.npy")
        assert np.array_equal(found, expected)
        assert found.dtype == expected.dtype
        assert found.flags.c_contiguous
        assert found.flags.writeable


def test_an_array_without_channels_is_grey() -> None:
    expected = image(1)
    assert np.array_equal(read_npy(saved(expected[..., 0]), name="a.npy"), expected)


class Touch:
    """Creates a file where it is unpickled."""

    def __reduce__(self) -> Any:
        return open, ("EXECUTED", "w")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (saved(np.zeros((4, 4, 4), np.float32)), "an array of float32, expected uint8 or uint16"),
        (saved(np.zeros((4, 4, 4), np.int16)), "an array of int16"),
        (saved(np.zeros((4, 4), bool)), "an array of bool"),
        (saved(np.zeros((4, 4), "u1,u1")), "an array of .*expected uint8"),
        (saved(np.zeros(4, np.uint8)), r"shape \(4,\), expected \(height, width, channels\)"),
        (saved(np.zeros((0, 4, 4), np.uint8)), r"shape \(0, 4, 4\)"),
        (saved(np.zeros((2, 3, 4, 5), np.uint8)), r"shape \(2, 3, 4, 5\)"),
        (saved(np.zeros((70, 70, 65), np.uint8)), "at most 64 channels; move the channels to the"),
        (saved(np.zeros((4, 48, 40), np.uint8)), "move the channels to the end"),
        (saved(np.zeros((9, 9, 4), np.uint8)), "9x9 is 81 pixels, more than 80"),
        (saved(image(4))[:-1], "damaged .npy file .*251 bytes of pixels, expected 252"),
        (saved(image(4)) + b"x", "damaged"),
        (saved(image(4))[:20], "damaged"),
        (b"\x93NUMPY", "damaged"),
        (b"\x93NUMPY\x03\x00" + saved(image(4))[8:], r"version 3\.0"),
        (b"\x93NUMPY\x01\x00\x10\x00" + b"{'descr': 1 + 1}", "damaged"),
    ],
)
def test_other_arrays_are_refused_by_their_header(data: bytes, message: str) -> None:
    with pytest.raises(ContentError, match=rf"^a\.npy: .*{message}"):
        read_npy(data, name="a.npy", max_pixels=80 if "9x9" in message else 10_000)


def test_objects_are_never_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    objects = np.empty((2, 2), object)
    objects[:] = Touch()
    with pytest.raises(ContentError, match="an array of object"):
        read_npy(saved(objects, allow_pickle=True), name="a.npy")
    disguised = saved(np.zeros((2, 2), np.uint8))[:-4] + pickle.dumps(Touch())
    with pytest.raises(ContentError, match="damaged"):
        read_npy(disguised, name="a.npy")
    assert not (tmp_path / "EXECUTED").exists()


def test_damaged_arrays_are_pixels_or_a_content_error() -> None:
    chance = np.random.default_rng(3)
    whole = saved(image(4))
    num_read = 0
    for _ in range(500):
        data = bytearray(whole)
        for place in chance.integers(0, 140, 2):
            data[place] = chance.integers(256)
        try:
            num_read += read_npy(bytes(data), name="a.npy", max_pixels=10_000).size > 0
        except ContentError as error:
            assert len(str(error).splitlines()) == 1
    assert 5 < num_read < 495


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 64])
def test_stored_images_are_bit_for_bit_the_same(channels: int, dtype: Any) -> None:
    pixels = image(channels, dtype)
    data = encode_image(pixels)
    assert encode_image(pixels) == data
    found = decode_image(data, channels, name="a")
    assert np.array_equal(found, pixels)
    assert found.dtype == pixels.dtype
    if channels in (1, 3):
        assert data == encode_png(pixels)  # as in all earlier datasets
    else:  # channels one below the other, for any reader of PNG
        plain = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        assert np.array_equal(plain, np.concatenate(np.moveaxis(pixels, 2, 0)))


def test_planes_of_another_number_of_channels_are_refused() -> None:
    with pytest.raises(ContentError, match="not an image of 4 channels"):
        decode_image(encode_image(image(5)), 4, name="a")
    with pytest.raises(ContentError, match="not an image of 4 channels"):
        decode_image(encode_image(image(3)), 4, name="a")


def test_images_too_large_for_one_file_are_refused_before_they_are_stored() -> None:
    check_storable(4096, 4096, 31, name="a")
    check_storable(16384, 16384, 3, name="a")
    with pytest.raises(ContentError, match="a: 32 channels of 4096x4096 pixels are too large"):
        check_storable(4096, 4096, 32, name="a")
    with pytest.raises(ContentError, match="too large"):
        check_storable(16384, 8, 64, name="a")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("size", [(5, 4), (21, 30), (5, 30)])
@pytest.mark.parametrize("channels", [2, 4, 5, 6, 7, 64])
def test_each_channel_is_resized_as_a_grey_image(
    channels: int, size: tuple[int, int], dtype: Any
) -> None:
    pixels = image(channels, dtype, 19, 17)
    geometry = fit((19, 17), size, kind="stretch")
    found = apply_geometry(pixels, geometry, *size, nearest=False)
    assert (found.shape, found.dtype) == ((*size, channels), pixels.dtype)
    back = undo_geometry(found, geometry, nearest=False)
    for channel in range(channels):
        grey = apply_geometry(pixels[..., channel], geometry, *size, nearest=False)
        assert np.abs(found[..., channel].astype(int) - grey).max() <= 1
        again = undo_geometry(found[..., channel], geometry, nearest=False)
        assert np.abs(back[..., channel].astype(int) - again).max() <= 1
