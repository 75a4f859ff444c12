"""Words about the summary of an evaluation."""

from typing import Any

import numpy as np

from job.metrics.confusion import summarize
from job.metrics.per_case import Scale, measure_case, summarize_cases
from job.reporting.phrases import (
    baseline_warnings,
    everything_dice,
    everything_rows,
    headline_words,
    size_notes,
    titled_sizes,
)

PIXELS = Scale((1.0, 1.0), "px")
MM = Scale((0.5, 0.25), "mm")
EMPTY = np.zeros((3, 4), np.uint8)
LESION = np.array([[0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]], np.uint8)


def summary_of(prediction: np.ndarray, scale: Scale = PIXELS) -> dict[str, Any]:
    return summarize_cases([measure_case(LESION, prediction, 2, scale)], ["a"], ["mass"])


def test_notes_say_what_the_numbers_at_a_size_are_of() -> None:
    pixels, mm = summary_of(LESION), summary_of(LESION, MM)
    assert "the stored mask, enlarged" in size_notes("original size", mm)[0]
    assert "assume square pixels" in size_notes("network size", pixels)[0]
    assert size_notes("network size", mm) == []
    assert size_notes("original size (same as network size)", pixels) == []


def test_a_class_that_is_no_better_than_on_every_pixel_is_named() -> None:
    # 79 of 100 pixels are the mass; of them 70 are found, and 20 others are false.
    summary = summarize(np.array([[[1, 9, 20, 70], [70, 20, 9, 1]]]))
    for each, name in zip(summary["classes"], ("background", "mass"), strict=True):
        each["name"] = name
    assert baseline_warnings(summary) == [
        "mass: Dice 0.8284 is not above the predict-everything baseline (0.8827)."
    ]
    assert everything_rows(summary) == [("mass", 140 / 169, 158 / 179)]
    assert everything_dice(summary) == 158 / 179
    good = summarize(np.array([[[20, 1, 1, 78], [78, 1, 1, 20]]]))
    empty = summarize(np.array([[[90, 0, 10, 0], [0, 10, 0, 90]]]))  # false alarms alone
    for other in (good, empty):
        other["classes"][1]["name"] = "mass"
        assert baseline_warnings(other) == []
    # Summaries of earlier versions lack the baseline.
    del summary["all_foreground"], summary["classes"][1]["all_foreground"]
    assert (everything_dice(summary), everything_rows(summary)) == (None, [])
    assert baseline_warnings(summary) == []


def test_sizes_that_measure_the_same_are_shown_once() -> None:
    network, original = summary_of(LESION), summary_of(EMPTY)
    assert titled_sizes({"network": network, "original": dict(network)}) == [
        ("original size (same as network size)", network)
    ]
    titles = [title for title, _ in titled_sizes({"network": network, "original": original})]
    assert titles == ["network size", "original size"]
    assert titled_sizes({}) == []


def test_the_headline_has_the_dice_and_those_of_the_baselines() -> None:
    summary = summarize(np.array([[[1, 9, 20, 70], [70, 20, 9, 1]]])) | {"split": "test"}
    words = "test, 1 image, foreground Dice 0.828 (predict-nothing 0.000"
    assert headline_words(summary) == f"{words}, predict-everything 0.883)"
    del summary["all_foreground"]  # as in earlier versions
    assert headline_words(summary) == f"{words})"
    empty = summarize(np.array([[[90, 0, 10, 0], [0, 10, 0, 90]]])) | {"split": "test"}
    assert headline_words(empty) == "test, 1 image, no foreground"
