"""Words about the summary of an evaluation."""

from typing import Any

import numpy as np

from job.metrics.per_case import Scale, measure_case, summarize_cases
from job.reporting.phrases import size_notes, titled_sizes

PIXELS = Scale((1.0, 1.0), "px")
MM = Scale((0.5, 0.25), "mm")
EMPTY = np.zeros((3, 4), np.uint8)
LESION = np.array([[0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]], np.uint8)


def summary_of(prediction: np.ndarray, scale: Scale = PIXELS) -> dict[str, Any]:
    return summarize_cases([measure_case(LESION, prediction, 2, scale)], ["a"], ["mass"])


def test_notes_say_what_the_numbers_at_a_size_are_of() -> None:
    pixels, mm = summary_of(LESION), summary_of(LESION, MM)
    assert "the stored mask, enlarged" in size_notes("original size", mm)[0]
    assert "take the stored pixels as square" in size_notes("network size", pixels)[0]
    assert size_notes("network size", mm) == []
    assert size_notes("original size, which is the network's", pixels) == []


def test_sizes_that_measure_the_same_are_shown_once() -> None:
    network, original = summary_of(LESION), summary_of(EMPTY)
    assert titled_sizes({"network": network, "original": dict(network)}) == [
        ("original size, which is the network's", network)
    ]
    titles = [title for title, _ in titled_sizes({"network": network, "original": original})]
    assert titles == ["network size", "original size"]
    assert titled_sizes({}) == []
