"""Whole groups in splits and folds, near to the fractions that are asked for."""

import itertools
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.splits.leaks import find_leaks
from data_prep.splits.split import assign_folds, assign_splits
from flexunet.errors import UsageError

FRACTIONS = {"train": 0.8, "valid": 0.15, "test": 0.05}
GROUP_SIZES = st.lists(st.integers(1, 9), min_size=3, max_size=40)


def samples_of(sizes: Sequence[int]) -> dict[str, str]:
    """Group i has sizes[i] samples."""
    return {f"g{i}-{j}": f"g{i}" for i, size in enumerate(sizes) for j in range(size)}


@given(sizes=GROUP_SIZES, seed=st.integers(0, 99), order=st.randoms(use_true_random=False))
def test_assign_splits_is_a_function_of_the_set(sizes: list[int], seed: int, order: object) -> None:
    groups = samples_of(sizes)
    splits = assign_splits(groups, fractions=FRACTIONS, seed=seed)
    shuffled = list(groups.items())
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    assert assign_splits(dict(shuffled), fractions=FRACTIONS, seed=seed) == splits
    assert splits.keys() == groups.keys()
    # A group is in one split, and every split has one.
    places = {(groups[sample], split) for sample, split in splits.items()}
    assert len(places) == len(sizes)
    assert set(splits.values()) == set(FRACTIONS)


@given(sizes=GROUP_SIZES, seed=st.integers(0, 9))
def test_assign_splits_comes_near_to_the_fractions(sizes: list[int], seed: int) -> None:
    counts = Counter(assign_splits(samples_of(sizes), fractions=FRACTIONS, seed=seed).values())
    for split, fraction in FRACTIONS.items():
        # One group for rounding, and one that valid or test has only in order not to be empty.
        assert abs(counts[split] - fraction * sum(sizes)) <= 2 * max(sizes)


@given(sizes=st.lists(st.integers(1, 5), min_size=3, max_size=7), seed=st.integers(0, 3))
def test_assign_splits_of_two_parts_is_close_to_the_best(sizes: list[int], seed: int) -> None:
    # Trying every subset says what is the best. Where no single move helps, less than half of the
    # largest group is missing.
    fractions = {"train": 0.7, "test": 0.3}
    splits = assign_splits(samples_of(sizes), fractions=fractions, seed=seed)
    reached = abs(Counter(splits.values())["test"] - 0.3 * sum(sizes))
    best = min(
        abs(sum(subset) - 0.3 * sum(sizes))
        for length in range(1, len(sizes))
        for subset in itertools.combinations(sizes, length)
    )
    assert reached <= best + max(sizes) / 2


@pytest.mark.parametrize(
    ("number", "counts"),
    [(100, (80, 15, 5)), (20, (16, 3, 1)), (24, (19, 4, 1)), (3, (1, 1, 1)), (10, (8, 1, 1))],
)
def test_assign_splits_of_single_files_rounds_the_fractions(
    number: int, counts: tuple[int, int, int]
) -> None:
    # 24: 19.2, 3.6, 1.2. 10: 8, 1.5, 0.5: half a file short or over each.
    splits = Counter(assign_splits(samples_of([1] * number), fractions=FRACTIONS, seed=1).values())
    assert (splits["train"], splits["valid"], splits["test"]) == counts


def test_assign_splits_depends_on_the_seed_alone() -> None:
    groups = samples_of([1] * 40)
    first = assign_splits(groups, fractions=FRACTIONS, seed=1)
    assert assign_splits(groups, fractions=FRACTIONS, seed=2) != first
    tests = sorted(sample for sample, split in first.items() if split == "test")
    assert tests == ["g24-0", "g27-0"]  # these two forever: a published split must stay


def test_assign_splits_gives_large_groups_to_every_split() -> None:
    # One group in five is large; over 40 seeds the small splits must see some of them.
    groups = samples_of([4, 1, 1, 1, 1] * 12)
    large = {sample for sample in groups if int(sample[1:].split("-")[0]) % 5 == 0}
    fractions = {"train": 0.6, "valid": 0.2, "test": 0.2}
    shares = []
    for seed in range(40):
        splits = assign_splits(groups, fractions=fractions, seed=seed)
        tests = {sample for sample, split in splits.items() if split == "test"}
        shares.append(len(tests & large) / len(tests))
    # Half of all samples (48 of 96) are in large groups.
    assert 0.35 < sum(shares) / len(shares) < 0.65


def test_assign_splits_leaves_out_a_split_of_fraction_zero() -> None:
    splits = assign_splits(
        samples_of([1] * 10), fractions={"train": 0.8, "valid": 0.2, "test": 0}, seed=1
    )
    assert Counter(splits.values()) == {"train": 8, "valid": 2}


