"""Measures of cases and their summary; what an empty mask means is worked out by hand."""

import csv
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexunet.tables import csv_table
from job.metrics.batch import confusion_counts
from job.metrics.confusion import summarize
from job.metrics.lesions import label_regions, regions_of_classes
from job.metrics.per_case import (
    CaseMetrics,
    Scale,
    case_cells,
    case_columns,
    measure_case,
    nothing_predicted,
    parse_case_metrics,
    summarize_cases,
    without_ignored,
)
from job.reporting.phrases import measure_rows

PIXELS = Scale((1.0, 1.0), "px")
MM = Scale((0.5, 0.25), "mm")


def mask_of(*rows: str) -> np.ndarray:
    return np.array([[int(character) for character in row] for row in rows], np.uint8)


EMPTY = mask_of("0000", "0000", "0000")
LESION = mask_of("0000", "0110", "0000")


def measured(truth: np.ndarray, prediction: np.ndarray, scale: Scale = PIXELS) -> CaseMetrics:
    return measure_case(truth, prediction, 2, scale)


def test_case_of_two_empty_masks_has_no_value() -> None:
    found = measured(EMPTY, EMPTY).classes[0]
    assert found.presence == "neither"
    assert found.hd95 is None
    assert found.nsd is None
    assert found.lesions.num_true == found.lesions.num_false_positives == 0


@pytest.mark.parametrize(("scale", "diagonal"), [(PIXELS, 5.0), (MM, math.hypot(1.5, 1.0))])
def test_case_of_one_empty_mask_gets_the_diagonal(scale: Scale, diagonal: float) -> None:
    # 3 rows and 4 columns: 5 pixels; 3 * 0.5 mm and 4 * 0.25 mm.
    missed, invented = measured(LESION, EMPTY, scale), measured(EMPTY, LESION, scale)
    assert missed.classes[0].presence == "truth_only"
    assert invented.classes[0].presence == "prediction_only"
    for case in (missed, invented):
        assert case.classes[0].hd95 == pytest.approx(diagonal)
        assert case.classes[0].nsd == 0
    assert (missed.classes[0].lesions.num_true, missed.classes[0].lesions.num_found) == (1, 0)
    assert invented.classes[0].lesions.num_false_positives == 1


def test_case_measures_in_its_unit() -> None:
    moved = mask_of("0000", "0000", "0110")
    assert measured(LESION, moved).classes[0].hd95 == 1
    # One row of half a millimetre.
    assert measured(LESION, moved, MM).classes[0].hd95 == 0.5
    assert measured(LESION, moved, MM).classes[0].nsd == 1


def test_case_has_every_foreground_class() -> None:
    case = measure_case(mask_of("0120"), mask_of("0110"), 3, PIXELS)
    first, second = case.classes
    assert (first.tp, first.fp, first.fn) == (1, 1, 0)
    assert (second.tp, second.fp, second.fn, second.presence) == (0, 0, 1, "truth_only")


def test_ignored_pixels_are_background_in_both() -> None:
    truth, prediction = without_ignored(mask_of("0019"), mask_of("0111"), 9)
    assert truth.tolist() == [[0, 0, 1, 0]]
    assert prediction.tolist() == [[0, 1, 1, 0]]


def summary_of(*cases: CaseMetrics) -> dict[str, Any]:
    groups = [str(index) for index in range(len(cases))]
    summary = summarize_cases(cases, groups, ["mass"])
    json.dumps(summary, allow_nan=False)
    return summary


