"""Scores at other thresholds of the probability."""

import numpy as np
import pytest

from job.metrics.thresholds import THRESHOLDS, ThresholdSweep, sweep_case


@pytest.mark.parametrize("num_outputs", [1, 2])
def test_sweep_scores_every_threshold(num_outputs: int) -> None:
    truth = np.array([[0, 1, 1, 0]], np.uint8)
    mass = np.array([[0.1, 0.4, 0.8, 0.6]], np.float32)
    probabilities = mass[..., None] if num_outputs == 1 else np.stack([1 - mass, mass], axis=-1)
    sweep = ThresholdSweep(["mass"])
    sweep.add(sweep_case(truth, probabilities, 2))
    nothing = np.zeros((3, 4, num_outputs), np.float32)
    sweep.add(sweep_case(np.zeros((3, 4), np.uint8), nothing, 2))
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
    sweep.add(sweep_case(truth, probabilities, 2, min_lesion=3))
    rows = {row[1]: row[2:] for row in sweep.rows()}
    assert rows[0.6][2:] == (None, 0)
