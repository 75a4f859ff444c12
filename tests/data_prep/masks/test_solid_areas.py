"""Areas of a colour of no class are found and named, whatever the rest of the mask is like."""

import re

import cv2
import numpy as np
import pytest

from data_prep.masks.color_map import DEFAULT_CLASSES, parse_color_map
from data_prep.masks.files import read_mask, read_mask_file
from data_prep.masks.reading import read_classes
from data_prep.masks.rules import MaskRules
from flexunet.errors import ContentError
from tests.data_prep.masks.drawn_masks import (
    colors_of,
    compressed,
    far_color,
    random_classes,
    random_ids,
    resized,
)
from tests.data_prep.masks.made_masks import grey_file

ORGANS = parse_color_map("background=0,0,0;mass=255,0,0;calcification=0,0,255")


def random_blob(rng: np.random.Generator) -> np.ndarray:
    """Returns a box of bool with 4 to 40 connected pixels, 2 x 2 of them in a square."""
    blob = np.zeros((7, 7), bool)
    blob[:2, :2] = True
    for _ in range(int(rng.integers(0, 37))):
        beside = cv2.dilate(blob.view(np.uint8), np.ones((3, 3), np.uint8)).view(bool) & ~blob
        rows, columns = np.nonzero(beside)
        chosen = int(rng.integers(len(rows)))
        blob[rows[chosen], columns[chosen]] = True
    return blob


@pytest.mark.parametrize("seed", range(40))
def test_a_planted_blob_of_4_to_40_pixels_is_named_with_its_place(seed: int) -> None:
    rng = np.random.default_rng(seed)
    number = int(rng.integers(2, 6))
    classes = random_classes(rng, number)
    colors = colors_of(classes)
    mask = colors.astype(np.uint8)[random_ids(rng, number)]
    scale, method = [(1, 0), (2, cv2.INTER_LINEAR), (0.6, cv2.INTER_CUBIC)][seed % 3]
    mask = resized(scale, method)(mask)
    read_classes(mask, MaskRules(classes), name="m.png")
    is_class = (mask[:, :, np.newaxis] == colors.astype(np.uint8)).all(axis=3).any(axis=2)
    free = cv2.erode(is_class.view(np.uint8), np.ones((15, 15), np.uint8))[:-8, :-8]
    rows, columns = np.nonzero(free)
    place = int(rng.integers(len(rows)))
    row, column = int(rows[place]), int(columns[place])
    blob = random_blob(rng)
    color = far_color(rng, colors)
    mask[row : row + blob.shape[0], column : column + blob.shape[1]][blob] = color
    named = ",".join(map(str, color))
    words = f"m.png: .*{np.count_nonzero(blob)} pixels of colour {named} at row {row}, column "
    with pytest.raises(ContentError, match=rf"{words}.*--ignore {named}$"):
        read_classes(mask, MaskRules(classes), name="m.png")
    ignored = (tuple(int(each) for each in color),)
    reading = read_classes(mask, MaskRules(classes, 200, ignored), name="m.png")  # type: ignore[arg-type]
    assert np.count_nonzero(reading.ids == 200) >= np.count_nonzero(blob)


@pytest.mark.parametrize("seed", range(8))
def test_a_large_area_is_named_after_jpeg_compression(seed: int) -> None:
    rng = np.random.default_rng(seed)
    classes = random_classes(rng, 3)
    colors = colors_of(classes)
    mask = colors.astype(np.uint8)[random_ids(rng, 3)]
    color = far_color(rng, colors)
    mask[30:60, 40:70] = color
    with pytest.raises(ContentError, match=r"m\.jpg: has areas of a colour of no class") as error:
        read_classes(compressed(85)(mask), MaskRules(classes), name="m.jpg")
    found = re.search(r"of colour (\d+),(\d+),(\d+) at", str(error.value))
    assert found
    assert np.abs(np.array([int(each) for each in found.groups()]) - color).max() <= 24


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("quality", [95, 98, 100])
def test_noise_of_few_levels_in_a_jpeg_file_is_no_area(quality: int, seed: int) -> None:
    ids = random_ids(np.random.default_rng(seed), 2)
    rules = MaskRules(DEFAULT_CLASSES, encoding="colour")
    data = grey_file(ids * 255, "JPEG", quality=quality)
    file = read_mask_file(data, name="m.jpg", max_pixels=10**5)
    assert np.array_equal(read_mask(file, rules, name="m.jpg").ids, ids)
    mask = ids * 255
    mask[30:60, 40:70] = 120
    data = grey_file(mask, "JPEG", quality=quality)
    with pytest.raises(ContentError, match=r"m\.jpg: has areas of a colour of no class"):
        read_mask(read_mask_file(data, name="m.jpg", max_pixels=10**5), rules, name="m.jpg")