def test_summary_counts_empty_masks_and_leaves_only_double_ones_out() -> None:
    summary = summary_of(
        measured(LESION, LESION),
        measured(EMPTY, EMPTY),
        measured(LESION, EMPTY),
        measured(EMPTY, LESION),
    )
    mass = summary["classes"][0]
    counts = {key: mass[f"num_{key}"] for key in ("both", "neither", "truth_only")}
    assert counts == {"both": 1, "neither": 1, "truth_only": 1}
    assert mass["num_prediction_only"] == 1
    # Dice 1, none, 0, 0; distances 0, none, 5, 5.
    assert mass["dice_mean"]["value"] == pytest.approx(1 / 3)
    assert mass["dice_mean"]["num_cases"] == 3
    assert mass["hd95_px"]["value"] == pytest.approx(10 / 3)
    assert mass["nsd_px"]["value"] == pytest.approx(1 / 3)
    # tp 2, fp 2, fn 2.
    assert mass["dice_pooled"]["value"] == pytest.approx(4 / 8)
    assert mass["iou_pooled"]["value"] == pytest.approx(2 / 6)
    assert mass["lesion_sensitivity"]["value"] == pytest.approx(1 / 2)
    assert mass["false_positives_per_image"]["value"] == pytest.approx(1 / 4)
    assert summary["foreground"]["dice_mean"]["value"] == mass["dice_mean"]["value"]


NEVER_BETTER = ("dice_mean", "iou_mean", "nsd_px")


def test_summary_counts_what_is_predicted_elsewhere_as_missed() -> None:
    elsewhere = mask_of("0000", "0000", "0110")
    mass = summary_of(measured(LESION, elsewhere), measured(LESION, EMPTY))["classes"][0]
    assert (mass["num_both"], mass["num_truth_only"], mass["num_missed"]) == (1, 1, 2)


def test_missing_a_lesion_never_makes_a_mean_better() -> None:
    far, partly = mask_of("0000", "0000", "1000"), mask_of("0000", "0010", "0010")
    other = measured(LESION, LESION)
    lost = summary_of(other, measured(LESION, EMPTY))["classes"][0]
    beside = summary_of(other, measured(LESION, far))["classes"][0]
    hit = summary_of(other, measured(LESION, partly))["classes"][0]
    for found in (beside, hit):
        assert lost["hd95_px"]["value"] > found["hd95_px"]["value"]
        for name in (*NEVER_BETTER, "lesion_sensitivity"):
            assert lost[name]["value"] <= found[name]["value"], name
    # One of two pixels is found: each of them falls when that is lost.
    for name in (*NEVER_BETTER, "dice_pooled", "iou_pooled", "lesion_sensitivity"):
        assert lost[name]["value"] < hit[name]["value"], name


@given(seed=st.integers(0, 2**32 - 1), min_lesion=st.integers(1, 5))
def test_missing_all_of_a_random_mask_never_makes_a_mean_better(seed: int, min_lesion: int) -> None:
    random = np.random.default_rng(seed)
    shape = random.integers(2, 14, 2)
    truth, prediction = (
        (random.random(shape) < random.uniform(0.05, 0.7)).astype(np.uint8) for _ in range(2)
    )
    truth[0, 0] = 1
    nothing = np.zeros_like(truth)
    regions = regions_of_classes(truth, 2, min_pixels=min_lesion)
    other = measured(LESION, LESION)
    found, lost = (
        summary_of(other, measure_case(truth, each, 2, PIXELS, regions=regions))["classes"][0]
        for each in (prediction, nothing)
    )
    assert lost["hd95_px"]["value"] >= found["hd95_px"]["value"]
    for name in NEVER_BETTER:
        assert lost[name]["value"] <= found[name]["value"], name
    assert lost["num_lesions"] == found["num_lesions"]
    # Losing any single region finds no more lesions.
    labels, sizes = label_regions(prediction == 1)
    for region in range(1, len(sizes)):
        fewer = np.where(labels == region, 0, prediction).astype(np.uint8)
        case = measure_case(truth, fewer, 2, PIXELS, regions=regions)
        # The other case has one more, which is found.
        assert case.classes[0].lesions.num_found + 1 <= found["num_lesions_found"]


