"""Random masks of known meaning: the decision reads them rightly, or asks."""

import cv2
import numpy as np
import pytest
from PIL import Image

from data_prep.masks.color_map import MAX_CLASSES, parse_color_map, parse_ignored
from data_prep.masks.decision.decide import decide_masks
from data_prep.masks.decision.findings import Reading
from data_prep.masks.files import read_mask, read_mask_file
from data_prep.masks.rules import MaskRules
from tests.data_prep.masks.drawn_masks import colors_of, random_classes, random_ids, resized
from tests.data_prep.masks.made_masks import (
    color_file,
    grey_file,
    image_file,
    outlined,
    palette_file,
    statistics,
)

SEEDS = range(3)
IGNORED = 250


def read(data: bytes, reading: Reading) -> np.ndarray:
    """Returns the ids (H, W) of a file; ignored pixels are 250."""
    ignored = parse_ignored((reading.ignore or "").split(";"))
    encoding = "auto" if reading.encoding in ("auto", "mixed") else reading.encoding
    rules = MaskRules(
        parse_color_map(reading.classes), IGNORED if ignored else None, ignored, encoding
    )
    return read_mask(read_mask_file(data, name="m", max_pixels=10**6), rules, name="m").ids


def ids_of_files(rng: np.random.Generator, number: int) -> list[np.ndarray]:
    ids = [random_ids(rng, number, side=128) for _ in range(5)]
    for class_id in range(number):  # each class is in one file at least
        cv2.circle(ids[class_id % 5], (20 + 11 * class_id, 20), 9, class_id, -1)
    return ids


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["ids", "ids and a border", "palette", "colours"])
def test_exact_masks_are_read_as_they_were_drawn(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    classes = random_classes(rng, int(rng.integers(3, 8)))
    colors = colors_of(classes)
    truth = ids_of_files(rng, len(classes))
    if kind == "ids and a border":
        truth = [outlined(ids.astype(np.uint16)) for ids in truth]
    if kind == "colours":
        files = [color_file(ids, colors) for ids in truth]
    elif kind == "palette":
        files = [palette_file(ids, colors.ravel().tolist()) for ids in truth]
    else:
        files = [grey_file(ids.astype(np.uint8)) for ids in truth]
    decision = decide_masks(statistics(*files))
    assert decision.reading is not None, decision
    found = parse_color_map(decision.reading.classes)
    assert len(found) == len(classes)
    for ids, data in zip(truth, files, strict=True):
        ids_read = read(data, decision.reading)
        expected = np.where(ids == 255, IGNORED, ids)
        if kind == "colours":  # the order of the classes is another one
            order = [next(f.id for f in found if f.color == c.color) for c in classes]
            expected = np.array(order)[ids]
        assert np.array_equal(ids_read, expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_resized_masks_have_no_class_of_blends(seed: int) -> None:
    rng = np.random.default_rng(seed)
    classes = random_classes(rng, int(rng.integers(3, 6)))
    colors = colors_of(classes)
    scale, method = ((0.5, cv2.INTER_AREA), (1.6, cv2.INTER_CUBIC), (0.71, cv2.INTER_LINEAR))[
        seed % 3
    ]
    shrink = resized(scale, method)
    files = [
        image_file(Image.fromarray(shrink(colors.astype(np.uint8)[ids])))
        for ids in ids_of_files(rng, len(classes))
    ]
    decision = decide_masks(statistics(*files))
    readings = [decision.reading] if decision.reading else list(decision.candidates)
    found = [{each.color for each in parse_color_map(reading.classes)} for reading in readings]
    drawn = {each.color for each in classes}
    assert drawn in found or all(each < drawn for each in found)
    assert decision.reading is None or found[0] == drawn


def numbered_cells(rng: np.random.Generator, number: int, kind: str) -> np.ndarray:
    """Returns (192, 192): cells with ids as programs number them."""
    ids = np.arange(1, number + 1)
    if kind == "crops":  # of a larger mask, whose ids are up to 40
        ids = rng.permutation(np.arange(1, 41))[:number]
    mask = np.zeros((192, 192), np.uint8)
    side = 12
    for class_id, cell in zip(ids.tolist(), rng.permutation(side**2)[:number], strict=True):
        center = (int(cell % side) * 16 + 8, int(cell // side) * 16 + 8)
        radius = int(rng.integers(3, 7))
        cv2.circle(mask, center, radius, class_id, -1)
        if kind == "cut" and class_id % 5 == 0:
            mask[:, center[0]][mask[:, center[0]] == class_id] = 0
        if kind == "with a border":
            cv2.circle(mask, center, radius + 1, 255, 1)
    return mask


NUMBERS = {
    "numbered": [3, 5, 8, 4, 11],
    "cut": [5, 9, 7, 12, 6],
    "crops": [9, 12, 7, 11, 8, 10, 12, 6],
    "many": [80, 95, 120, 100],
    "as many in each": [9, 9, 9, 9],
    "with a border": [3, 5, 8, 4, 11],
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", NUMBERS)
def test_instances_are_never_classes(kind: str, seed: int) -> None:
    """Cells that masks number are no classes, in any format with ids."""
    rng = np.random.default_rng(seed)
    masks = [numbered_cells(rng, number, kind) for number in NUMBERS[kind]]
    palette = rng.permutation(np.arange(768) % MAX_CLASSES).tolist()
    palette[:3] = [0, 0, 0]
    files = [palette_file(mask, palette) if seed % 2 else grey_file(mask) for mask in masks]
    decision = decide_masks(statistics(*files))
    assert not decision.is_certain
    assert "may be single objects" in "; ".join(decision.evidence)
    first, *others = decision.candidates
    assert first.encoding == "nonzero"
    assert others
    expected = np.where(masks[0] == 255, IGNORED, masks[0] > 0)
    assert np.array_equal(read(files[0], first), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_ids_of_classes_with_several_regions_are_certain(seed: int) -> None:
    rng = np.random.default_rng(seed)
    masks = [random_ids(rng, 12, side=192) for _ in range(4)]
    for mask in masks:
        cells = rng.permutation(144)
        for number, cell in enumerate(cells[:36].tolist()):
            cv2.circle(mask, (cell % 12 * 16 + 8, cell // 12 * 16 + 8), 4, number % 11 + 1, -1)
    assert decide_masks(statistics(*map(grey_file, masks))).is_certain