@pytest.mark.parametrize(
    ("sizes", "fractions", "message"),
    [
        ([5, 5], FRACTIONS, "2 groups cannot fill 3 splits"),
        ([], FRACTIONS, "0 groups cannot fill 3 splits"),
        ([1] * 9, {"train": 0.8, "valid": 0.3}, "train 0.8, valid 0.3: each must be at least 0"),
        ([1] * 9, {"train": 1.2, "valid": -0.2}, "each must be at least 0"),
        ([1] * 9, {}, "each must be at least 0"),
        ([1] * 9, {"train": 0.8, "dev": 0.2}, "unknown; known: train, valid, test"),
    ],
)
def test_assign_splits_refuses_what_cannot_be_done(
    sizes: list[int], fractions: dict[str, float], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        assign_splits(samples_of(sizes), fractions=fractions, seed=1)


@given(sizes=st.lists(st.integers(1, 6), min_size=5, max_size=30), seed=st.integers(0, 9))
def test_assign_folds_keeps_groups_whole_and_folds_equal(sizes: list[int], seed: int) -> None:
    groups = samples_of(sizes)
    folds = assign_folds(groups, num_folds=5, seed=seed)
    assert len({(groups[sample], fold) for sample, fold in folds.items()}) == len(sizes)
    counts = Counter(folds.values())
    assert sorted(counts) == [0, 1, 2, 3, 4]
    assert max(counts.values()) - min(counts.values()) <= max(sizes)
    assert assign_folds(dict(reversed(groups.items())), num_folds=5, seed=seed) == folds


def test_assign_folds_refuses_too_few_groups_or_folds() -> None:
    with pytest.raises(UsageError, match="4 groups cannot fill 5 folds"):
        assign_folds(samples_of([3] * 4), num_folds=5, seed=1)
    with pytest.raises(UsageError, match="1 fold: at least 2"):
        assign_folds(samples_of([3] * 4), num_folds=1, seed=1)


def exchange_by_all_steps(
    parts: list[list[str]], missing: list[float], sizes: Mapping[str, int]
) -> None:
    """The plain rule that datasets and runs were divided by: the best of every possible step."""
    while True:
        best = (0.0, 0, 0, 0, 0)
        for giver, taker in itertools.permutations(range(len(parts)), 2):
            given = {sizes[group] for group in parts[giver]}
            returned = {sizes[group] for group in parts[taker]}
            if len(parts[giver]) > 1:
                returned.add(0)
            for size, back in itertools.product(given, returned):
                if size > back:
                    before = missing[giver] ** 2 + missing[taker] ** 2
                    moved = size - back
                    gain = before - (missing[giver] + moved) ** 2 - (missing[taker] - moved) ** 2
                    best = max(best, (gain, giver, taker, size, back))
        gain, giver, taker, size, back = best
        if gain < 1e-6:
            return
        for source, target, amount in ((giver, taker, size), (taker, giver, back)):
            if amount:
                group = next(each for each in parts[source] if sizes[each] == amount)
                parts[source].remove(group)
                parts[target].append(group)
        missing[giver] += size - back
        missing[taker] -= size - back


def test_assigning_is_what_the_plain_rule_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits and folds are part of datasets and runs: a faster search may change none."""
    draw = random.Random(7)
    for case in range(1500):
        largest = draw.choice([1, 2, 3, 9, 40, 400])
        sizes = [int(largest ** draw.random()) for _ in range(draw.randint(4, 40))]
        groups = samples_of(sizes)
        first = draw.choice([0.8, 0.7, 0.5, 1 / 3, draw.uniform(0.01, 0.9)])
        second = (1 - first) * draw.choice([0.5, 0.75, draw.random()])
        fractions = {"train": first, "valid": second, "test": 1 - first - second}
        num_folds = draw.randint(2, 4)
        found = [
            assign_folds(groups, num_folds=num_folds, seed=case),
            assign_splits(groups, fractions=fractions, seed=case),
        ]
        with monkeypatch.context() as patch:
            patch.setattr("data_prep.splits.split._exchange", exchange_by_all_steps)
            assert assign_folds(groups, num_folds=num_folds, seed=case) == found[0], case
            assert assign_splits(groups, fractions=fractions, seed=case) == found[1], case


def test_two_thousand_groups_of_many_sizes_take_no_time() -> None:
    draw = random.Random(0)
    groups = samples_of([draw.randint(1, 500) for _ in range(2000)])
    start = time.process_time()
    assign_folds(groups, num_folds=5, seed=1)
    assert time.process_time() - start < 3  # 0.2 s; each step of the search tried takes 10 s


@given(sizes=GROUP_SIZES, seed=st.integers(0, 9))
def test_find_leaks_of_assigned_splits_is_empty(sizes: list[int], seed: int) -> None:
    groups = samples_of(sizes)
    splits = assign_splits(groups, fractions=FRACTIONS, seed=seed)
    assert find_leaks((name, splits[name], groups[name], name) for name in groups) == []
