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


@pytest.mark.parametrize("seed", SEEDS)
def test_instances_are_never_classes(seed: int) -> None:
    """Cells that each mask numbers from 1 are no classes, in any format with ids."""
    rng = np.random.default_rng(seed)
    files = []
    for number in rng.permutation(np.arange(3, 15))[:5]:
        mask = np.zeros((128, 128), np.uint8)
        cells = rng.permutation(25)[:number]
        for class_id, cell in enumerate(cells, 1):
            center = (int(cell % 5) * 25 + 12, int(cell // 5) * 25 + 12)
            cv2.circle(mask, center, int(rng.integers(4, 11)), class_id, -1)
        palette = rng.permutation(np.arange(768) % MAX_CLASSES).tolist()
        palette[:3] = [0, 0, 0]
        files.append(palette_file(mask, palette) if seed % 2 else grey_file(mask))
    decision = decide_masks(statistics(*files))
    assert not decision.is_certain
