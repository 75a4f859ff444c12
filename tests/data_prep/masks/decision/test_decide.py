"""One decision for all masks: what is certain, what is asked, and with which options."""

import io
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import pytest
from PIL import Image

from data_prep.masks.class_names import VOC_COLORS, VOC_NAMES, id_color
from data_prep.masks.color_map import parse_color_map
from data_prep.masks.decision.decide import GivenOptions, MaskDecision, decide_masks
from data_prep.masks.statistics import MaskStatistics
from tests.data_prep.masks.made_masks import (
    GREYS,
    areas,
    color_file,
    grey_file,
    grey_png,
    image_file,
    outlined,
    palette_file,
    statistics,
)

BW = "background=0,0,0;foreground=255,255,255"
VOC_CLASSES = ";".join(
    f"{name}={','.join(map(str, color))}" for name, color in zip(VOC_NAMES, VOC_COLORS, strict=True)
)
VOC_PALETTE = [level for i in range(256) for level in id_color(i)]
RED_GREEN = [0, 0, 0, 255, 0, 0, 0, 255, 0]
COLORS = [(0, 0, 0), (255, 0, 0), (0, 255, 0), (224, 224, 192)]


def grey(*sets: Sequence[int], **options: object) -> MaskStatistics:
    """Returns the statistics of a grey file with areas of each set of values."""
    files = [grey_file(areas(values, seed=i), **options) for i, values in enumerate(sets)]
    return statistics(*files)


def soft(values: Sequence[int]) -> MaskStatistics:
    image = Image.fromarray(areas(values).astype(np.uint8))
    return statistics(image_file(image.resize((150, 150), Image.Resampling.BICUBIC)))


def with_alpha(mask: np.ndarray) -> bytes:
    image = Image.new("RGBA", mask.shape[::-1], (90, 10, 10, 255))
    image.putalpha(Image.fromarray(mask.astype(np.uint8)))
    return image_file(image)


def lines(values: Sequence[int], seed: int) -> np.ndarray:
    """Returns a mask of 0 with a disc of 255 and lines of one pixel of each value."""
    rng = np.random.default_rng(seed)
    mask = areas([0, 255], seed=seed).astype(np.uint8)
    for value in values:
        first, last = rng.integers(0, 96, 2).tolist()
        cv2.line(mask, (first, 0), (last, 95), value, 1)
    return mask


