"""The proposed size: that of small images, the smallest that keeps regions, or tiles."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.config import PrepConfig
from data_prep.imaging.stored_sizes import (
    STEP,
    ClassLoss,
    StoredSize,
    proposed_size,
    stored_sizes,
)

Sizes = Counter[tuple[int, int]]


def proposed(sizes: Sizes, number: int = 100, **lost: int) -> tuple[dict[str, Any], str]:
    """Returns the proposal for a class that loses `lost` regions by longer side: side_512=3."""
    compared = stored_sizes(sizes)
    counts = {size: lost.get(f"side_{max(size.height, size.width)}", 0) for size in compared}
    return proposed_size(sizes, compared, [ClassLoss("mass", number, 10_000, counts)])


@pytest.mark.parametrize(
    ("sizes", "lost", "options"),
    [
        ({(256, 256): 9}, {}, {"image_size": 256}),
        ({(300, 300): 9}, {}, {"image_size": 384}),
        ({(60, 60): 9}, {}, {"image_size": 128}),
        ({(512, 512): 9}, {}, {}),
        ({(3000, 3000): 9}, {}, {}),
        ({(3000, 3000): 9}, {"side_512": 1}, {}),
        ({(3000, 3000): 9}, {"side_512": 2}, {"image_size": 768}),
        ({(3000, 3000): 9}, {"side_512": 9, "side_768": 2}, {"image_size": 1024}),
        ({(3000, 3000): 9}, {"side_512": 9, "side_768": 5, "side_1024": 2}, {"tile": 512}),
        ({(300, 3000): 9}, {"side_512": 9, "side_768": 5, "side_1024": 2},
         {"image_height": 128, "image_width": 1024}),
        ({(720, 960): 9}, {}, {"image_height": 384, "image_width": 512}),
        ({(960, 720): 9}, {"side_512": 2}, {"image_height": 768, "image_width": 640}),
        ({(800, 600): 5, (600, 800): 5}, {}, {"geometry": "pad"}),
        ({(600, 600): 30, (300, 600): 1}, {}, {}),
    ],
)  # fmt: skip
def test_the_size_keeps_regions(
    sizes: dict[tuple[int, int], int], lost: dict[str, int], options: dict[str, Any]
) -> None:
    found, reason = proposed(Counter(sizes), **lost)
    assert found == options
    assert "most images have" in reason


def test_the_reason_names_the_class_that_loses_most() -> None:
    sizes = Counter({(2000, 2000): 5})
    compared = stored_sizes(sizes)
    losses = [
        ClassLoss("vessel", 200, 10_000, {size: 0 for size in compared}),
        ClassLoss("nodule", 50, 10_000, {size: 10 for size in compared}),
        ClassLoss("none", 0, 0, {size: 0 for size in compared}),
    ]
    options, reason = proposed_size(sizes, compared, losses)
    assert options == {"tile": 512}
    assert "resizing to 1024x1024 would lose 20.0% of the regions of nodule" in reason


@pytest.mark.parametrize(
    ("smallest", "options"),
    [(1000, {}), (40, {"image_size": 768}), (20, {"image_size": 1024}), (9, {"tile": 512})],
)
def test_the_smallest_regions_keep_three_pixels(smallest: int, options: dict[str, Any]) -> None:
    sizes = Counter({(2400, 2400): 5})
    compared = stored_sizes(sizes)
    losses = [ClassLoss("exudate", 500, smallest, dict.fromkeys(compared, 0))]
    found, reason = proposed_size(sizes, compared, losses)
    assert found == options
    assert ("1.6 pixels of the smallest 5 %" in reason) == ("tile" in options)


def test_masks_without_regions_have_a_size() -> None:
    sizes = Counter({(2000, 2000): 5})
    options, reason = proposed_size(sizes, stored_sizes(sizes), [])
    assert options == {}
    assert "there are no regions" in reason


@given(
    st.dictionaries(
        st.tuples(st.integers(1, 5000), st.integers(1, 5000)), st.integers(1, 5), min_size=1
    ),
    st.lists(st.integers(0, 100), min_size=5, max_size=5),
)
def test_every_proposal_is_accepted_by_prep_and_the_default_network(
    sizes: dict[tuple[int, int], int], lost: list[int]
) -> None:
    compared = stored_sizes(Counter(sizes))
    assert len(set(compared)) == len(compared)
    losses = [ClassLoss("a", 100, 1 + 9 * lost[4], dict(zip(compared, lost, strict=False)))]
    options, _ = proposed_size(Counter(sizes), compared, losses)
    config = PrepConfig(**options)
    assert config.height % STEP == config.width % STEP == 0
    if not config.tile:
        assert StoredSize(config.height, config.width, config.geometry) in compared
