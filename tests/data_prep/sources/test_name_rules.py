"""Rules for the names of masks: found from random and known names, given, ambiguous, wrong."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.sources.name_rules import (
    EQUAL,
    NamePatterns,
    NameRule,
    find_rule,
    split_one_folder,
)
from flexunet.errors import UsageError

NUMBERS = [f"{i}" for i in range(1, 21)]


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("{}", "{}_mask"),
        ("{}", "{}_seg"),
        ("{}", "{}_label"),
        ("{}", "{}_gt"),
        ("IDRiD_{}", "IDRiD_{}_EX"),
        ("{}_training", "{}_manual1"),
        ("img_{}", "mask_{}"),
        ("{}", "gt_{}"),
        ("scan_manual_{}", "{}_manual_x"),
        ("benign ({})", "benign ({})_mask"),
        ("Image{}L", "Image{}L-1stHO"),
        ("im{}", "lab{}"),
        ("a.{}.b", "a.{}.c"),
        ("{}", "{}"),
    ],
)
@pytest.mark.parametrize("keys", [NUMBERS, ["07"], ["1", "12"], ["b", "ab", "abc"]])
def test_a_common_text_around_the_names_is_found(image: str, mask: str, keys: list[str]) -> None:
    images, masks = [image.format(k) for k in keys], [mask.format(k) for k in keys]
    rule = find_rule([(images, masks)], "source")
    assert rule is not None
    assert rule.match(images, masks) == {i: (m,) for i, m in zip(images, masks, strict=True)}
    assert [rule.image_of(mask) for mask in masks] == images


TEXT = st.text("ab1_-", max_size=4)
WORDS = st.text("ab_-", max_size=4)
KEYS = st.lists(st.text("abc12_", min_size=1, max_size=5), min_size=2, max_size=30, unique=True)


@given(KEYS, TEXT, TEXT, TEXT, TEXT)
def test_random_texts_around_random_names_are_found(
    keys: list[str], before: str, after: str, left: str, right: str
) -> None:
    images = [f"{before}{key}{after}" for key in keys]
    masks = [f"{left}{key}{right}" for key in keys]
    expected = {image: (mask,) for image, mask in zip(images, masks, strict=True)}
    assert len(expected) == len(keys)
    rule = find_rule([(images, masks)], "source")
    assert rule is not None
    assert rule.match(images, masks) == expected


@settings(max_examples=40)
@given(
    st.integers(4, 40),
    st.integers(0, 10**6),
    WORDS,
    WORDS,
    WORDS,
    WORDS,
    st.lists(st.text("xyz", min_size=1, max_size=6), max_size=2, unique=True),
)
def test_numbers_of_equal_length_are_always_found_also_with_other_files(
    count: int, first: int, before: str, after: str, left: str, right: str, others: list[str]
) -> None:
    keys = [f"{first + i:08d}" for i in range(count)]
    images = [f"{before}{key}{after}" for key in keys] + others
    masks = [f"{left}{key}{right}" for key in keys] + [f"{other}q" for other in others[:1]]
    rule = find_rule([(images, masks)], "source")
    assert rule is not None
    found = rule.match(images, masks)
    assert {f"{before}{k}{after}": (f"{left}{k}{right}",) for k in keys}.items() <= found.items()


def test_one_rule_is_for_all_folders() -> None:
    folders = [(["a1"], ["a1_m"]), (["b1", "b2"], ["b1_m", "b2_m"]), (["c1"], ["c1_m"])]
    assert find_rule(folders, "source") == NameRule(mask=("", "_m"))
    mixed = [(["a1", "a2"], ["a1_m", "a2_m"]), (["b1", "b2"], ["b1_x", "b2_x"])]
    with pytest.raises(UsageError, match=r"a1 with a1_m \(2 pairs: .*b1 with b1_x \(2 pairs"):
        find_rule(mixed, "source")


def test_masks_of_several_kinds_are_asked_for_even_if_one_is_incomplete() -> None:
    masks = [f"{n}{kind}" for n in NUMBERS for kind in ("_color", "_ids")]
    for names in (masks, [name for name in masks if name != "7_color"]):
        with pytest.raises(UsageError, match=r"^source: more than one rule") as caught:
            find_rule([(NUMBERS, names)], "source")
        assert '--mask-name "{stem}_color"' in str(caught.value)
        assert '--mask-name "{stem}_ids"' in str(caught.value)


def test_a_few_masks_of_another_kind_are_left_over() -> None:
    masks = [f"{n}_mask" for n in NUMBERS] + ["3_mask_1", "4_mask_1"]
    assert find_rule([(NUMBERS, masks)], "source") == NameRule(mask=("", "_mask"))


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ([], []),
        (["x"], []),
        (["x", "y"], ["p", "q"]),
        (["1", "2"], ["001", "003"]),
        ([f"a{n}" for n in NUMBERS], ["b3", *(f"{n}{n}c" for n in "pqrstuvwxyzklmnoabcdef")]),
    ],
)
def test_names_without_a_rule_have_none(images: list[str], masks: list[str]) -> None:
    assert find_rule([(images, masks)], "source") is None


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (EQUAL, '--mask-name "{stem}"'),
        (NameRule(mask=("m_", "")), '--mask-name "m_{stem}"'),
        (
            NameRule(("", "_training"), ("", "_manual1")),
            '--image-name "{stem}_training" --mask-name "{stem}_manual1"',
        ),
    ],
)
def test_a_rule_names_its_options(rule: NameRule, options: str) -> None:
    assert rule.as_options() == options


def test_a_found_rule_has_its_separators_outside_of_the_key() -> None:
    images, masks = [f"{n}_training" for n in NUMBERS], [f"{n}_manual1" for n in NUMBERS]
    for count in (1, 20):
        rule = find_rule([(images[:count], masks[:count])], "source")
        assert rule == NameRule(("", "_training"), ("", "_manual1"))
    images, masks = [f"img_{n}" for n in NUMBERS], [f"mask_{n}" for n in NUMBERS]
    assert find_rule([(images, masks)], "source") == NameRule(("img_", ""), ("mask_", ""))


@pytest.mark.parametrize(
    ("image", "mask", "masks", "expected"),
    [
        ("{stem}", "{stem}_mask", ["a_mask", "b_mask"], {"a": ("a_mask",), "b": ("b_mask",)}),
        ("{stem}", "{stem}_*", ["a_1", "a_2"], {"a": ("a_1", "a_2")}),
        ("{stem}", "{stem}_mask*", ["a_mask", "a_mask_1", "c"], {"a": ("a_mask", "a_mask_1")}),
        ("{stem}", "*_{stem}", ["x_a", "y_b", "y_a"], {"a": ("x_a", "y_a"), "b": ("y_b",)}),
        ("{stem}", "{stem}[12]", ["a1", "a2", "a3"], {"a": ("a1", "a2")}),
        ("{stem}", "{stem}[!3-9]", ["a1", "a4"], {"a": ("a1",)}),
        ("{stem}", "*{stem}*", ["a_a", "xbx"], {"a": ("a_a",), "b": ("xbx",)}),
        ("{stem}", "m?{stem}", ["m1a", "m12a", "ma"], {"a": ("m1a",)}),
        ("{stem}", "{stem}.(1)", ["a.(1)", "ax(1)"], {"a": ("a.(1)",)}),
    ],
)
def test_a_pattern_joins_masks_with_their_image(
    image: str, mask: str, masks: list[str], expected: dict[str, tuple[str, ...]]
) -> None:
    assert NamePatterns(image, mask).match({"a", "b"}, set(masks)) == expected


def test_a_pattern_of_images_removes_their_text() -> None:
    patterns = NamePatterns("{stem}_training", "{stem}_manual1")
    images = {"1_training", "11_training", "other"}
    assert patterns.match(images, {"1_manual1", "11_manual1", "other_manual1"}) == {
        "1_training": ("1_manual1",),
        "11_training": ("11_manual1",),
    }


def test_a_pattern_without_stem_joins_all_masks_of_a_folder_with_one_image() -> None:
    assert NamePatterns(mask="*").match({"a"}, {"x", "y"}) == {"a": ("x", "y")}
    with pytest.raises(UsageError, match="mask x belongs to the images a and b; give a pattern"):
        NamePatterns(mask="*").match({"a", "b"}, {"x"})


def test_a_mask_of_two_images_is_asked_for() -> None:
    with pytest.raises(UsageError, match=r"mask a_1_2 belongs to the images a and a_1"):
        NamePatterns(mask="{stem}_*").match({"a", "a_1"}, {"a_1_2"})


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        ("x", "{stem}", "--image-name 'x': lacks {stem}"),
        ("{stem}", "{stem}{stem}", "contains {stem} more than once"),
        ("{stem}", "{stem}.png", "must be a name without its ending"),
        ("{stem}", "", "must be a name without its ending"),
        ("{stem}", "masks/{stem}", "contains a slash"),
        ("{stem}", "{stem}[z-a]", "is not a pattern"),
    ],
)
def test_a_wrong_pattern_says_what_is_wrong(image: str, mask: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        NamePatterns(image, mask)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "masks",
    [
        {"a_mask", "b_mask"},
        {"a-Mask-1", "mask b"},
        {"aGT", "GT_b", "a.seg"},
        {"a_GroundTruth", "ManualB"},
    ],
)
def test_the_masks_of_a_folder_with_both_have_a_known_word(masks: set[str]) -> None:
    images = {"a", "b", "unmasked", "segovia", "c12"}
    assert split_one_folder(images | masks) == (images, masks)


def test_a_given_pattern_divides_a_folder_with_both() -> None:
    stems = {"a", "b", "a_1", "a_2", "b_1", "c"}
    found = NamePatterns(mask="{stem}_*").split(stems)
    assert found == ({"a", "b", "c"}, {"a_1", "a_2", "b_1"})
    assert NamePatterns(mask="{stem}*").split({"a", "b", "a1"}) == ({"a", "b"}, {"a1"})


def test_a_rule_that_leaves_no_file_over_has_no_rival() -> None:
    keys = ["a_1", "a_11", "a_111"]  # {stem}1_m pairs two of them
    rule = find_rule([(keys, [f"{key}_m" for key in keys])], "source")
    assert rule == NameRule(mask=("", "_m"))