def lines_and_strays(seed: int) -> np.ndarray:
    """Returns a mask of 0 with lines of 255, and single pixels of 1 beside them."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((96, 96), np.uint8)
    for _ in range(5):
        first, last = rng.integers(0, 96, 2).tolist()
        cv2.line(mask, (first, 0), (last, 95), 255, 3)
    beside = cv2.dilate(mask, np.ones((3, 3), np.uint8)) - mask
    mask[(beside > 0) & (rng.random(mask.shape) < 0.3)] = 1
    return mask


def made_smaller(seed: int) -> np.ndarray:
    """Returns lines of 255 and of three pixels, reduced to half the size."""
    mask = lines_and_strays(seed)
    return cv2.resize(mask & 254 | (mask >> 7), (48, 48), interpolation=cv2.INTER_AREA)


def shaded_lines() -> np.ndarray:
    """Returns a mask of 0 with lines of 255, of one pixel, with shades of 64 and 128 beside it."""
    mask = np.zeros((96, 96), np.uint8)
    for start in (10, 40, 70):
        mask[8:-8, start : start + 3] = (64, 255, 128)
    return mask


def soft_and_solid(value: int) -> np.ndarray:
    """Returns a mask of 0 with a disc of 255 with soft edges, and a solid disc of `value`."""
    mask = np.zeros((192, 192), np.uint8)
    cv2.circle(mask, (50, 50), 35, 255, -1)
    mask = cv2.GaussianBlur(mask, (9, 9), 0)
    cv2.circle(mask, (140, 140), 20, value, -1)
    return mask


def thin_and_void(seed: int) -> np.ndarray:
    """Returns a mask of 0 with lines of 1, two pixels wide, and a border of 255 around them."""
    mask = np.zeros((96, 96), np.uint8)
    for start in range(10 + seed, 80, 20):
        mask[:, start - 2 : start + 4] = 255
        mask[:, start : start + 2] = 1
    return mask


def with_pixel(mask: np.ndarray, value: int) -> np.ndarray:
    mask = mask.copy()
    mask[0, 7] = value
    return mask


def one_hot(num_classes: int) -> MaskStatistics:
    buffer = io.BytesIO()
    np.savez(buffer, mask=np.eye(num_classes, dtype=np.uint8)[areas([0, 1])])
    return statistics(buffer.getvalue(), name="m.npz")


CERTAIN: dict[str, tuple[Callable[[], MaskStatistics], str, str, str | None]] = {
    "0 and 255": (lambda: grey([0, 255], [0]), "colour", BW, None),
    "empty": (lambda: grey([0], [0]), "colour", BW, None),
    "0 and 1": (lambda: grey([0, 1], [0]), "index", BW, None),
    "0 and 1 of 16 bits": (lambda: grey([0, 65535], [0]), "colour", BW, None),
    "ids": (
        lambda: grey([0, 1, 3], [0, 2], [0, 2, 3]),
        "index",
        "background=0,0,0;class1=128,0,0;class2=0,128,0;class3=128,128,0",
        None,
    ),
    "ids with a border": (
        lambda: statistics(grey_file(outlined(areas([0, 1])))),
        "index",
        "background=0,0,0;foreground=128,0,0",
        "255",
    ),
    "Pascal VOC with thin objects": (
        lambda: statistics(palette_file(thin_and_void(0), VOC_PALETTE)),
        "index",
        VOC_CLASSES,
        "255",
    ),
    "Pascal VOC": (
        lambda: statistics(palette_file(areas([0, 2, 255]), VOC_PALETTE)),
        "index",
        VOC_CLASSES,
        "255",
    ),
    "grey of 2 bits": (
        lambda: statistics(grey_png(areas([0, 3]), 2), grey_png(areas([0]), 2)),
        "colour",
        BW,
        None,
    ),
    "a palette": (
        lambda: statistics(palette_file(areas([0, 1, 2]), RED_GREEN)),
        "index",
        "background=0,0,0;class1=255,0,0;class2=0,255,0",
        None,
    ),
    "a palette of greys": (
        lambda: statistics(palette_file(areas([0, 255]), GREYS)),
        "colour",
        BW,
        None,
    ),
    "a palette of black and white": (
        lambda: statistics(palette_file(areas([0, 1]), [0, 0, 0, 255, 255, 255])),
        "colour",
        BW,
        None,
    ),
    "grey levels": (
        lambda: grey([0, 128, 255]),
        "colour",
        "background=0,0,0;class1=128,128,128;class2=255,255,255",
        None,
    ),
    "soft edges": (lambda: soft([0, 255]), "colour", BW, None),
    "noise": (lambda: grey([0, 255], kind="JPEG", quality=60), "colour", BW, None),
    "colours": (
        lambda: statistics(color_file(areas([0, 1, 2]), COLORS), grey_file(areas([0]))),
        "colour",
        "background=0,0,0;green=0,255,0;red=255,0,0",
        None,
    ),
    "colours as JPEG": (
        lambda: statistics(color_file(areas([0, 1, 2], side=192), COLORS, "JPEG", quality=95)),
        "colour",
        "background=0,0,0;green=0,255,1;red=254,0,0",
        None,
    ),
    "colours with a border": (
        lambda: statistics(color_file(outlined(areas([0, 1, 2]), 3), COLORS)),
        "colour",
        "background=0,0,0;green=0,255,0;red=255,0,0",
        "224,224,192",
    ),
    "alpha": (
        lambda: statistics(with_alpha(areas([0, 255])), with_alpha(areas([0]))),
        "alpha",
        BW,
        None,
    ),
    "one-hot": (
        lambda: one_hot(3),
        "index",
        "background=0,0,0;class1=128,0,0;class2=0,128,0",
        None,
    ),
}


@pytest.mark.parametrize("case", CERTAIN)
def test_masks_with_one_meaning_are_certain(case: str) -> None:
    made, encoding, classes, ignore = CERTAIN[case]
    decision = decide_masks(made())
    assert decision.reading is not None, decision
    found = decision.reading
    assert (found.encoding, found.classes, found.ignore) == (encoding, classes, ignore)
    assert decision.evidence
    assert not decision.candidates


ASKED: dict[str, tuple[Callable[[], MaskStatistics], str, list[str]]] = {
    "255 as areas": (
        lambda: grey([0, 1, 255]),
        "255 is no border around areas",
        ["index/255", "colour", "nonzero"],
    ),
    "255 as lines, and stray pixels of 1": (
        lambda: statistics(*(grey_file(lines_and_strays(i)) for i in range(3))),
        "255 is no border around areas",
        ["colour/1", "index/255", "colour", "nonzero"],
    ),
    "black and white made smaller": (
        lambda: statistics(*(grey_file(made_smaller(i)) for i in range(3))),
        "64, 128, 191 have no area",
        ["colour", "colour/64;128;191", "colour"],
    ),
    "lines of levels that are evenly spaced": (
        lambda: statistics(*(grey_file(lines([85, 170], i)) for i in range(3))),
        "85, 170 have no area",
        ["colour", "colour", "colour/85;170"],
    ),
    "ids, a border, and a level near white": (
        lambda: statistics(
            grey_file(outlined(areas([0, 1, 2]))), grey_file(outlined(areas([0, 1, 2, 246])))
        ),
        "several levels near black or white",
        ["colour", "colour"],
    ),
    "white is 254 in some files": (
        lambda: grey([0, 255], [0, 254], [0, 255]),
        "several levels near black or white",
        ["colour", "colour"],
    ),
    "an id on single pixels": (
        lambda: statistics(*(grey_file(with_pixel(areas([0, 1, 2]), 3)) for _ in range(3))),
        "3 covers a few pixels only",
        ["index/3", "index"],
    ),
    "a colour on single pixels": (
        lambda: statistics(*(color_file(with_pixel(areas([0, 1]), 2), COLORS) for _ in range(3))),
        "0,255,0 has no area",
        ["colour", "colour/0,255,0", "colour"],
    ),
    "colours one level apart": (
        lambda: statistics(
            color_file(areas([0, 1]), [(0, 0, 0), (254, 0, 0)]),
            color_file(areas([0, 1], seed=1), [(0, 0, 0), (255, 0, 0)]),
        ),
        "is nearly the colour of another class",
        ["colour", "colour"],
    ),
    "0 and 1, 0 and 255": (
        lambda: grey([0, 1], [0, 255]),
        "others 0 and 255",
        ["mixed", "index/255"],
    ),
    "gaps": (lambda: grey([0, 2]), "1 is missing", ["index", "colour"]),
    "no 0": (lambda: grey([1, 2, 3]), "0 is missing", ["index", "colour"]),
    "uneven levels": (lambda: grey([0, 100, 220]), "nor evenly spaced", ["colour"]),
    "grey levels as JPEG": (
        lambda: grey([0, 128, 255], kind="JPEG", quality=75),
        "the masks have noise",
        ["colour"],
    ),
    "0 and 1 as JPEG": (
        lambda: grey([0, 1, 2], kind="JPEG", quality=95),
        "the files are JPEG",
        ["index"],
    ),
    "16-bit ids": (lambda: grey([0, 300, 600]), "the masks have 16-bit values", ["nonzero"]),
    "instances": (
        lambda: grey([0, 1, 2, 3], [0, 1, 2, 3, 4, 5], [0, 1, 2]),
        "numbers its regions from 1",
        ["index", "nonzero"],
    ),
    "many instances": (
        lambda: grey(range(10), range(12), range(9)),
        "numbers its regions from 1",
        ["nonzero", "index"],
    ),
    "lines of a color with shades at their edges": (
        lambda: statistics(color_file(shaded_lines(), [(i, 0, 0) for i in range(256)])),
        "64,0,0; 128,0,0 have no area",
        ["colour", "colour/64,0,0;128,0,0", "colour"],
    ),
    "soft edges, and an area close to black": (
        lambda: statistics(grey_file(soft_and_solid(32))),
        "several levels near black or white",
        ["colour", "colour"],
    ),
    "soft edges, and an area close to white": (
        lambda: statistics(grey_file(soft_and_solid(227))),
        "several levels near black or white",
        ["colour", "colour"],
    ),
    "instances with the palette of Pascal VOC": (
        lambda: statistics(
            palette_file(areas([0, 1, 2, 3]), VOC_PALETTE),
            palette_file(areas([0, 1, 2]), VOC_PALETTE),
        ),
        "numbers its regions from 1",
        ["index/255", "nonzero/255"],
    ),
    "two entries of one colour": (
        lambda: statistics(palette_file(areas([0, 1, 2]), [0, 0, 0, 255, 0, 0, 255, 0, 0])),
        "two indices of a palette have the same colour",
        ["index", "colour"],
    ),
    "palettes that differ": (
        lambda: statistics(
            palette_file(areas([0, 1, 2]), RED_GREEN),
            palette_file(areas([0, 1, 2]), [0, 0, 0, 0, 255, 0, 255, 0, 0]),
        ),
        "the palettes of the masks differ",
        ["index", "colour"],
    ),
    "black at index 1": (
        lambda: statistics(palette_file(areas([0, 1]), [255, 255, 255, 0, 0, 0])),
        "black is not index 0",
        ["index", "colour"],
    ),
    "no black": (
        lambda: statistics(color_file(areas([0, 1]), COLORS[1:])),
        "none of them is black",
        ["colour", "colour"],
    ),
    "alpha in some": (
        lambda: statistics(with_alpha(areas([0, 255])), grey_file(areas([0, 255]))),
        "1 of 2 masks have one colour",
        ["alpha"],
    ),
    "one value": (lambda: grey([255], [255]), "have only the value 255", ["colour", "index"]),
}


@pytest.mark.parametrize("case", ASKED)
def test_masks_with_several_meanings_are_asked(case: str) -> None:
    made, reason, expected = ASKED[case]
    decision = decide_masks(made())
    assert not decision.is_certain
    assert reason in "; ".join(decision.evidence)
    found = [f"{each.encoding}/{each.ignore}" if each.ignore else each.encoding
             for each in decision.candidates]  # fmt: skip
    assert found == expected
    for each in decision.candidates:
        assert len(parse_color_map(each.classes)) >= 2


def decided(made: MaskStatistics, **given: object) -> MaskDecision:
    return decide_masks(made, GivenOptions(**given))  # type: ignore[arg-type]


def test_given_options_win() -> None:
    made = grey([0, 1, 255])
    ignored = decided(made, ignored=((255, 255, 255),)).reading
    assert ignored is not None
    assert (ignored.encoding, ignored.ignore) == ("index", "255")
    as_ids = decided(made, encoding="index").reading
    assert as_ids is not None
    assert as_ids.ignore == "255"
    as_colors = decided(made, encoding="colour").reading
    assert as_colors is not None
    assert as_colors.classes == "background=0,0,0;class1=1,1,1;class2=255,255,255"
    classes = parse_color_map(BW)
    assert (
        decided(grey([0, 1], [0]), classes=classes).reading
        == decided(grey([0]), classes=classes, encoding="index").reading
    )
    black_white = decided(grey([0, 255], [0]), classes=classes).reading
    assert black_white is not None
    assert black_white.encoding == "colour"
    assert black_white.classes == BW
    both = decided(grey([0, 1], [0, 255]), classes=classes)
    assert [each.encoding for each in both.candidates] == ["mixed", "colour"]


@pytest.mark.parametrize("made", [outlined(areas([0, 1])), areas([0, 1, 255])])
def test_a_class_of_level_255_may_be_void_beside_ids(made: np.ndarray) -> None:
    asked = decided(statistics(grey_file(made)), classes=parse_color_map(BW))
    index, colour = asked.candidates
    assert (index.encoding, index.ignore, colour.encoding) == ("index", "255", "colour")
    assert [each.name for each in parse_color_map(index.classes)] == ["background", "foreground"]
    # A few pixels of 1 beside areas of 255 are no class.
    noisy = areas([0, 255])
    noisy[5, 5::7] = 1
    assert decided(statistics(grey_file(noisy)), classes=parse_color_map(BW)).is_certain


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("values", [[0, 255], [0, 1, 255]])
def test_ignoring_all_foreground_is_neither_the_first_nor_the_only_reading(
    values: list[int], count: int
) -> None:
    classes = parse_color_map(";".join(f"c{i}={80 * i},0,0" for i in range(count)))
    made = grey(values, values)
    asked = decided(made, classes=classes)
    found = [(each.encoding, each.ignore) for each in asked.candidates]
    assert len(found) > 1
    assert ("index", "255") in found
    assert (found[0] == ("index", "255")) == (values == [0, 1, 255])
    assert (("nonzero", None) in found) == (count == 2)
    added = [each for each in asked.candidates if each.encoding == "colour"]
    for each in added:
        names = [entry.name for entry in parse_color_map(each.classes)]
        assert names == [*(f"c{i}" for i in range(count)), f"class{count}"]


def test_ignoring_all_foreground_is_never_certain() -> None:
    voc = statistics(palette_file(areas([0, 255]), VOC_PALETTE))
    assert [each.encoding for each in decided(voc).candidates] == ["nonzero", "index"]
    assert decided(statistics(palette_file(areas([0]), VOC_PALETTE))).is_certain


def test_indices_and_colors_of_given_classes_may_differ() -> None:
    classes = parse_color_map("a=0,0,0;b=255,0,0;c=0,255,0")
    swapped = [0, 0, 0, 0, 255, 0, 255, 0, 0]
    asked = decided(statistics(palette_file(areas([0, 1, 2]), swapped)), classes=classes)
    assert [each.encoding for each in asked.candidates] == ["index", "colour"]
    same = decided(statistics(palette_file(areas([0, 1, 2]), RED_GREEN)), classes=classes)
    assert same.is_certain


def test_the_palette_of_voc_is_that_of_its_kit() -> None:
    assert VOC_COLORS[:6] == (
        (0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128)
    )  # fmt: skip
    assert id_color(20) == (0, 64, 128)
    assert len({id_color(i) for i in range(256)}) == 256


def test_the_order_of_the_files_does_not_matter() -> None:
    rng = np.random.default_rng(3)
    files = [
        color_file(areas([0, 1, 2], seed=3), COLORS, "JPEG", quality=80),
        color_file(areas([0, 2], seed=4), COLORS),
        grey_file(areas([0, 255], seed=5)),
        palette_file(areas([0, 1], seed=6), RED_GREEN),
    ]
    expected = statistics(*files)
    for _ in range(3):
        rng.shuffle(files)
        assert statistics(*files) == expected


def test_statistics_stay_small() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
    found = statistics(image_file(Image.fromarray(noise)))
    assert len(found.colors) <= 256
    assert found.num_left_out + sum(c.num_pixels for c in found.colors.values()) == 3600
    assert not decide_masks(found).is_certain
