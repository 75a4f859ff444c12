"""Colours and grey levels to ids and back; masks that must not be misread in silence."""

import dataclasses
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.imaging.codecs import read_mask_pixels
from data_prep.imaging.pixels import Pixels
from data_prep.masks.color_map import DEFAULT_CLASSES, ClassColor, Color, parse_color_map
from data_prep.masks.reading import read_classes, to_colors
from data_prep.masks.rules import MaskRules
from flexunet.errors import ContentError

REAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "inbreast-mini" / "masks"
ORGANS = parse_color_map("background=0,0,0; mass=255,0,0; skin=0,255,0; muscle=0,0,255")


def to_class_ids(
    pixels: Pixels,
    classes: tuple[ClassColor, ...],
    *,
    name: str = "m.png",
    ignore_id: int | None = None,
) -> tuple[np.ndarray, int, list[Color]]:
    """Returns the ids, the number of unmapped pixels, and their commonest colours."""
    ignored = () if ignore_id is None else ((ignore_id,) * 3,)
    reading = read_classes(pixels, MaskRules(classes, ignore_id, ignored), name=name)
    return reading.ids, reading.unmapped_pixels, [each.color for each in reading.unmapped_colors]


def grey(*levels: int) -> Pixels:
    return np.array([levels], np.uint8)


def rgb(*colors: tuple[int, int, int]) -> Pixels:
    return np.array([colors], np.uint8)


@pytest.mark.parametrize(
    ("pixels", "ids"),
    [
        (grey(0, 0), [[0, 0]]),
        (grey(0, 255), [[0, 1]]),
        (grey(0, 1), [[0, 1]]),
        (grey(1, 1), [[1, 1]]),
        (grey(0, 255)[..., None], [[0, 1]]),
        (np.array([[0, 65535]], np.uint16), [[0, 1]]),
        (np.array([[0, 1]], np.uint16), [[0, 1]]),
        (rgb((0, 0, 0), (255, 255, 255)), [[0, 1]]),
        (rgb((0, 0, 0), (1, 1, 1)), [[0, 1]]),
    ],
)
def test_to_class_ids_reads_every_kind_of_two_class_mask(
    pixels: Pixels, ids: list[list[int]]
) -> None:
    result, unmapped, colors = to_class_ids(pixels, DEFAULT_CLASSES, name="a")
    assert result.dtype == np.uint8
    assert (result.tolist(), unmapped, colors) == (ids, 0, [])


def test_to_class_ids_gives_anti_aliased_grey_to_the_nearest_class() -> None:
    # 127 is nearer to 0, 128 to 255; 0 and 255 are exact.
    ids, unmapped, colors = to_class_ids(grey(0, 127, 128, 128, 255), DEFAULT_CLASSES, name="a")
    assert ids.tolist() == [[0, 0, 1, 1, 1]]
    assert unmapped == 3
    assert colors == [(128, 128, 128), (127, 127, 127)]


def test_to_class_ids_gives_16_bit_grey_to_the_nearest_class() -> None:
    # The middle of 65535 is 32767.5.
    pixels = np.array([[0, 32767, 32768, 65535]], np.uint16)
    ids, unmapped, colors = to_class_ids(pixels, DEFAULT_CLASSES, name="a")
    assert ids.tolist() == [[0, 0, 1, 1]]
    assert unmapped == 2
    assert colors == [(32767,) * 3, (32768,) * 3]


def test_to_class_ids_gives_colors_to_the_nearest_class() -> None:
    pixels = rgb((0, 0, 0), (255, 0, 0), (200, 40, 40), (10, 90, 250), (100, 0, 0))
    ids, unmapped, colors = to_class_ids(pixels, ORGANS, name="a")
    # (200,40,40): to red 55²+40²+40² = 6225. (10,90,250): blue. (100,0,0): black 100² < 155².
    assert ids.tolist() == [[0, 1, 1, 3, 0]]
    assert unmapped == 3
    assert colors == [(10, 90, 250), (100, 0, 0), (200, 40, 40)]


