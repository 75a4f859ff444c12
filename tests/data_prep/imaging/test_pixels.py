"""Tests the conversion of images to the channels, bit depth and full scale of a dataset."""

import numpy as np

from data_prep.imaging.pixels import PixelFormat, convert


def test_convert_brings_every_full_scale_to_the_dataset_s():
    deep = PixelFormat(1, 16, 16383)
    twelve = np.array([[[0], [1], [2048], [4095]]], np.uint16)
    # v * 16383 / 4095, rounded: 4.0007, 8193.5 (8193.50 rounds up) and 16383.
    assert convert(twelve, deep, value_max=4095).ravel().tolist() == [0, 4, 8194, 16383]
    assert np.array_equal(convert(twelve, deep), twelve)
    shallow = convert(twelve, PixelFormat(3, 8, 255), value_max=4095)
    # v * 255 / 4095: 0.06, 127.53 and 255.
    assert (shallow.dtype, shallow[0, :, 2].tolist()) == (np.uint8, [0, 0, 128, 255])
    full = np.array([[[65535]]], np.uint16)
    assert convert(full, PixelFormat(1, 16, 65535), value_max=65535).item() == 65535
