"""Scores at other thresholds of the probability."""

from dataclasses import fields

import numpy as np
import pytest

from job.metrics import lesions, thresholds
from job.metrics.lesions import MIN_IOU, label_regions, regions_of_classes, without_small_regions
from job.metrics.thresholds import THRESHOLDS, ThresholdSweep, sweep_case


@pytest.mark.parametrize("num_outputs", [1, 2])
def test_sweep_scores_every_threshold(num_outputs: int) -> None:
    truth = np.array([[0, 1, 1, 0]], np.uint8)
    mass = np.array([[0.1, 0.4, 0.8, 0.6]], np.float32)
    probabilities = mass[..., None] if num_outputs == 1 else np.stack([1 - mass, mass], axis=-1)
    sweep = ThresholdSweep(["mass"])
    sweep.add(sweep_case(regions_of_classes(truth, 2), probabilities))
    nothing = np.zeros((3, 4, num_outputs), np.float32)
    sweep.add(sweep_case(regions_of_classes(np.zeros((3, 4), np.uint8), 2), nothing))
    rows = {row[1]: row[2:] for row in sweep.rows()}
    assert list(rows) == list(THRESHOLDS)
    # Columns 1 to 3 predicted: 4 / 5; one lesion found, nothing else predicted in two pictures.
    assert rows[0.4] == (pytest.approx(0.8), pytest.approx(0.8), 1, 0)
    # Columns 2 and 3: 2 / 4. Column 2 alone: 2 / 3. None: 0, the lesion is missed.
    assert rows[0.6][0] == pytest.approx(0.5)
    assert rows[0.8][0] == pytest.approx(2 / 3)
    assert rows[0.85] == (0, 0, 0, 0)
    # A speck is no lesion, and what finds it is no false positive.
    sweep = ThresholdSweep(["mass"])
    sweep.add(sweep_case(regions_of_classes(truth, 2, min_pixels=3), probabilities))
    rows = {row[1]: row[2:] for row in sweep.rows()}
    assert rows[0.6][2:] == (None, 0)


@pytest.mark.parametrize("seed", range(40))
def test_sweep_equals_one_count_for_each_threshold(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if seed % 2:  # as with large images: few thresholds at a time, too many pairs for a table
        monkeypatch.setattr(thresholds, "_MAX_PIXELS", 500)
        monkeypatch.setattr(lesions, "_MAX_TABLE", 0)
    random = np.random.default_rng(seed)
    height, width = random.integers(1, 40, 2)
    num_classes, min_lesion = int(random.integers(2, 6)), int(random.integers(1, 8))
    num_outputs = 1 if num_classes == 2 and seed % 4 < 2 else num_classes
    truth = random.integers(0, num_classes, (height, width)).astype(np.uint8)
    truth *= random.random((height, width)) < random.random()
    probabilities = random.random((height, width, num_outputs)).astype(np.float32)
    if seed % 3 == 0:  # many values are exactly at a threshold
        probabilities = np.round(probabilities * 20) / np.float32(20)
    if seed % 5 == 0:
        probabilities[random.random(probabilities.shape) < 0.1] = np.nan
    found = sweep_case(regions_of_classes(truth, num_classes, min_pixels=min_lesion), probabilities)
    for index in range(num_classes - 1):
        of_class = truth == index + 1
        tiny = of_class & ~without_small_regions(of_class, min_lesion)
        for step, threshold in enumerate(THRESHOLDS):
            values = probabilities[..., index + (num_outputs > 1)]
            predicted = values >= np.float32(threshold)
            expected = (
                np.count_nonzero(of_class & predicted),
                np.count_nonzero(predicted & ~of_class),
                np.count_nonzero(of_class & ~predicted),
                *_count_plainly(of_class, predicted, tiny),
            )
            assert tuple(getattr(found, f.name)[index, step] for f in fields(found)) == expected


def _count_plainly(truth: np.ndarray, predicted: np.ndarray, tiny: np.ndarray) -> tuple[int, ...]:
    """Returns the lesions, those found, and the false positives; compares all pairs of regions."""
    true_labels, true_sizes = label_regions(truth)
    labels, sizes = label_regions(predicted)
    pairs = []
    for first in range(1, len(true_sizes)):
        for second in range(1, len(sizes)):
            overlap = np.count_nonzero((true_labels == first) & (labels == second))
            iou = overlap / (true_sizes[first] + sizes[second] - overlap)
            if overlap and iou >= MIN_IOU:
                pairs.append((-iou, first, second))
    matched: dict[int, int] = {}
    for _, first, second in sorted(pairs):
        if first not in matched and second not in matched.values():
            matched[first] = second
    tiny_ones = {n for n in range(1, len(true_sizes)) if tiny[true_labels == n].all()}
    num_found = len(matched.keys() - tiny_ones)
    num_tiny_found = len(matched) - num_found
    num_true = len(true_sizes) - 1 - len(tiny_ones)
    return num_true, num_found, len(sizes) - 1 - num_tiny_found - num_found