def test_to_class_ids_names_the_commonest_colors_first() -> None:
    pixels = rgb(
        (255, 0, 0), *[(250, 1, 0)] * 2, *[(0, 240, 0)] * 3, *[(i, 0, 1) for i in range(9)]
    )
    assert to_class_ids(pixels, ORGANS, name="a")[2][:2] == [(0, 240, 0), (250, 1, 0)]
    assert len(to_class_ids(pixels, ORGANS, name="a")[2]) == 11


def test_to_class_ids_reads_an_index_mask_of_many_classes() -> None:
    for pixels in (grey(0, 3, 2, 1), np.repeat(grey(0, 3, 2, 1)[..., None], 3, axis=2)):
        assert to_class_ids(pixels, ORGANS, name="a")[:2][0].tolist() == [[0, 3, 2, 1]]
        assert to_class_ids(pixels, ORGANS, name="a")[1] == 0


def test_to_class_ids_keeps_the_ignore_id() -> None:
    ids, unmapped, _ = to_class_ids(grey(0, 1, 3, 200), ORGANS, name="a", ignore_id=200)
    assert (ids.tolist(), unmapped) == ([[0, 1, 3, 200]], 0)
    pixels = rgb((255, 0, 0), (200, 200, 200), (0, 0, 0))
    ids, unmapped, _ = to_class_ids(pixels, ORGANS, name="a", ignore_id=200)
    assert (ids.tolist(), unmapped) == ([[1, 200, 0]], 0)


def test_the_ignore_id_is_an_id_and_no_grey_level() -> None:
    rules = MaskRules(ORGANS, 200, has_ignore_id=True)
    assert read_classes(grey(0, 1, 3, 200), rules, name="a").ids.tolist() == [[0, 1, 3, 200]]
    assert read_classes(grey(0, 200), rules, name="a").ids.tolist() == [[0, 200]]
    pixels = rgb((255, 0, 0), (200, 200, 200), (0, 0, 0), (9, 9, 9))
    known = ((7, 8, 9),)
    for ignored, option in (((), "200,200,200"), (known, '"7,8,9;200,200,200"')):
        with pytest.raises(ContentError, match=rf"^a: .*only an id .* give --ignore {option}, "):
            read_classes(pixels, dataclasses.replace(rules, ignored=ignored), name="a")
    ignored = ((200, 200, 200),)
    reading = read_classes(pixels, dataclasses.replace(rules, ignored=ignored), name="a")
    assert reading.ids.tolist() == [[1, 200, 0, 0]]


