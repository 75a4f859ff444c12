"""Colours and levels as indices: equal readings whatever the blocks are."""

import numpy as np
import pytest

from data_prep.masks import coding
from data_prep.masks.coding import KnownColors, code_colors, code_grey, level_counts, lookup
from data_prep.masks.color_map import parse_color_map
from data_prep.masks.reading import MaskReading, read_classes
from data_prep.masks.rules import MaskRules
from flexunet.errors import ContentError
from tests.data_prep.masks.drawn_masks import (
    colors_of,
    compressed,
    random_classes,
    random_ids,
    resized,
)

ORGANS = parse_color_map("background=0,0,0;a=255,0,0;b=0,255,0")


def reading_of(mask: np.ndarray, rules: MaskRules) -> MaskReading | str:
    try:
        return read_classes(mask, rules, name="m")
    except ContentError as error:
        return str(error)


@pytest.mark.parametrize("seed", range(8))
def test_the_size_of_the_blocks_changes_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    number = 70 if seed == 3 else int(rng.integers(2, 7))
    classes = random_classes(rng, number, 80 if number < 9 else 30)
    mask = colors_of(classes).astype(np.uint8)[random_ids(rng, number, 48)]
    mask = [resized(1.6, 2), compressed(80), resized(0.7, 1)][seed % 3](mask)
    if seed % 5 == 0:
        mask[20:30, 10:30] = rng.integers(0, 256, (10, 20, 3))
    rules = MaskRules(classes, 200, ((7, 9, 11),), "colour")
    for pixels in (mask, np.ascontiguousarray(mask[..., 0])):
        whole = reading_of(pixels, rules)
        for block in (1, 7 * mask.shape[1]):
            monkeypatch.setattr(coding, "_BLOCK_PIXELS", block)
            found = reading_of(pixels, rules)
            monkeypatch.undo()
            if isinstance(whole, str) or isinstance(found, str):
                assert found == whole
            else:
                assert np.array_equal(found.ids, whole.ids)
                assert str(found) == str(whole)


@pytest.mark.parametrize("most", [2**16, 3])
def test_code_colors_finds_each_color_and_its_number(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coding, "_MAX_LISTED", most)
    monkeypatch.setattr(coding, "_BLOCK_PIXELS", 64)
    rng = np.random.default_rng(0)
    pixels = np.array([[0, 0, 0], [255, 0, 0], [1, 2, 3], [9, 9, 8], [0, 1, 0], [255, 255, 254]])
    mask = np.repeat(pixels.astype(np.uint8)[rng.integers(0, 6, (20, 9))], 3, axis=1)
    coded = code_colors(mask, KnownColors.of(ORGANS))
    assert np.array_equal(coded.shades.values[coded.codes], mask)
    counts = np.bincount(coded.codes.ravel(), minlength=len(coded.counts))
    assert np.array_equal(counts, coded.counts)
    assert coded.shades.values[:3].tolist() == [list(each.color) for each in ORGANS]
    assert coded.shades.values[3:].tolist() == sorted(pixels[2:].tolist())


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_code_grey_codes_levels_by_themselves(dtype: type[np.unsignedinteger]) -> None:
    plane = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (30, 20)).astype(dtype)
    counts = level_counts(plane)
    assert np.array_equal(counts, np.bincount(plane.ravel(), minlength=len(counts)))
    coded = code_grey(plane, counts, KnownColors.of_16_bits(ORGANS))
    code = int(coded.codes[3, 4])
    assert coded.color_of(code) == (int(plane[3, 4]),) * 3


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
@pytest.mark.parametrize("values", [np.uint8, np.int16, bool])
def test_lookup_is_indexing(dtype: type, values: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coding, "_BLOCK_PIXELS", 10)
    rng = np.random.default_rng(0)
    table = rng.integers(0, 2, 200).astype(values)
    codes = rng.integers(0, 200, (9, 7)).astype(dtype)
    assert np.array_equal(lookup(table, codes), table[codes])
    assert lookup(table, codes).dtype == table.dtype
