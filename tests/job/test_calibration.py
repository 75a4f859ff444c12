"""Expected calibration error, against a table worked by hand and a plain loop over pixels."""

import numpy as np
import pytest

from job.metrics.calibration import NUM_BINS, TOP, Bins, Calibration, bin_case


def plain_error(probabilities: list[float], rights: list[bool]) -> float:
    """Returns the error by its definition, pixel by pixel."""
    total = 0.0
    for index in range(NUM_BINS):
        low, high = index / NUM_BINS, (index + 1) / NUM_BINS
        inside = [
            (p, right)
            for p, right in zip(probabilities, rights, strict=True)
            if low <= p < high or (p == 1 and index == NUM_BINS - 1)
        ]
        if inside:
            confidence = sum(p for p, _ in inside) / len(inside)
            accuracy = sum(right for _, right in inside) / len(inside)
            total += len(inside) / len(probabilities) * abs(accuracy - confidence)
    return total


def test_error_of_a_table_worked_by_hand() -> None:
    # Three pixels of probability 0.5, one of them right, and one of 1 that is right:
    # 3/4 * |1/3 - 1/2| = 0.125.
    truth = np.array([[1, 0, 0, 1]], np.uint8)
    mass = np.array([[0.5, 0.5, 0.5, 1.0]], np.float32)
    found = bin_case(truth, mass[..., None])
    assert found.errors()[0] == pytest.approx(0.125, abs=1e-12)
    # The top class of 0.5 is the background, which two of three are: 3/4 * |2/3 - 1/2|.
    assert found.errors()[1] == pytest.approx(0.125, abs=1e-12)
    assert found.pixels.sum(axis=1).tolist() == [4, 4]
    assert bin_case(truth, np.stack([1 - mass, mass], axis=-1)).errors() == found.errors()


@pytest.mark.parametrize("seed", range(12))
def test_errors_equal_those_of_a_loop_over_pixels(seed: int) -> None:
    random = np.random.default_rng(seed)
    num_classes = int(random.integers(2, 5))
    ignore_id = 255 if seed % 2 else None
    logits = random.normal(0, 3, (9, 7, num_classes))
    shares = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    probabilities = shares.astype(np.float32)
    probabilities[0, 0] = np.eye(num_classes)[1]
    truth = random.integers(0, num_classes, (9, 7)).astype(np.uint8)
    if ignore_id:
        truth[random.random(truth.shape) < 0.2] = ignore_id
    found = bin_case(truth, probabilities, ignore_id).errors()
    pixels = [(y, p) for y, p in zip(truth.ravel(), probabilities.reshape(-1, num_classes),
                                     strict=True) if y != ignore_id]  # fmt: skip
    expected = [
        plain_error([float(p[c]) for _, p in pixels], [bool(y == c) for y, p in pixels])
        for c in range(1, num_classes)
    ]
    expected.append(
        plain_error([float(p.max()) for _, p in pixels], [bool(y == p.argmax()) for y, p in pixels])
    )
    assert found == pytest.approx(expected, abs=1e-9)
    if num_classes == 2:  # as one output, of class 1
        one = bin_case(truth, probabilities[..., 1:], ignore_id).errors()
        assert one == pytest.approx(expected, abs=1e-6)


def test_cases_add_up_in_their_order_and_without_pixels_nothing_is_defined() -> None:
    random = np.random.default_rng(1)
    parts = [
        (random.integers(0, 2, (4, 5)).astype(np.uint8), random.random((4, 5, 1), np.float32))
        for _ in range(3)
    ]
    sums = Calibration(["mass"], [1.0])
    for truth, probabilities in parts:
        sums.add([bin_case(truth, probabilities)])
    together = bin_case(*(np.concatenate(each) for each in zip(*parts, strict=True)))
    (mass,) = sums.summary()["classes"]
    assert mass["ece"] == pytest.approx(together.errors()[0], abs=1e-12)
    assert mass["ece_with_temperature"] is None
    assert sums.summary()["num_pixels"] == 60
    rows = list(sums.rows())
    assert [row[0] for row in rows] == ["mass"] * NUM_BINS + [TOP] * NUM_BINS
    assert sum(row[4] for row in rows[:NUM_BINS]) == 60
    assert (rows[0][2], rows[NUM_BINS - 1][3]) == (0, 1)
    nothing = bin_case(np.full((2, 2), 9, np.uint8), np.zeros((2, 2, 3), np.float32), 9)
    assert nothing.errors() == [None, None, None]
    assert isinstance(nothing, Bins)