@pytest.mark.parametrize("seed", range(20))
def test_empty_surroundings_change_no_measure(seed: int) -> None:
    random = np.random.default_rng(seed)
    truth, prediction = (
        (random.integers(1, 4, (9, 11)) * (random.random((9, 11)) < 0.3)).astype(np.uint8)
        for _ in range(2)
    )
    truth[4, 4:7] = prediction[4, 4:7] = [1, 2, 3]  # all classes in both: no distance is a diagonal
    surroundings = [(2 * random.integers(1, 9), 7), (random.integers(1, 9), 8)]
    small, large = (
        measure_case(*masks, 4, MM, regions=regions_of_classes(masks[0], 4, min_pixels=3))
        for masks in (
            (truth, prediction),
            (np.pad(truth, surroundings), np.pad(prediction, surroundings)),
        )
    )
    for one, other in zip(small.classes, large.classes, strict=True):
        assert one.hd95 == pytest.approx(other.hd95, rel=1e-12)
        assert replace(one, hd95=None) == replace(other, hd95=None)


def test_summary_never_averages_two_units() -> None:
    moved = mask_of("0000", "0000", "0110")
    mass = summary_of(measured(LESION, moved), measured(LESION, moved, MM))["classes"][0]
    assert (mass["hd95_px"]["value"], mass["hd95_px"]["num_cases"]) == (1.0, 1)
    assert mass["hd95_px"]["low"] is None  # of one group there is no interval
    assert mass["hd95_mm"]["value"] == 0.5


def test_summary_says_what_predicting_nothing_scores() -> None:
    mass = summary_of(measured(LESION, LESION))["classes"][0]
    assert (mass["dice_mean"]["value"], mass["dice_mean"]["all_background"]) == (1, 0)
    assert (mass["hd95_px"]["value"], mass["hd95_px"]["all_background"]) == (0, 5)
    assert mass["false_positives_per_image"]["all_background"] == 0


def test_summary_of_nothing_but_empty_masks_has_no_values() -> None:
    summary = summary_of(measured(EMPTY, EMPTY), measured(EMPTY, EMPTY))
    mass = summary["classes"][0]
    for name in ("dice_mean", "dice_pooled", "hd95_px", "lesion_sensitivity"):
        assert mass[name]["value"] is None
    assert mass["false_positives_per_image"]["value"] == 0


def test_a_few_patients_whose_lesions_are_all_found_give_no_interval() -> None:
    def sensitivity(num_with_lesions: int) -> dict[str, Any]:
        cases = [measured(LESION, LESION)] * num_with_lesions
        cases += [measured(EMPTY, EMPTY)] * (40 - num_with_lesions)
        summary = summary_of(*cases)
        assert summary["num_groups"] == 40
        assert summary["classes"][0]["false_positives_per_image"]["num_groups"] == 40
        found: dict[str, Any] = summary["classes"][0]["lesion_sensitivity"]
        return found

    for few in (3, 4):
        found = sensitivity(few)
        assert (found["value"], found["num_cases"], found["num_groups"]) == (1, few, few)
        assert (found["low"], found["high"]) == (None, None)
    assert sensitivity(5)["low"] == 1


def test_baseline_says_of_how_many_cases_it_is() -> None:
    # An invention has a distance; with nothing predicted, the case has none.
    mass = summary_of(*[measured(EMPTY, LESION)] * 3, measured(LESION, LESION))["classes"][0]
    distance = mass["hd95_px"]
    assert (distance["value"], distance["num_cases"]) == (pytest.approx(15 / 4), 4)
    assert (distance["all_background"], distance["all_background_num_cases"]) == (5, 1)
    assert mass["dice_mean"]["all_background_num_cases"] == 1
    assert mass["false_positives_per_image"]["all_background_num_cases"] == 4


def test_columns_of_classes_with_such_names_do_not_collide() -> None:
    names = ["x", "found_x", "lesions_x", "px_x"]
    columns = case_columns(names)
    assert len(set(columns)) == len(columns)
    case = measure_case(mask_of("0120", "0004"), mask_of("0110", "0004"), 5, PIXELS)
    (row,) = csv.DictReader(csv_table(columns, [case_cells(case)]).splitlines())
    assert parse_case_metrics(row, names) == case


