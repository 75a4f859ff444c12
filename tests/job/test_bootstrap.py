import numpy as np
import pytest

from job.metrics import bootstrap
from job.metrics.bootstrap import interval, intervals, num_contributing, ratio


def test_ratio_is_of_sums_and_averages_over_classes() -> None:
    numerator, denominator = np.array([1.0, 2.0]), np.array([2.0, 2.0])
    assert ratio(numerator, denominator) == 3 / 4
    two = np.stack([numerator, np.array([0.0, 1.0])], axis=1)
    # 3 / 4 and 1 / 1; a class with nothing below plays no part.
    assert ratio(two, np.array([[2.0, 0.0], [2.0, 1.0]])) == (0.75 + 1) / 2
    assert ratio(two, np.array([[2.0, 0.0], [2.0, 0.0]])) == 0.75
    assert ratio(numerator, np.zeros(2)) is None


def test_interval_of_a_mean_is_near_the_normal_one() -> None:
    random = np.random.default_rng(3)
    values = random.normal(0.8, 0.1, 400)
    found = interval(values, np.ones(400), [str(index) for index in range(400)])
    assert found is not None
    # 1.96 standard errors of the mean.
    error = 1.96 * values.std() / 20
    assert found == pytest.approx((values.mean() - error, values.mean() + error), abs=0.1 * error)


def test_interval_draws_whole_groups() -> None:
    # Ten cases of each of 20 patients are alike: as wide as that of 20 cases, not of 200.
    random = np.random.default_rng(4)
    patients = random.normal(0.5, 0.1, 20)
    values, groups = np.repeat(patients, 10), np.repeat([str(i) for i in range(20)], 10)
    by_patient = interval(values, np.ones(200), list(groups))
    alone = interval(patients, np.ones(20), [str(i) for i in range(20)])
    by_case = interval(values, np.ones(200), [str(i) for i in range(200)])
    assert by_patient and alone and by_case
    assert by_patient[1] - by_patient[0] == pytest.approx(alone[1] - alone[0], rel=0.1)
    assert by_patient[1] - by_patient[0] > 2.5 * (by_case[1] - by_case[0])


def test_interval_is_the_same_for_a_seed_and_contains_the_value() -> None:
    values, groups = np.array([0.1, 0.3, 0.5, 0.7, 0.9]), list("abcde")
    first = interval(values, np.ones(5), groups)
    assert first == interval(values, np.ones(5), groups)
    assert first is not None
    assert 0.1 <= first[0] <= 0.5 <= first[1] <= 0.9
    assert first != interval(values, np.ones(5), groups, seed=1, num_draws=10)


def test_interval_needs_five_groups_with_a_value() -> None:
    values = np.array([0.5, 0.5, 0.5, 0.7, 0.9, 0.0])
    assert interval(values, np.ones(6), ["a", "a", "b", "c", "d", "d"]) is None
    has_value = np.array([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    assert num_contributing(has_value, list("abcdef")) == 4
    assert interval(values * has_value, has_value, list("abcdef")) is None
    # A group without a value pulls nothing towards 0.
    has_value[4] = 1
    found = interval(values, has_value, list("abcdef"))
    assert num_contributing(has_value, list("abcdef")) == 5
    assert found is not None
    assert 0.5 <= found[0] < found[1] <= 0.9


def test_groups_contribute_by_any_of_several_quotients() -> None:
    denominator = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
    assert num_contributing(denominator, ["a", "b", "c", "b"]) == 2


@pytest.mark.parametrize("max_weights", [9000, 100])
def test_intervals_of_many_measures_are_those_of_each_alone(
    max_weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "_MAX_WEIGHTS", max_weights)  # 450 or 4 draws at a time
    random = np.random.default_rng(6)
    groups = [f"patient-{number}" for number in random.integers(0, 20, 50)]
    pairs = [
        (random.random(shape), (random.random(shape) < 0.3) * random.random(shape))
        for shape in ((50,), (50, 3), (50,))
    ]
    pairs.append((np.ones(50), np.arange(50) == 7))  # one group has a value
    found = intervals(pairs, groups, num_draws=333)
    assert found == [interval(*pair, groups, num_draws=333) for pair in pairs]
    for pair, each in zip(pairs[:3], found[:3], strict=True):
        assert each == pytest.approx(_plain_interval(*pair, groups))
    assert found[3] is None


def _plain_interval(
    numerators: np.ndarray, denominators: np.ndarray, groups: list[str]
) -> tuple[float, float]:
    """Returns the interval of 333 draws, one at a time and group by group."""
    names = sorted(set(groups))
    random = np.random.default_rng(0)
    values = []
    for _ in range(333):
        drawn = random.multinomial(len(names), [1 / len(names)] * len(names))
        weights = [drawn[names.index(group)] for group in groups]
        value = ratio(*((values.T * weights).T for values in (numerators, denominators)))
        values += [] if value is None else [value]
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
