"""The table of unmapped colours: right numbers and classes for any number of colours."""

from typing import Any

import numpy as np
import pytest

from data_prep import report_files
from data_prep.masks.color_map import DEFAULT_CLASSES, parse_color_map
from data_prep.masks.files import MaskFile, read_mask
from data_prep.masks.reading import MAX_COLORS_KEPT, UnmappedColor
from data_prep.masks.rules import MaskRules
from data_prep.report_files import UnmappedColors
from data_prep.shards.source_pairs import EncodedSample


def sample(image_id: str, colors: tuple[UnmappedColor, ...], rest: int = 0) -> EncodedSample:
    known: dict[str, Any] = dict.fromkeys(EncodedSample.__dataclass_fields__)
    number = sum(each.num_pixels for each in colors) + rest
    known |= {"image_id": image_id, "unmapped_colors": colors, "unmapped_pixels": number}
    return EncodedSample(**known)


@pytest.mark.parametrize("seed", range(5))
def test_the_table_adds_up_all_colors_of_all_images(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(report_files, "_MAX_UNMAPPED_COLORS", 40)
    limit = [1000, 60][seed % 2]
    table = UnmappedColors(limit)
    pixels: dict[tuple[int, int, int], int] = {}
    files: dict[tuple[int, int, int], int] = {}
    total = 0
    for image in range(30):
        levels = rng.choice(100 if seed % 2 else 30, int(rng.integers(1, 30)), replace=False)
        colors = tuple(
            UnmappedColor((int(level), 7, 7), int(rng.integers(1, 9)), int(level > 50))
            for level in levels
        )
        rest = int(rng.integers(0, 3)) if seed == 4 else 0
        for color, number, _ in colors:
            pixels[color] = pixels.get(color, 0) + number
            files[color] = files.get(color, 0) + 1
        total += sum(each.num_pixels for each in colors) + rest
        tile = sample(str(image), (), sum(each.num_pixels for each in colors) + rest)
        taken = table.take([sample(str(image), colors, rest), tile])
        assert [each.unmapped_colors for each in taken] == [(), ()]
        assert len(table._pixels) <= limit
    rows = table.rows(DEFAULT_CLASSES)
    assert sum(row[3] for row in rows) == total
    listed = [row for row in rows if row[0] != ""]
    assert len(listed) <= 40
    for red, green, blue, number, num_files, name in listed:
        known = pixels[red, green, blue], files[red, green, blue]
        assert (number, num_files) <= known if seed % 2 else (number, num_files) == known
        assert name == DEFAULT_CLASSES[int(red > 50)].name


def test_a_mask_of_more_colors_keeps_the_commonest() -> None:
    rng = np.random.default_rng(0)
    ids = np.repeat(rng.integers(0, 2, (100, 50)), 2, axis=1)
    noise = rng.integers(0, 30, (100, 100, 3))
    pixels = np.where(ids[..., np.newaxis] == 1, 255 - noise, noise).astype(np.uint8)
    reading = read_mask(MaskFile(pixels), MaskRules(DEFAULT_CLASSES, encoding="colour"), name="m")
    assert len(reading.unmapped_colors) == MAX_COLORS_KEPT
    table = UnmappedColors()
    rest = reading.unmapped_pixels - sum(each.num_pixels for each in reading.unmapped_colors)
    table.take([sample("a", reading.unmapped_colors, rest)])
    assert rest > 0
    assert sum(row[3] for row in table.rows(DEFAULT_CLASSES)) == reading.unmapped_pixels


@pytest.mark.parametrize(
    ("mask", "encoding", "expected"),
    [
        # 16 bits: 12345 is 48 of 255, nearer to black than to grey 200.
        (MaskFile(np.array([[0, 51400, 12345]], np.uint16)), "colour", {12345: "background"}),
        (MaskFile(np.array([[0, 51400, 40000]], np.uint16)), "colour", {40000: "mass"}),
        (
            MaskFile(np.zeros((1, 3), np.uint8), alpha=np.array([[255, 90, 160]], np.uint8)),
            "alpha",
            {90: "background", 160: "mass"},
        ),
        (MaskFile(np.array([[0, 200, 101, 100]], np.uint8)), "colour", {101: "(ignored)"}),
    ],
)
def test_the_nearest_class_is_that_of_the_levels_of_the_file(
    mask: MaskFile, encoding: Any, expected: dict[int, str]
) -> None:
    classes = parse_color_map("background=0,0,0;mass=200,200,200")
    rules = MaskRules(classes, 255, ((100,) * 3,), encoding)
    table = UnmappedColors()
    table.take([sample("a", read_mask(mask, rules, name="m").unmapped_colors)])
    assert {row[0]: row[-1] for row in table.rows(classes)} == expected