def test_summary_averages_classes_and_names_its_rows() -> None:
    case = measure_case(mask_of("0120"), mask_of("0110"), 3, PIXELS)
    summary = summarize_cases([case, case], ["a", "b"], ["mass", "cyst"])
    # Dice of the classes: 2/3 and 0.
    assert summary["foreground"]["dice_mean"]["value"] == pytest.approx(1 / 3)
    rows = [row[:2] for row in measure_rows(summary)]
    assert rows[0] == ("all foreground classes", "Dice, mean over images")
    assert ("cyst", "HD95 in pixels") in rows
    assert measure_rows(summary_of(case, case))[0][:2] == ("mass", "Dice, mean over images")


@pytest.mark.parametrize("scale", [PIXELS, MM])
def test_nothing_predicted_is_what_an_empty_prediction_measures(scale: Scale) -> None:
    for truth in (EMPTY, LESION):
        for prediction in (EMPTY, LESION, 1 - EMPTY):
            nothing = nothing_predicted(measured(truth, prediction, scale))
            assert nothing == measured(truth, EMPTY, scale)


@pytest.mark.parametrize("scale", [PIXELS, MM])
def test_cases_are_read_back_from_their_table(scale: Scale) -> None:
    for truth, prediction in ((EMPTY, EMPTY), (LESION, EMPTY), (LESION, 1 - EMPTY)):
        case = measured(truth, prediction, scale)
        text = csv_table(case_columns(["mass"]), [case_cells(case)])
        (row,) = csv.DictReader(text.splitlines())
        assert parse_case_metrics(row, ["mass"]) == case


def test_tiny_regions_stay_apart_in_cases_tables_and_summary() -> None:
    regions = regions_of_classes(LESION, 2, min_pixels=3)
    case = measure_case(LESION, EMPTY, 2, PIXELS, regions=regions)
    assert case.classes[0].fn == 2  # of pixels nothing is left out
    assert nothing_predicted(case) == case
    (row,) = csv.DictReader(csv_table(case_columns(["mass"]), [case_cells(case)]).splitlines())
    assert (row["lesions_mass"], row["specks_mass"]) == ("0", "1")
    assert parse_case_metrics(row, ["mass"]) == case
    mass = summary_of(case)["classes"][0]
    assert (mass["num_lesions"], mass["num_specks"]) == (0, 1)
    assert mass["lesion_sensitivity"]["value"] is None


def test_cells_fit_the_columns() -> None:
    columns = case_columns(["mass"])
    cells = dict(zip(columns, case_cells(measured(EMPTY, EMPTY)), strict=True))
    assert cells["presence_mass"] == "neither"
    assert cells["hd95_mass"] is None
    assert cells["dice_mass"] is None
    cells = dict(zip(columns, case_cells(measured(LESION, EMPTY, MM)), strict=True))
    assert (cells["unit"], cells["dice_mass"], cells["lesions_mass"]) == ("mm", 0, 1)


def test_both_summaries_of_a_split_have_the_same_common_figures() -> None:
    """One counts pixels of a batch, the other measures case by case."""
    random = np.random.default_rng(4)
    truths, predictions = random.integers(0, 3, (2, 20, 6, 6)).astype(np.uint8)
    truths[:3] = 0
    predictions[2:5] = 0
    counts = confusion_counts(truths, predictions, 3).numpy()
    pixels = summarize(counts)
    pairs = zip(truths, predictions, strict=True)
    cases = [measure_case(truth, prediction, 3, PIXELS) for truth, prediction in pairs]
    measures = summarize_cases(cases, [str(index) for index in range(20)], ["a", "b"])
    for of_pixels, of_cases in zip(pixels["classes"][1:], measures["classes"], strict=True):
        for name in ("dice", "iou"):
            assert of_cases[f"{name}_mean"]["value"] == pytest.approx(of_pixels[name])
            assert of_cases[f"{name}_pooled"]["value"] == of_pixels["pooled"][name]
        assert of_cases["num_neither"] == of_pixels["num_empty"] > 0
        assert of_cases["num_missed"] == of_pixels["num_missed"] > 0
        assert of_cases["num_prediction_only"] == of_pixels["num_false_alarms"] > 0
    nothing = pixels["all_background"]["foreground_mean"]
    assert measures["foreground"]["dice_mean"]["all_background"] == nothing["dice"]
