"""Tests the box of the breast: computed by hand, in phantoms and in real mammograms."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from data_prep.imaging.breast import find_breast, frame
from data_prep.imaging.geometry import Box, apply_geometry
from data_prep.phantoms.images import make_phantom

_INBREAST = Path(__file__).resolve().parents[4] / "shared" / "data" / "inbreast-mini"


def _film(height=200, width=100, dtype=np.uint8):
    return np.zeros((height, width, 1), dtype)


def _is_inside(mask, box):
    part = mask[box.top : box.top + box.height, box.left : box.left + box.width]
    return np.count_nonzero(part) == np.count_nonzero(mask)


@pytest.mark.parametrize(("dtype", "bright"), [(np.uint8, 200), (np.uint16, 3000)])
def test_find_breast_is_the_box_with_a_margin(dtype, bright):
    image = _film(dtype=dtype)
    image[50:150, :40] = bright
    found = find_breast(image)
    # A margin of 1 % of 200 pixels; the image ends at the left.
    assert found.box == Box(top=48, left=0, height=104, width=42)
    assert found.is_left
    assert not find_breast(image[:, ::-1]).is_left


def test_find_breast_passes_over_labels_and_grain():
    image = _film()
    image[:] = np.random.default_rng(1).integers(0, 5, image.shape)
    image[50:150, :40] = 180
    image[10:30, 70:95] = 255  # a label, brighter than tissue
    image[120, 90] = 255
    assert find_breast(image).box == Box(top=48, left=0, height=104, width=42)


def test_find_breast_of_nothing_is_none():
    assert find_breast(_film()) is None
    assert find_breast(_film() + 7) is None
    geometry = frame(_film(), height=8, width=8, kind="pad", crop="breast", flip="left")
    assert (geometry.crop, geometry.is_flipped) == (None, False)


def test_find_breast_of_a_large_image_keeps_its_border():
    image = _film(3000, 2000)
    image[1000:2000, 1500:] = 200
    box = find_breast(image).box
    # Searched at 512 rows, 5.9 pixels each, with a margin of 30.
    assert box.top == pytest.approx(970, abs=6)
    assert box.left == pytest.approx(1470, abs=6)
    assert box.top + box.height == pytest.approx(2030, abs=6)
    assert box.left + box.width == 2000


def test_find_breast_holds_every_mass_of_phantoms():
    for i in range(60):
        image, mask = make_phantom(5, i, 128)
        found = find_breast(image[..., np.newaxis])
        assert _is_inside(mask, found.box)
        assert found.box.width < 90
        assert found.is_left == (image[:, :4].mean() > image[:, -4:].mean())


@pytest.mark.skipif(not _INBREAST.is_dir(), reason="needs the shared mammograms")
def test_find_breast_holds_every_mass_of_real_mammograms():
    paths = sorted((_INBREAST / "images").iterdir())
    assert len(paths) == 24
    for path in paths:
        image = cv2.imread(str(path))
        mask = cv2.imread(str(_INBREAST / "masks" / path.name), 0) > 127
        found = find_breast(image)
        assert _is_inside(mask, found.box)
        assert found.box.width < 300  # of 512
        assert found.is_left


@pytest.mark.parametrize("flip", ["left", "right"])
def test_frame_brings_the_chest_wall_to_one_side(flip):
    image, _ = make_phantom(5, 1, 128)
    stored = []
    for each in (image, np.ascontiguousarray(image[:, ::-1])):
        pixels = each[..., np.newaxis]
        geometry = frame(pixels, height=64, width=48, kind="stretch", crop="breast", flip=flip)
        stored.append(apply_geometry(pixels, geometry, 64, 48, nearest=False))
    assert np.array_equal(*stored)
    columns = stored[0].mean(axis=(0, 2))
    assert (columns[0] > columns[-1]) == (flip == "left")
