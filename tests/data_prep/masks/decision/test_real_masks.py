"""The masks of public datasets are decided as their authors mean them."""

import pytest

from data_prep.masks.color_map import parse_color_map
from data_prep.masks.decision.decide import GivenOptions, decide_masks
from data_prep.masks.statistics import MaskStatistics, read_statistics
from tests.source_tree import ROOT

REAL = ROOT.parent / "shared" / "data"
MOST = 3  # files of a dataset
BW = {(0, 0, 0), (255, 255, 255)}

# (files, encoding, colours, ignored); the colours within 2 levels of those that the authors name.
CERTAIN = {
    "MVTec-SCREW": ("family/MVTec-SCREW/**/masks/*", "colour", {(0, 255, 0), (255, 0, 0)}, None),
    "Leukocyte": (
        "family/Leukocyte/**/masks/*", "colour", {(0, 0, 255)}, None,
    ),
    "PD25": ("family/Brain-MRI-PD25/**/masks/*", "colour", BW, None),
    "CamVid": (
        "family/CamVid-11-Classes/**/masks/*",
        "colour",
        {(128, 64, 128), (128, 128, 128), (0, 0, 192), (192, 192, 128), (0, 128, 192)},
        None,
    ),
    "Car-Damages": (
        "family/Car-Damages/**/masks/*", "colour", {(166, 255, 71), (144, 60, 89)}, None,
    ),
    "ISBI": ("isbi-membrane/label/*", "colour", BW, None),
    "DRIVE": ("drive/training/1st_manual/*", "colour", BW, None),
    "LabelMe": (
        "labelme/data_dataset_voc/SegmentationClass/*", "index", {(128, 0, 0), (0, 128, 0)}, "255",
    ),
    "INbreast": ("inbreast-mini/masks/*", "colour", BW, None),
}  # fmt: skip


def statistics_at(pattern: str, most: int = MOST) -> MaskStatistics:
    files = sorted(REAL.glob(pattern))
    if not files:
        pytest.skip(f"{REAL / pattern}: the dataset is missing")
    chosen = files[:: -(-len(files) // most)]
    return sum(
        (read_statistics(path.read_bytes(), name=path.name, max_pixels=10**8) for path in chosen),
        MaskStatistics(),
    )


@pytest.mark.parametrize("name", CERTAIN)
def test_the_decision_is_certain_and_right(name: str) -> None:
    pattern, encoding, colors, ignore = CERTAIN[name]
    decision = decide_masks(statistics_at(pattern))
    assert decision.reading is not None, decision
    assert (decision.reading.encoding, decision.reading.ignore) == (encoding, ignore)
    classes = parse_color_map(decision.reading.classes)
    assert classes[0].color == (0, 0, 0)
    for color in colors:
        distances = [
            max(abs(a - b) for a, b in zip(color, each.color, strict=True)) for each in classes
        ]
        assert min(distances) <= 2
    hints = {"ISBI": "if black is the object", "CamVid": "give --background none"}
    assert (hints.get(name, "give --background") in "; ".join(decision.evidence)) == (name in hints)
    if colors == BW:
        assert [each.name for each in classes] == ["background", "foreground"]


def test_a_colour_on_a_few_pixels_is_asked() -> None:
    """Some pixels of UWM-GI-Tract are magenta, which its authors do not name."""
    masks = statistics_at("family/UWM-GI-Tract/**/masks/*", most=8)
    decision = decide_masks(masks)
    assert not decision.is_certain
    assert [each.ignore for each in decision.candidates] == [None, "255,0,255"]
    given = parse_color_map("b=0,0,0;large=255,255,0;small=0,200,0;stomach=255,0,0")
    assert decide_masks(masks, GivenOptions(classes=given)).is_certain