@pytest.mark.parametrize("seed", range(4))
def test_the_ignore_id_changes_nothing_in_a_mask_with_noise(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = np.zeros((40, 40), np.int64)
    mask[10:30, 10:30] = 255
    noise = (mask + rng.integers(-30, 31, mask.shape)).clip(0, 255).astype(np.uint8)
    plain = read_classes(noise, MaskRules(DEFAULT_CLASSES), name="a")
    rules = MaskRules(DEFAULT_CLASSES, int(rng.integers(230, 255)), has_ignore_id=True)
    found = read_classes(noise, rules, name="a")
    assert (found.ids == plain.ids).all()
    assert dataclasses.replace(found, ids=plain.ids) == plain


@pytest.mark.parametrize(
    "pixels",
    [
        grey(0, 1, 2),  # ids of three classes
        rgb((0, 0, 0), (1, 1, 1), (2, 2, 2)),
        rgb((0, 0, 0), (255, 0, 0)),  # red masks, classes black and white
        np.array([[0, 4095]], np.uint16),  # white of 12 bits
    ],
)
def test_to_class_ids_refuses_to_read_other_classes_as_empty(pixels: Pixels) -> None:
    with pytest.raises(ContentError, match=r"^m\.png: would be read as empty, but has [12] pixels"):
        to_class_ids(pixels, DEFAULT_CLASSES, name="m.png")


def solid(*levels: int) -> Pixels:
    """Returns 12x12 zeros with an area of 3x3 pixels of each of two levels, three in between."""
    mask = np.zeros((12, 12), np.uint8)
    for place, level in zip(((1, 1), (7, 7)), levels, strict=True):
        mask[place[0] : place[0] + 3, place[1] : place[1] + 3] = level
    return mask


@pytest.mark.parametrize(
    "pixels",
    [
        solid(100, 100),  # grey masks, nearer to black
        solid(100, 60),  # of two classes
        solid(2, 2),  # id of another class
        solid(100, 100).astype(np.uint16),
        np.stack([solid(100, 60), solid(0, 0), solid(0, 0)], axis=2),
    ],
)
def test_to_class_ids_refuses_to_read_solid_areas_as_empty(pixels: Pixels) -> None:
    with pytest.raises(ContentError, match=r"m.png: has areas of a colour .*: 9 pixels of colour"):
        to_class_ids(pixels, DEFAULT_CLASSES, name="m.png")


def test_to_class_ids_takes_thin_blends_of_one_shade_as_background() -> None:
    # A box that was shifted by part of a pixel, and a line that was made smaller.
    pixels = np.zeros((12, 12), np.uint8)
    pixels[2:10, 0] = pixels[2:10, 6] = 100
    ids, unmapped, _ = to_class_ids(pixels, DEFAULT_CLASSES, name="a")
    assert (ids.any(), unmapped) == (False, 16)


def test_to_class_ids_does_not_take_ignored_pixels_for_content() -> None:
    # Ids 0 to 4 are five classes, not four; as colours all are nearest to black.
    with pytest.raises(ContentError, match="has 4 pixels in colours of no class"):
        to_class_ids(grey(200, 0, 1, 2, 3, 4), ORGANS, name="a", ignore_id=200)


def test_to_class_ids_takes_the_faint_rest_of_a_lesion_as_background() -> None:
    ids, unmapped, _ = to_class_ids(grey(0, 3, 40, 127), DEFAULT_CLASSES, name="a")
    assert (ids.tolist(), unmapped) == ([[0, 0, 0, 0]], 3)


def test_to_class_ids_stays_small_on_a_mask_of_many_colors() -> None:
    classes = parse_color_map(";".join(f"c{i}={i},{255 - i},0" for i in range(256)))
    pixels = np.random.default_rng(0).integers(0, 256, (128, 256, 3), np.uint8)
    tracemalloc.start()
    try:
        with pytest.raises(ContentError, match="areas of a colour of no class: 32"):
            to_class_ids(pixels, classes, name="a")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Pixels x classes as float32 alone would be 33 MB.
    assert peak < 20e6


@given(
    ids=st.lists(st.sampled_from([0, 1, 2, 3, 99]), min_size=1, max_size=30),
    num_rows=st.integers(1, 3),
)
def test_to_colors_and_back_is_the_identity(ids: list[int], num_rows: int) -> None:
    class_ids = np.array([ids] * num_rows, np.uint8)
    colors = to_colors(class_ids, ORGANS)
    assert colors.shape == (num_rows, len(ids), 3)
    back, unmapped, _ = to_class_ids(colors, ORGANS, name="a", ignore_id=99)
    np.testing.assert_array_equal(back, class_ids)
    assert unmapped == 0


def test_to_colors_gives_each_class_its_color() -> None:
    assert to_colors(grey(0, 2, 99), ORGANS).tolist() == [[[0, 0, 0], [0, 255, 0], [99, 99, 99]]]


@pytest.mark.skipif(not REAL.is_dir(), reason=f"real masks are not at {REAL}")
def test_to_class_ids_of_real_masks_is_a_threshold_with_few_unmapped_pixels() -> None:
    shares = []
    for path in sorted(REAL.iterdir()):
        pixels = read_mask_pixels(path.read_bytes(), name=path.name)
        ids, unmapped, colors = to_class_ids(pixels, DEFAULT_CLASSES, name=path.name)
        # Nearer to white than to black, the colours' sum of squares says, is a sum above 382.5.
        np.testing.assert_array_equal(ids, pixels.sum(axis=2) > 382)
        shares.append(unmapped / ids.size)
        exact = (pixels == 0).all(axis=2) | (pixels == 255).all(axis=2)
        assert unmapped == np.count_nonzero(~exact)
        assert len(colors) > 5
    assert len(shares) == 24
    assert 0 < min(shares) <= max(shares) < 0.003
