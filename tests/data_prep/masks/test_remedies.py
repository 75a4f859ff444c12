"""Each option in the error of a mask is one that `prep` accepts, and that changes the outcome."""

import dataclasses
import re
import shlex

import numpy as np
import pytest

from data_prep.config import PrepConfig
from data_prep.masks.color_map import parse_color_map
from data_prep.masks.files import MaskFile, read_mask
from data_prep.masks.rules import MaskRules
from flexunet.errors import ContentError

TWO = "background=0,0,0;mass=255,255,255"
ORGANS = "background=0,0,0;mass=255,0,0;skin=0,255,0"


def rules_of(config: PrepConfig) -> MaskRules:
    return MaskRules(
        config.color_map,
        config.ignore_value,
        config.ignored_colors,
        config.file_encoding,
        config.ignore_id is not None,
    )


def remedies(message: str, options: dict[str, object]) -> list[dict[str, object]]:
    """Returns the options as changed by each remedy in an error."""
    found = []
    for part in re.split(r", or (?=ignore|use)|; |; else ", message.replace("-encoding is", "")):
        changed = dict(options)
        words = shlex.split(part.replace("'", ""))
        for place, word in enumerate(words[:-1]):
            if word in ("--ignore", "--mask-encoding"):
                changed[word[2:].replace("-", "_")] = words[place + 1].rstrip(",;")
        added = re.search(r"add the colour (\S+) to --classes", part)
        if added:
            changed["classes"] = f"{options['classes']};more={added[1]}"
        number = re.search(r"give all (\d+) --classes", part)
        if number:
            rest = range(str(options["classes"]).count(";") + 1, int(number[1]))
            more = [f"c{i}=250,{i},200" for i in rest]
            changed["classes"] = ";".join([str(options["classes"]), *more])
        if changed != options:
            found.append(changed)
    return found


def outcome(mask: MaskFile, options: dict[str, object]) -> str | None:
    """Returns the error of reading `mask`, None if it is read."""
    try:
        read_mask(mask, rules_of(PrepConfig.model_validate(options)), name="m.png")
    except ContentError as error:
        return str(error)
    return None


def areas(background: int, dtype: str, *levels: int) -> MaskFile:
    """Returns a grey mask with a square of each level."""
    plane = np.full((40, 12 * (len(levels) + 1)), background, dtype)
    for i, level in enumerate(levels):
        plane[8:16, 12 * i + 4 : 12 * i + 12] = level
    return MaskFile(plane)


def colored(*colors: tuple[int, int, int]) -> MaskFile:
    mask = np.zeros((40, 12 * (len(colors) + 1), 3), np.uint8)
    for i, color in enumerate(colors):
        mask[8:16, 12 * i + 4 : 12 * i + 12] = color
    return MaskFile(mask)


def random_grey(seed: int) -> MaskFile:
    rng = np.random.default_rng(seed)
    dtype, top = ("u1", 255) if seed % 2 else ("u2", 65535)
    levels = [int(each) for each in rng.integers(1, top, int(rng.integers(1, 5)))]
    return areas(0, dtype, top, *levels)


MASKS = {
    "one grey level": (areas(0, "u1", 255, 100), {}),
    "level of an id": (areas(0, "u1", 255, 1), {}),
    "two levels": (areas(0, "u1", 255, 100, 60), {}),
    "levels beside an ignored one": (areas(0, "u1", 255, 100, 60), {"ignore": "60"}),
    "16 bits": (areas(0, "u2", 65535, 30000, 300), {}),
    "16 bits, less than one level": (areas(0, "u2", 65535, 100), {}),
    "16 bits, the level of an id": (areas(0, "u2", 65535, 1), {}),
    "16 bits, the level of a class in 8": (areas(0, "u2", 65535, 255), {}),
    "12 bits": (areas(0, "u2", 4095), {}),
    "ids": (areas(0, "u1", 2, 1), {}),
    "ids that are lines": (MaskFile(np.array([[0, 1, 2]], np.uint8)), {}),
    "index": (areas(0, "u1", 1, 2, 255), {"mask_encoding": "index"}),
    "index beside an ignored one": (
        areas(0, "u1", 1, 2, 9),
        {"mask_encoding": "index", "ignore": "9"},
    ),
    "index of 16 bits": (areas(0, "u2", 1, 300, 400), {"mask_encoding": "index"}),
    "the ignore id as a level": (areas(0, "u1", 255, 254), {"ignore_id": 254}),
    "colours": (colored((255, 0, 0), (10, 80, 200)), {"classes": ORGANS}),
    "only other colours": (colored((250, 240, 0)), {"classes": ORGANS}),
    "a grey level of an id among colours": (
        colored((255, 0, 0), (2, 2, 2)),
        {"classes": ORGANS},
    ),
    "colours as index": (colored((255, 0, 0)), {"mask_encoding": "index"}),
    **{f"random {seed}": (random_grey(seed), {}) for seed in range(12)},
}


@pytest.mark.parametrize("case", MASKS)
def test_each_remedy_is_accepted_and_changes_the_outcome(case: str) -> None:
    mask, given = MASKS[case]
    options: dict[str, object] = {"classes": TWO} | given
    before = outcome(mask, options)
    if before is None:
        assert case.startswith("random")
        return
    changes = remedies(before, options)
    if not changes:
        assert before.endswith("; save these masks with 8 bits a channel")
    for changed in changes:
        assert outcome(mask, changed) != before, changed
    if not changes or "colours as index" in case:
        return
    for _ in range(6):  # the last remedy, again and again, ends with a mask that is read
        message = outcome(mask, options)
        if message is None:
            return
        options = remedies(message, options)[-1]
    pytest.fail(str(message))


def test_ignored_levels_of_16_bits_are_read_as_in_the_file_and_in_8_bits() -> None:
    mask = areas(0, "u2", 65535, 300, 100 * 257)
    config = PrepConfig(classes=TWO, ignore="300;100", ignore_id=7)
    reading = read_mask(mask, rules_of(config), name="m")
    ids = reading.ids
    assert reading.unmapped_pixels == 0
    assert [int(ids[10, column]) for column in (6, 18, 30)] == [1, 7, 7]
    rules = dataclasses.replace(rules_of(config), ignored=((300,) * 3,))
    with pytest.raises(ContentError, match=r"64 pixels of grey level 25700 at row 8, column 28"):
        read_mask(mask, rules, name="m")


@pytest.mark.parametrize("offset", [-1, 1])
def test_a_level_of_16_bits_beside_a_class_is_never_another_class(offset: int) -> None:
    classes = parse_color_map(";".join(f"c{i}={100 + i},{100 + i},{100 + i}" for i in range(4)))
    for entry in classes:
        plane = np.full((9, 9), entry.color[0] * 257)
        plane[4, 4] += offset
        plane[:, 0] = 101 * 257
        mask = MaskFile(plane.astype(np.uint16))
        reading = read_mask(mask, MaskRules(classes, encoding="colour"), name="m")
        assert (reading.ids[:, 1:] == entry.id).all()
        assert reading.unmapped_pixels == 1
