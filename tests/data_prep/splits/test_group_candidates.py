"""Groups that names may hint at: plausible ones only, the coarsest first."""

import pytest

from data_prep.splits.group_candidates import group_candidates
from data_prep.splits.groups import group_of


def candidates(*names: str) -> list[tuple[str, int, int]]:
    found = group_candidates(dict.fromkeys(names))
    return [(each.value, each.num_groups, each.largest) for each in found]


SLICES = [f"case{c}_day{d}_slice_{s:03}.png" for c in range(4) for d in range(2) for s in range(3)]


def test_patients_and_days_of_slices_are_found() -> None:
    assert candidates(*SLICES) == [
        ("^([^_]+)_", 4, 6),
        ("^([^_]+_[^_]+)_", 8, 3),
    ]


@pytest.mark.parametrize(
    "names",
    [
        [f"{number}.png" for number in range(30)],
        [f"image_{number:03}.png" for number in range(30)],
        [f"image_{number:03}_HC.png" for number in range(30)],
        ["a_1.png", "a_2.png", "b_1.png", "b_2.png"],
        [f"a_{number}.png" for number in range(20)] + ["b_1.png", "c_1.png"],
        [],
        ["a.png"],
    ],
)
def test_numbers_of_single_images_and_a_few_large_groups_are_no_candidates(
    names: list[str],
) -> None:
    assert candidates(*names) == []


@pytest.mark.parametrize(
    ("separator", "pattern"), [("-", r"^([^\-]+)-"), (".", r"^([^\.]+)\."), (" ", r"^([^\ ]+) ")]
)
def test_patterns_have_the_separators_of_the_names(separator: str, pattern: str) -> None:
    names = [f"p{number // 3}{separator}{number}.png" for number in range(12)]
    assert candidates(*names)[0] == (pattern, 4, 3)
    mixed = [*names, "p9_1.png", "p9_2.png"]
    assert all(value != pattern for value, _, _ in candidates(*mixed))


def test_letters_before_a_number_are_groups() -> None:
    names = [f"{who}{number}.png" for who in ("anna", "bert", "carl") for number in (1, 2, 3)]
    assert candidates(*names) == [(r"^([A-Za-z]+)", 3, 3)]


def test_augmented_copies_have_the_preset_only() -> None:
    names = [f"{n}.png" for n in range(4)] + [f"deformed_alpha_13_sigmoid_8_{n}.png"
                                              for n in range(6)]  # fmt: skip
    assert candidates(*names) == [("augmented", 6, 2)]


def test_a_candidate_groups_as_prep_does_and_counts_groups_in_two_splits() -> None:
    splits = {name: "train" if "case3" not in name else "test" for name in SLICES}
    splits[SLICES[0]] = "test"
    first, second = group_candidates(splits)
    assert (first.num_shared, second.num_shared) == (1, 1)
    assert (first.smallest, first.median, first.largest) == (6, 6, 6)
    for each in (first, second):
        rule = group_of(regex=each.value)
        assert len({rule(name) for name in SLICES}) == each.num_groups
        for group, examples in each.examples:
            assert {rule(name) for name in examples} == {group}