@pytest.mark.parametrize(
    ("level", "side"), [(1, 2), (1, 70), (2, 4), (100, 2), (127, 3), (128, 3), (128, 70), (200, 5)]
)
def test_a_second_grey_level_beside_a_white_lesion_is_an_error(level: int, side: int) -> None:
    mask = np.zeros((128, 128), np.uint8)
    mask[10:40, 10:40] = 255
    mask[50 : 50 + side, 50 : 50 + side] = level
    pixels = side * side
    for pixels_of in (mask, np.stack([mask] * 3, axis=2)):
        words = rf"{pixels} pixels of colour {level},{level},{level} at row 50, column 50"
        with pytest.raises(ContentError, match=words):
            read_classes(pixels_of, MaskRules(DEFAULT_CLASSES), name="m.png")


@pytest.mark.parametrize("width", [1, 2, 3, 5, 10])
@pytest.mark.parametrize(
    ("classes", "outline", "inside"),
    [
        ("background=0,0,0;mass=255,255,255", (255, 255, 255), (1, 1, 1)),
        ("background=0,0,0;mass=255,255,255", (255, 255, 255), (2, 2, 2)),
        ("background=0,0,0;mass=255,0,0", (255, 0, 0), (20, 0, 0)),
        ("b=0,0,0;a=128,128,128;c=255,255,255", (255, 255, 255), (1, 1, 1)),
    ],
)
def test_an_area_near_one_class_within_another_is_an_error(
    classes: str, outline: tuple[int, int, int], inside: tuple[int, int, int], width: int
) -> None:
    mask = np.zeros((128, 128, 3), np.uint8)
    cv2.circle(mask, (64, 64), 30, outline, -1)
    cv2.circle(mask, (64, 64), 30 - width, inside, -1)
    rules = MaskRules(parse_color_map(classes), encoding="colour")
    named = ",".join(map(str, inside))
    number = int((mask == inside).all(axis=2).sum())
    with pytest.raises(ContentError, match=rf"{number} pixels of colour {named} at row"):
        read_classes(mask, rules, name="m.png")
    cv2.circle(mask, (64, 64), 10, (3, 3, 3), -1)  # two areas that touch each other
    with pytest.raises(ContentError, match=rf"{number} pixels of colour {named} at row"):
        read_classes(mask, rules, name="m.png")


@pytest.mark.parametrize("seed", range(10))
def test_an_area_near_a_class_is_named_wherever_it_is(seed: int) -> None:
    rng = np.random.default_rng(seed)
    classes = random_classes(rng, int(rng.integers(2, 6)))
    colors = colors_of(classes)
    ids = random_ids(rng, len(classes))
    mask = colors.astype(np.uint8)[ids]
    class_id = int(rng.choice([each for each in np.unique(ids) if (ids == each).sum() >= 50]))
    shift = rng.integers(1, 9) * np.where(colors[class_id] > 127, -1, 1)
    row, column = rng.integers(0, 88, 2).tolist()
    mask[row : row + 8, column : column + 8] = colors[class_id] + shift
    named = ",".join(map(str, colors[class_id] + shift))
    with pytest.raises(ContentError, match=rf"64 pixels of colour {named} at row {row}, column"):
        read_classes(mask, MaskRules(classes, encoding="colour"), name="m.png")


@pytest.mark.parametrize("level", [254, 240])
def test_a_class_in_a_slightly_different_colour_is_read(level: int) -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[10:30, 10:30] = level
    assert np.count_nonzero(read_classes(mask, MaskRules(DEFAULT_CLASSES), name="m").ids) == 400


def test_a_square_far_from_all_blends_needs_no_class_colours_around() -> None:
    mask = np.zeros((64, 64, 3), np.uint8)
    cv2.circle(mask, (20, 20), 12, (255, 0, 0), -1)
    mask[40:43, 40:43] = (255, 0, 255)
    mask = np.asarray(cv2.resize(mask, None, fx=2, fy=2, interpolation=cv2.INTER_LINEAR), np.uint8)
    classes = parse_color_map("background=0,0,0;mass=255,0,0;other=255,255,0")
    with pytest.raises(ContentError, match="16 pixels of colour 255,0,255 at"):
        read_classes(mask, MaskRules(classes), name="m.png")


@pytest.mark.parametrize("color", [(0, 255, 0), (255, 255, 0), (255, 255, 255), (60, 0, 200)])
def test_an_outline_of_another_color_is_an_error(color: tuple[int, int, int]) -> None:
    mask = np.zeros((64, 64, 3), np.uint8)
    mask[5:20, 5:20] = (255, 0, 0)
    cv2.rectangle(mask, (30, 30), (50, 55), color, 1)
    if color == (60, 0, 200):  # near the blends of red and blue: only sharp edges refute a blend
        soft = cv2.blur(mask[:28], (1, 3))
        blended = np.ascontiguousarray(np.concatenate([soft, mask[28:]]))
        assert read_classes(blended, MaskRules(ORGANS), name="m.png").unexplained_pixels > 0
    with pytest.raises(ContentError, match="at row 30, column 30"):
        read_classes(mask, MaskRules(ORGANS), name="m.png")


