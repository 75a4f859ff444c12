"""Leaks of ready-made splits, and how they are named."""

from data_prep.splits.leaks import find_leaks


def test_find_leaks_names_groups_and_images_in_two_splits() -> None:
    samples = [
        ("rotated_90_1", "train", "1", "aa"),
        ("1", "test", "1", "bb"),
        ("2", "train", "2", "cc"),
        ("9", "valid", "9", "cc"),
        ("2-copy", "train", "2", "cc"),
    ]
    leaks = [
        "group '1' is in train (rotated_90_1) and test (1)",
        "the same image is in train (2, 2-copy) and valid (9)",
    ]
    assert find_leaks(samples) == leaks
    assert find_leaks(reversed(samples)) == leaks


def test_find_leaks_names_three_files_and_counts_the_rest() -> None:
    samples = [(f"{i}", "train", "p", f"{i}") for i in range(5)] + [("7", "valid", "p", "7")]
    assert find_leaks(samples) == ["group 'p' is in train (0, 1, 2 and 2 more) and valid (7)"]


def test_find_leaks_of_clean_splits_is_empty() -> None:
    samples = [("a", "train", "1", "aa"), ("b", "train", "1", "aa"), ("c", "valid", "2", "bb")]
    assert find_leaks(samples) == []
