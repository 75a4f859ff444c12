"""Measures each case beyond pixel counts, and summarizes all cases with intervals.

Rules for empty masks, per case and class, counted as `num_neither`, `num_truth_only`,
`num_prediction_only` and `num_both`. `num_missed` counts cases with the class in the truth of which
no pixel was found: `num_truth_only`, and predictions elsewhere.

    in neither mask       no value; left out of every mean
    in one mask only      Dice, IoU and surface Dice 0; HD95 is the diagonal of the image, the
                          longest possible distance: a missed lesion or a false positive never
                          improves a mean
    in both               as measured

Pooled Dice and IoU are not means over cases: they are computed from the pixels of all cases
together, so large regions weigh more.

Lesions and false positives are counts and need no rule; `job/metrics/lesions.py` defines a lesion
and when it is found. Distances are in mm if the pixel spacing is known, else in pixels; the two are
never averaged together. Knows nothing of files, models or TensorFlow.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from job.metrics.bootstrap import (
    LEVEL,
    MIN_GROUPS,
    NUM_DRAWS,
    SEED,
    Groups,
    Pair,
    intervals,
    num_contributing,
    ratio,
)
from job.metrics.confusion import Counts, Overlap, dice, iou
from job.metrics.lesions import (
    MIN_IOU,
    MIN_PIXELS,
    LesionCounts,
    TrueRegions,
    box_of,
    count_lesions,
    regions_of_classes,
)
from job.metrics.surface_distance import Spacing, contour_distances, hausdorff, surface_dice

Ids = npt.NDArray[np.uint8]
Values = npt.NDArray[np.float64]
Unit = Literal["mm", "px"]
Presence = Literal["neither", "truth_only", "prediction_only", "both"]

SIZES = ("network", "original")  # at which cases are measured
TRUTHS = {  # the masks with which a prediction is compared
    "network": "the stored mask",
    "original": "the stored mask, enlarged to the image's own size",
}
TOLERANCES: dict[Unit, float] = {"mm": 1.0, "px": 2.0}  # within which contours agree
_SHARED = ("dice_mean", "iou_mean", "dice_pooled", "iou_pooled")


@dataclass(frozen=True)
class Scale:
    """The size of a pixel (rows, columns) in mm, or 1 pixel if the spacing is not known."""

    spacing: Spacing
    unit: Unit


@dataclass(frozen=True)
class ClassMetrics:
    """One class of one case.

    Attributes:
        tp, fp, fn: pixels.
        hd95: in the unit of the case; None if the class is in neither mask.
        nsd: surface Dice within the tolerance; None likewise.
    """

    presence: Presence
    tp: int
    fp: int
    fn: int
    hd95: float | None
    nsd: float | None
    lesions: LesionCounts


@dataclass(frozen=True)
class CaseMetrics:
    """A case at one size: its unit, and each foreground class (1, 2, ...).

    Attributes:
        diagonal: of the image, in the unit; no distance is longer.
    """

    unit: Unit
    diagonal: float
    classes: tuple[ClassMetrics, ...]


def without_ignored(truth: Ids, prediction: Ids, ignore_id: int | None) -> tuple[Ids, Ids]:
    """Returns both masks with background where the truth has `ignore_id`."""
    if ignore_id is None:
        return truth, prediction
    ignored = truth == ignore_id
    zero = np.uint8(0)
    return np.where(ignored, zero, truth), np.where(ignored, zero, prediction)


def measure_case(
    truth: Ids,
    prediction: Ids,
    num_classes: int,
    scale: Scale,
    *,
    regions: Sequence[TrueRegions] | None = None,
) -> CaseMetrics:
    """Measures masks (H, W) of class ids 0..num_classes-1.

    Args:
        regions: of the truth, from `regions_of_classes`; None: without tiny regions.
    """
    if regions is None:
        regions = regions_of_classes(truth, num_classes)
    classes = (
        _measure_class(truth == class_id, prediction == class_id, each, scale)
        for class_id, each in enumerate(regions, 1)
    )
    return CaseMetrics(scale.unit, _diagonal(truth.shape, scale), tuple(classes))


def nothing_predicted(case: CaseMetrics) -> CaseMetrics:
    """Returns what `measure_case` would find with an empty prediction."""
    classes = []
    for each in case.classes:
        nothing = Overlap(each.tp, each.fp, each.fn).nothing_predicted()
        tp, fp, fn = nothing.tp, nothing.fp, nothing.fn
        hd95, nsd = (case.diagonal, 0.0) if fn else (None, None)
        lesions = LesionCounts(each.lesions.num_true, 0, 0, each.lesions.num_tiny_regions)
        classes.append(ClassMetrics(_presence(fn > 0, False), tp, fp, fn, hd95, nsd, lesions))
    return CaseMetrics(case.unit, case.diagonal, tuple(classes))


def _diagonal(shape: tuple[int, ...], scale: Scale) -> float:
    return math.hypot(shape[0] * scale.spacing[0], shape[1] * scale.spacing[1])


def _measure_class(
    truth: npt.NDArray[np.bool_],
    prediction: npt.NDArray[np.bool_],
    regions: TrueRegions,
    scale: Scale,
) -> ClassMetrics:
    part = box_of(truth | prediction)
    if part is None:
        return ClassMetrics("neither", 0, 0, 0, None, None, LesionCounts(0, 0, 0))
    diagonal = _diagonal(truth.shape, scale)
    # Few pixels of a large image have the class.
    truth, prediction, origin = truth[part], prediction[part], (part[0].start, part[1].start)
    tp = int(np.count_nonzero(truth & prediction))
    fp = int(np.count_nonzero(prediction)) - tp
    fn = int(np.count_nonzero(truth)) - tp
    presence = _presence(tp + fn > 0, tp + fp > 0)
    hd95, nsd = diagonal, 0.0
    if presence == "both":
        distances = contour_distances(truth, prediction, scale.spacing, origin=origin)
        hd95 = hausdorff(distances, 95)
        nsd = surface_dice(distances, TOLERANCES[scale.unit])
    lesions = count_lesions(regions, prediction, origin=origin)
    return ClassMetrics(presence, tp, fp, fn, hd95, nsd, lesions)


def _presence(is_true: bool, is_predicted: bool) -> Presence:
    if is_true:
        return "both" if is_predicted else "truth_only"
    return "prediction_only" if is_predicted else "neither"


def summarize_cases(
    cases: Sequence[CaseMetrics], groups: Sequence[str], names: Sequence[str]
) -> dict[str, Any]:
    """Returns the measures of all cases at one size, JSON-ready; an undefined value is None.

    Each measure is {"value", "low", "high", "num_cases", "num_groups", "all_background",
    "all_background_num_cases"}: its value, the 95 % bootstrap interval over groups (None if fewer
    than `MIN_GROUPS` contribute), the numbers of cases and groups with a value, the value of the
    predict-nothing baseline, and its number of cases: a case without the class has a distance only
    if something was predicted. `foreground` has the mean over the classes.

    Args:
        groups: of each case.
        names: of the foreground classes.
    """
    pairs = measure_pairs(cases, len(names))
    baselines = measure_pairs([nothing_predicted(case) for case in cases], len(names))
    foreground, *classes = _measures(pairs, baselines, groups)
    return {
        "num_cases": len(cases),
        "num_groups": len(set(groups)),
        "interval": {
            "level": LEVEL,
            "num_draws": NUM_DRAWS,
            "seed": SEED,
            "drawn": "groups",
            "min_groups": MIN_GROUPS,
        },
        "nsd_tolerance": dict(TOLERANCES),
        "lesion_rule": {"min_iou": MIN_IOU, "min_pixels": MIN_PIXELS},
        "foreground": foreground,
        "classes": [
            {"id": index + 1, "name": name, **_class_counts(cases, index), **classes[index]}
            for index, name in enumerate(names)
        ],
    }


def measure_pairs(cases: Sequence[CaseMetrics], num_classes: int) -> list[dict[str, Pair]]:
    """Returns the arguments of `ratio` for each measure: of the foreground, then of each class.

    Args:
        num_classes: foreground classes.
    """
    ratios = [_class_ratios(cases, index) for index in range(num_classes)]
    return [_over_classes(ratios), *ratios]


def _over_classes(ratios: Sequence[Mapping[str, Pair]]) -> dict[str, Pair]:
    """Returns the measures over all classes: numerators and denominators (N, classes) each."""
    return {
        name: (
            np.stack([each[name][0] for each in ratios], axis=1),
            np.stack([each[name][1] for each in ratios], axis=1),
        )
        for name in _SHARED
        if ratios
    }


def _class_ratios(cases: Sequence[CaseMetrics], index: int) -> dict[str, Pair]:
    """Returns numerators and denominators, (N,) each, of the measures of a class by name."""
    found = [case.classes[index] for case in cases]
    overlap = _overlap(found)
    lesions = [each.lesions for each in found]
    ratios = {
        "dice_mean": _mean_terms(dice(overlap.tp, overlap.fp, overlap.fn)),
        "iou_mean": _mean_terms(iou(overlap.tp, overlap.fp, overlap.fn)),
        "dice_pooled": overlap.dice_terms(),
        "iou_pooled": overlap.iou_terms(),
        "lesion_sensitivity": (
            np.array([each.num_found for each in lesions], float),
            np.array([each.num_true for each in lesions], float),
        ),
        "false_positives_per_image": (
            np.array([each.num_false_positives for each in lesions], float),
            np.ones(len(lesions)),
        ),
    }
    for unit in sorted({case.unit for case in cases}):
        for name in ("hd95", "nsd"):
            values = [
                getattr(each, name) if case.unit == unit else None
                for case, each in zip(cases, found, strict=True)
            ]
            ratios[f"{name}_{unit}"] = (
                np.array([value or 0.0 for value in values]),
                np.array([float(value is not None) for value in values]),
            )
    return ratios


def _overlap(found: Sequence[ClassMetrics]) -> Overlap[Counts]:
    """Returns the pixels of a class in each case, (N,) float64 each."""
    return Overlap(
        tp=np.array([each.tp for each in found], float),
        fp=np.array([each.fp for each in found], float),
        fn=np.array([each.fn for each in found], float),
    )


def _mean_terms(values: Values) -> Pair:
    """Returns numerators and denominators, (N,) each, of the mean of the defined values."""
    return np.nan_to_num(values, nan=0.0), (~np.isnan(values)).astype(float)


def _class_counts(cases: Sequence[CaseMetrics], index: int) -> dict[str, int]:
    found = [case.classes[index] for case in cases]
    presences = _overlap(found).presence_counts()
    return {
        **{f"num_{kind}": number for kind, number in presences.items()},
        "num_lesions": sum(each.lesions.num_true for each in found),
        "num_lesions_found": sum(each.lesions.num_found for each in found),
        "num_false_positives": sum(each.lesions.num_false_positives for each in found),
        "num_specks": sum(each.lesions.num_tiny_regions for each in found),
    }


def _measures(
    owners: Sequence[Mapping[str, Pair]],
    baselines: Sequence[Mapping[str, Pair]],
    groups: Sequence[str],
) -> list[dict[str, Any]]:
    """Returns the measures of each owner: of the foreground and of each class."""
    numbers = np.unique(np.asarray(groups), return_inverse=True)[1]
    found = iter(intervals([pair for each in owners for pair in each.values()], numbers))
    return [
        {
            name: _measure(pair, of_baseline[name], numbers, next(found))
            for name, pair in each.items()
        }
        for each, of_baseline in zip(owners, baselines, strict=True)
    ]


def _measure(
    pair: Pair, baseline: Pair, groups: Groups, found: tuple[float, float] | None
) -> dict[str, Any]:
    numerators, denominators = pair
    low, high = found or (None, None)
    return {
        "value": ratio(numerators, denominators),
        "low": low,
        "high": high,
        "num_cases": _num_cases(denominators),
        "num_groups": num_contributing(denominators, groups),
        "all_background": ratio(*baseline),
        "all_background_num_cases": _num_cases(baseline[1]),
    }


def _num_cases(denominators: Values) -> int:
    return int(np.count_nonzero(denominators.reshape(len(denominators), -1).any(axis=1)))


def quotient(numerator: float, denominator: float) -> float | None:
    """Returns `numerator` / `denominator`, or None if the denominator is 0."""
    return float(numerator / denominator) if denominator else None


_CELLS = (
    # No name is the start of another: with `lesions_found`, classes x and found_x would collide.
    *("presence", "dice", "hd95", "nsd", "lesions", "found_lesions", "false_positives"),
    *("tp_px", "fp_px", "fn_px", "specks"),
)


def case_columns(names: Sequence[str]) -> list[str]:
    """Returns the columns of `case_cells` for the foreground classes of these names."""
    return ["unit", "diagonal", *(f"{key}_{name}" for name in names for key in _CELLS)]


def case_cells(case: CaseMetrics) -> list[Any]:
    """Returns the cells of a case; None, an empty cell, means that the class is in neither mask."""
    cells: list[Any] = [case.unit, case.diagonal]
    for each in case.classes:
        dice_of_case = quotient(*Overlap(each.tp, each.fp, each.fn).dice_terms())
        cells += [each.presence, dice_of_case, each.hd95, each.nsd]
        lesions = each.lesions
        cells += [lesions.num_true, lesions.num_found, lesions.num_false_positives]
        cells += [each.tp, each.fp, each.fn, lesions.num_tiny_regions]
    return cells


def parse_case_metrics(row: Mapping[str, str], names: Sequence[str]) -> CaseMetrics:
    """Returns the case in a row of a table with `case_columns`.

    Raises:
        KeyError, ValueError: the row lacks a column, or a cell is damaged.
    """
    classes = []
    for name in names:
        num_found, num_false = (int(row[f"{key}_{name}"]) for key in _CELLS[5:7])
        tp, fp, fn, num_tiny_regions = (int(row[f"{key}_{name}"]) for key in _CELLS[7:])
        hd95, nsd = (float(row[f"{key}_{name}"]) if row[f"{key}_{name}"] else None
                     for key in ("hd95", "nsd"))  # fmt: skip
        num_true = int(row[f"lesions_{name}"])
        lesions = LesionCounts(num_true, num_found + num_false, num_found, num_tiny_regions)
        presence = _presence(tp + fn > 0, tp + fp > 0)
        classes.append(ClassMetrics(presence, tp, fp, fn, hd95, nsd, lesions))
    unit: Unit = "mm" if row["unit"] == "mm" else "px"
    return CaseMetrics(unit, float(row["diagonal"]), tuple(classes))