def clean_mask(rng: np.random.Generator, number: int) -> tuple[np.ndarray, np.ndarray, MaskRules]:
    """Returns a mask of exact colours with a place on an edge, and its rules."""
    classes = random_classes(rng, number)
    ids = random_ids(rng, number)
    ids[30:70, 30:70] = 1
    ids[30:70, 50:70] = 0
    return colors_of(classes).astype(np.uint8)[ids], ids, MaskRules(classes, encoding="colour")


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("kind", ["pair", "edge", "line", "one level off"])
def test_small_areas_in_a_clean_mask_are_named(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask, ids, rules = clean_mask(rng, int(rng.integers(2, 6)))
    colors = colors_of(rules.classes)
    between = (colors[0] + colors[1]) // 2
    row, column = int(rng.integers(35, 60)), 49
    planted = np.zeros(ids.shape, bool)
    if kind == "pair":
        planted[row : row + 3, 36:40] = True
        mask[row : row + 3, 36:38] = far_color(rng, colors)
        mask[row : row + 3, 38:40] = far_color(rng, colors)
    elif kind == "edge":
        planted[row : row + 3, column - 1 : column + 2] = True
        mask[planted] = between
    elif kind == "line":
        planted[row, 33:43] = True
        mask[planted] = between
    else:
        planted[row : row + 2, column : column + 2] = True
        mask[planted] = np.where(colors[1] > 127, colors[1] - 1, colors[1] + 1)
    with pytest.raises(ContentError, match="m: has areas of a colour of no class: ") as error:
        read_classes(mask, rules, name="m")
    found = re.findall(r"(\d+) pixels of colour \S+ at row (\d+), column (\d+)", str(error.value))
    assert sum(int(each[0]) for each in found) == np.count_nonzero(planted)
    assert all(planted[int(row), int(column)] for _, row, column in found)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("scale", [(1, 0.5), (0.5, 1), (0.5, 0.5), (2, 1), (2, 2), (3, 3)])
def test_blends_of_few_colors_are_no_areas(seed: int, scale: tuple[float, float]) -> None:
    rng = np.random.default_rng(seed)
    ids = random_ids(rng, 2)
    ids[10:20] = 1  # a layer over the whole width, which stays sharp if it is only made wider
    mask = (ids * 255).astype(np.uint8)
    size = round(mask.shape[1] * scale[0]), round(mask.shape[0] * scale[1])
    made = np.asarray(cv2.resize(mask, size, interpolation=cv2.INTER_LINEAR), np.uint8)
    found = read_classes(made, MaskRules(DEFAULT_CLASSES), name="m").ids
    expected = cv2.resize(ids, size, interpolation=cv2.INTER_NEAREST)
    assert np.count_nonzero(found != expected) < 0.02 * found.size


def test_blends_of_two_of_many_classes_are_no_areas() -> None:
    rng = np.random.default_rng(0)
    classes = random_classes(rng, 20, 40)
    mask = colors_of(classes).astype(np.uint8)[np.repeat([[3, 7]], 20, axis=0)]
    made = resized(2, cv2.INTER_LINEAR)(np.repeat(mask, 10, axis=1))
    reading = read_classes(made, MaskRules(classes, encoding="colour"), name="m")
    assert set(np.unique(reading.ids)) == {3, 7}
    assert reading.unmapped_pixels > 0


def test_many_areas_are_counted_and_the_largest_are_named() -> None:
    mask = np.zeros((64, 64, 3), np.uint8)
    for i in range(5):
        mask[10 * i : 10 * i + 3 + i, 20:24] = (0, 255, 0)
    with pytest.raises(ContentError, match=r"28 pixels .* 24 pixels .* 20 pixels .* and 2 more;"):
        read_classes(mask, MaskRules(ORGANS), name="m.png")


def test_a_noisy_area_of_no_class_is_an_error() -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[5:20, 5:20] = 255
    noise = np.random.default_rng(0).integers(-9, 9, (20, 20))
    mask[30:50, 30:50] = 110 + noise
    with pytest.raises(ContentError, match="areas of a colour of no class: 400 pixels"):
        read_classes(mask, MaskRules(DEFAULT_CLASSES), name="m.png")


def test_a_photograph_in_place_of_a_mask_is_an_error() -> None:
    image = cv2.GaussianBlur(
        np.random.default_rng(0).integers(0, 256, (96, 96), np.uint8), (9, 9), 0
    )
    with pytest.raises(ContentError, match="areas of a colour of no class"):
        read_classes(np.asarray(image, np.uint8), MaskRules(DEFAULT_CLASSES), name="m.png")


@pytest.mark.timeout(60)
def test_an_enlarged_photograph_takes_no_pass_for_each_of_its_colors() -> None:
    image = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)
    pixels = np.repeat(np.repeat(image, 2, axis=0), 2, axis=1)
    # One pass for each of its 160,000 colours would take hours.
    with pytest.raises(ContentError, match="areas of a colour of no class"):
        read_classes(pixels, MaskRules(ORGANS), name="m.png")
