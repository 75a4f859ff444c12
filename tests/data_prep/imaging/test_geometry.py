"""Stretching, padding, cropping and mirroring by hand-known values, and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.imaging.geometry import Box, Geometry, apply_geometry, fit, undo_geometry


def test_fit_stretch_fills_the_target() -> None:
    assert fit((300, 200), (64, 32), kind="stretch") == Geometry(
        "stretch", 300, 200, top=0, left=0, height=64, width=32
    )


def test_fit_pad_keeps_the_aspect_and_centres() -> None:
    # 300 x 200 into 64 x 64: scale 64/300; width 200 * 64/300 = 42.67 -> 43; (64 - 43) // 2 = 10.
    assert fit((300, 200), (64, 64), kind="pad") == Geometry(
        "pad", 300, 200, top=0, left=10, height=64, width=43
    )
    # A line keeps at least one pixel.
    assert fit((1, 1000), (64, 64), kind="pad").height == 1


def test_fit_refuses_other_kinds_and_sizes() -> None:
    with pytest.raises(ValueError, match="unknown geometry 'crop'; known: pad, stretch"):
        fit((3, 3), (4, 4), kind="crop")
    with pytest.raises(ValueError, match="sizes start at 1"):
        fit((3, 0), (4, 4), kind="pad")


def test_apply_geometry_averages_when_it_shrinks() -> None:
    # 2 x 2 blocks: mean of 0, 100, 200, 100 is 100.
    block = np.array([[0, 100], [200, 100]], np.uint8)
    pixels = np.tile(block, (2, 3))[..., None]
    geometry = fit((4, 6), (2, 3), kind="stretch")
    result = apply_geometry(pixels, geometry, 2, 3, nearest=False)
    np.testing.assert_array_equal(result, np.full((2, 3, 1), 100))


def test_apply_geometry_averages_the_shrinking_axis_when_the_other_grows() -> None:
    # Columns 0, 255, 0, 255 ... average to 128 (127.5 rounded); rows only repeat.
    pixels = np.tile(np.array([0, 255], np.uint8), (2, 8))
    geometry = fit((2, 16), (8, 4), kind="stretch")
    result = apply_geometry(pixels, geometry, 8, 4, nearest=False)
    np.testing.assert_array_equal(result, np.full((8, 4), 128))


def test_apply_geometry_interpolates_when_it_grows() -> None:
    # Centres of the 4 new pixels are at -0.25, 0.25, 0.75, 1.25 of the old: 0, 25, 75, 100.
    pixels = np.array([[0, 100]], np.uint8)
    geometry = fit((1, 2), (1, 4), kind="stretch")
    result = apply_geometry(pixels, geometry, 1, 4, nearest=False)
    np.testing.assert_array_equal(result, [[0, 25, 75, 100]])


def test_apply_geometry_takes_mask_values_at_pixel_centres() -> None:
    # 15 -> 4: centres at (i + 0.5) * 3.75 - 0.5 = 1.375, 5.125, 8.875, 12.625 -> 1, 5, 9, 13.
    mask = np.arange(15, dtype=np.uint8)[None]
    geometry = fit((1, 15), (1, 4), kind="stretch")
    result = apply_geometry(mask, geometry, 1, 4, nearest=True)
    np.testing.assert_array_equal(result, [[1, 5, 9, 13]])


@pytest.mark.parametrize(("source", "target"), [(511, 128), (128, 509), (100, 37), (37, 100)])
def test_apply_geometry_keeps_mask_and_image_aligned(source: int, target: int) -> None:
    rows, columns = np.mgrid[:source, :source]
    disc = np.hypot(rows - source * 0.55, columns - source * 0.4) < source * 0.25
    geometry = fit((source, source), (target, target), kind="stretch")
    mask = apply_geometry(disc.astype(np.uint8), geometry, target, target, nearest=True)
    image = apply_geometry(
        np.where(disc, 60000, 0).astype(np.uint16), geometry, target, target, nearest=False
    )
    # The centres of mass agree to a tenth of the larger of the old and the new pixel.
    tolerance = 0.1 * max(1, target / source)
    for axis in (0, 1):
        places = np.arange(target)
        of_mask = mask.sum(axis) @ places / mask.sum()
        of_image = image.sum(axis) @ places / image.sum()
        assert abs(of_mask - of_image) < tolerance


def test_apply_geometry_pads_with_zero() -> None:
    pixels = np.full((4, 2, 3), 9, np.uint8)
    geometry = fit((4, 2), (8, 8), kind="pad")
    result = apply_geometry(pixels, geometry, 8, 8, nearest=False)
    expected = np.zeros((8, 8, 3), np.uint8)
    expected[:, 2:6] = 9
    np.testing.assert_array_equal(result, expected)


def test_crop_and_flip_store_a_part_and_put_it_back() -> None:
    pixels = np.arange(1, 13, dtype=np.uint8).reshape(3, 4)
    box = Box(top=1, left=1, height=2, width=3)
    geometry = fit((3, 4), (2, 3), kind="pad", crop=box, is_flipped=True)
    stored = apply_geometry(pixels, geometry, 2, 3, nearest=True)
    # Rows 5..8 and 9..12 without their first column, mirrored.
    assert stored.tolist() == [[8, 7, 6], [12, 11, 10]]
    back = undo_geometry(stored, geometry, nearest=True)
    assert back.tolist() == [[0, 0, 0, 0], [0, 6, 7, 8], [0, 10, 11, 12]]


def test_crop_is_what_keeps_its_aspect() -> None:
    # 10 x 5 of 20 x 20 into 8 x 8: scale 0.8, width 4, two columns at each side.
    box = Box(top=0, left=3, height=10, width=5)
    geometry = fit((20, 20), (8, 8), kind="pad", crop=box)
    assert (geometry.top, geometry.left, geometry.height, geometry.width) == (0, 2, 8, 4)
    colour = np.full((20, 20, 3), 9, np.uint8)
    stored = apply_geometry(colour, geometry, 8, 8, nearest=False)
    assert stored[:, 2:6].min() == 9
    assert stored[:, :2].max() == stored[:, 6:].max() == 0
    back = undo_geometry(stored, geometry, nearest=False)
    assert back.shape == colour.shape
    assert back.sum() == 9 * 10 * 5 * 3


def test_apply_geometry_refuses_another_source_size() -> None:
    geometry = fit((4, 2), (8, 8), kind="pad")
    with pytest.raises(ValueError, match=r"pixels \(2, 4\) do not have the source size"):
        apply_geometry(np.zeros((2, 4), np.uint8), geometry, 8, 8, nearest=True)


@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    channels=st.sampled_from([None, 1, 3]),
    kind=st.sampled_from(["stretch", "pad"]),
    nearest=st.booleans(),
)
def test_undo_geometry_gives_the_source_size_back(
    height: int, width: int, channels: int | None, kind: str, nearest: bool
) -> None:
    shape = (height, width) if channels is None else (height, width, channels)
    pixels = np.full(shape, 77, np.uint16)
    geometry = fit((height, width), (48, 32), kind=kind)
    stored = apply_geometry(pixels, geometry, 48, 32, nearest=nearest)
    assert stored.shape == (48, 32, *shape[2:])
    np.testing.assert_array_equal(undo_geometry(stored, geometry, nearest=nearest), pixels)


def test_undo_geometry_returns_an_enlarged_mask_exactly() -> None:
    mask = np.random.default_rng(0).integers(0, 3, (37, 21), np.uint8)
    geometry = fit((37, 21), (128, 128), kind="pad")
    stored = apply_geometry(mask, geometry, 128, 128, nearest=True)
    np.testing.assert_array_equal(undo_geometry(stored, geometry, nearest=True), mask)


def test_undo_geometry_refuses_pixels_that_cannot_hold_the_image() -> None:
    geometry = fit((4, 2), (8, 8), kind="stretch")
    with pytest.raises(ValueError, match="too small"):
        undo_geometry(np.zeros((4, 4), np.uint8), geometry, nearest=True)
