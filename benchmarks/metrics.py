"""Compares the measures of masks with independent implementations: equality and time.

    python benchmarks/metrics.py [--masks 200] [--image-size 512] [--samples 6]

First Dice, IoU, HD95 and surface Dice of small random masks, some of them empty, are compared with
DeepMind's `surface-distance`. Then each measure is compared with the implementation in
`COMPARISONS` on larger masks: all values agree to 1e-9, or the script fails. Runs alternate, so
that a busy machine affects both alike. An implementation whose package is not installed is skipped:
scikit-learn, scikit-image and panoptica are no part of the project's environment.
"""

import importlib.util
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click
import numpy as np

from job.metrics.bootstrap import NUM_DRAWS, SEED, intervals
from job.metrics.confusion import dice, iou
from job.metrics.lesions import (
    MIN_IOU,
    count_lesions,
    label_regions,
    regions_of_classes,
    true_regions,
    without_small_regions,
)
from job.metrics.surface_distance import contour_distances, hausdorff, surface_dice
from job.metrics.thresholds import THRESHOLDS, sweep_case

TOLERANCE = 1.0  # in the unit of the spacing
DIVIDING = (0.05, 0.1, 0.2, 0.25, 0.5, 1.0)  # spacings with contours exactly at the tolerance
LARGEST_DIFFERENCE = 1e-9
SMALL_PIXELS = 20
NUM_CASES = 233  # of the bootstrap intervals
NUM_MEASURES = 12  # those of a dataset with one foreground class


def random_mask(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Returns (H, W) bool: empty, full, single pixels, or a few ellipses with ragged edges."""
    kind = random.integers(0, 10)
    if kind == 0:
        return np.zeros((height, width), bool)
    if kind == 1:
        return random.random((height, width)) < random.choice([0.01, 0.3, 1.0])
    rows, columns = np.mgrid[:height, :width]
    mask = np.zeros((height, width), bool)
    for _ in range(random.integers(1, 4)):
        row, column = random.uniform(0, height), random.uniform(0, width)
        radii = [random.uniform(1, 2 + side / 3) for side in (height, width)]
        mask |= ((rows - row) / radii[0]) ** 2 + ((columns - column) / radii[1]) ** 2 <= 1
    return mask ^ (random.random((height, width)) < random.choice([0.0, 0.002]))


def differences(num_masks: int, seed: int = 0) -> dict[str, float]:
    """Returns the largest difference of each metric, and the number of pairs with empty masks."""
    found = dict.fromkeys(("dice", "iou", "hd95", "surface_dice"), 0.0)
    empty = {"num_both_empty": 0, "num_one_empty": 0, "num_compared": 0}
    random = np.random.default_rng(seed)
    for _ in range(num_masks):
        height, width = random.integers(1, 96, 2)
        is_dividing = random.random() < 0.5
        rows, columns = random.choice(DIVIDING, 2) if is_dividing else random.uniform(0.05, 2, 2)
        spacing = float(rows), float(columns)
        truth = random_mask(random, height, width)
        is_near = random.random() < 0.5
        prediction = (
            np.roll(truth, random.integers(-3, 4, 2), (0, 1))
            if is_near
            else random_mask(random, height, width)
        )
        num_empty = int(not truth.any()) + int(not prediction.any())
        empty["num_both_empty"] += num_empty == 2
        empty["num_one_empty"] += num_empty == 1
        empty["num_compared"] += 1
        ours, theirs = _ours(truth, prediction, spacing), _theirs(truth, prediction, spacing)
        for name in found:
            found[name] = max(found[name], _difference(ours[name], theirs[name]))
    return {**found, **empty}


def _difference(first: float, second: float) -> float:
    """Returns the distance of two values; 0 if both are undefined or both infinite."""
    if math.isnan(first) and math.isnan(second):
        return 0.0
    if math.isnan(first) or math.isnan(second):
        return math.inf
    return 0.0 if first == second else abs(first - second)


def _ours(truth: np.ndarray, prediction: np.ndarray, spacing: tuple[float, float]) -> dict:
    tp = (truth & prediction).sum()
    fp, fn = prediction.sum() - tp, truth.sum() - tp
    values = {"dice": float(dice(tp, fp, fn)), "iou": float(iou(tp, fp, fn))}
    if not truth.any() and not prediction.any():
        return {**values, "hd95": math.inf, "surface_dice": math.nan}
    if not truth.any() or not prediction.any():
        return {**values, "hd95": math.inf, "surface_dice": 0.0}
    distances = contour_distances(truth, prediction, spacing)
    return {
        **values,
        "hd95": hausdorff(distances, 95),
        "surface_dice": surface_dice(distances, TOLERANCE),
    }


def _theirs(truth: np.ndarray, prediction: np.ndarray, spacing: tuple[float, float]) -> dict:
    import surface_distance

    # Release 0.1 uses names that NumPy 2 removed and that SciPy will remove.
    np.Inf, np.NaN = np.inf, np.nan  # type: ignore[attr-defined]
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore")
        distances = surface_distance.compute_surface_distances(truth, prediction, spacing)
        overlap = float(surface_distance.compute_dice_coefficient(truth, prediction))
        return {
            "dice": overlap,
            "iou": overlap / (2 - overlap),  # the two are functions of each other
            "hd95": float(surface_distance.compute_robust_hausdorff(distances, 95)),
            "surface_dice": float(
                surface_distance.compute_surface_dice_at_tolerance(distances, TOLERANCE)
            ),
        }


@dataclass(frozen=True)
class Sample:
    """Masks (H, W) bool of one class, and its probability (H, W) float32."""

    truth: np.ndarray
    prediction: np.ndarray
    probability: np.ndarray
    spacing: tuple[float, float]


def make_samples(number: int, size: int, seed: int) -> list[Sample]:
    """Returns masks with several smooth regions, and predictions with noise at their contours."""
    from scipy.ndimage import gaussian_filter

    random = np.random.default_rng(seed)
    samples = []
    for index in range(number):
        noise = [gaussian_filter(random.standard_normal((size, size)), size / n) for n in (16, 40)]
        field, change = (each / each.std() for each in noise)
        logits = 6 * (field - 1.2 + 0.3 * change) + 0.5 * random.standard_normal((size, size))
        probability = (1 / (1 + np.exp(-logits))).astype(np.float32)
        spacing = (1.0, 1.0) if index % 2 else (0.56, 0.45)
        samples.append(Sample(field > 1.2, probability >= 0.5, probability, spacing))
    return samples


def _num_pixels(sample: Sample) -> tuple[int, int, int]:
    tp = np.count_nonzero(sample.truth & sample.prediction)
    return tp, np.count_nonzero(sample.prediction) - tp, np.count_nonzero(sample.truth) - tp


def _our_dice(sample: Sample) -> list[float]:
    return [float(dice(*map(np.asarray, _num_pixels(sample))))]


def _their_dice(sample: Sample) -> list[float]:
    import surface_distance

    return [float(surface_distance.compute_dice_coefficient(sample.truth, sample.prediction))]


def _our_iou(sample: Sample) -> list[float]:
    return [float(iou(*map(np.asarray, _num_pixels(sample))))]


def _their_iou(sample: Sample) -> list[float]:
    from sklearn.metrics import jaccard_score

    return [float(jaccard_score(sample.truth.ravel(), sample.prediction.ravel()))]


def _our_surface(sample: Sample) -> list[float]:
    distances = contour_distances(sample.truth, sample.prediction, sample.spacing)
    return [hausdorff(distances, 95), surface_dice(distances, TOLERANCE)]


def _their_surface(sample: Sample) -> list[float]:
    found = _theirs(sample.truth, sample.prediction, sample.spacing)
    return [found["hd95"], found["surface_dice"]]


def _our_regions(sample: Sample) -> list[float]:
    return np.sort(label_regions(sample.prediction)[1][1:]).tolist()


def _their_regions(sample: Sample) -> list[float]:
    from scipy import ndimage

    labels, _ = ndimage.label(sample.prediction, np.ones((3, 3)))
    return np.sort(np.bincount(labels.ravel())[1:]).tolist()


def _our_large_regions(sample: Sample) -> list[float]:
    return [np.packbits(without_small_regions(sample.prediction, SMALL_PIXELS)).tobytes()]


def _their_large_regions(sample: Sample) -> list[float]:
    from skimage.morphology import remove_small_objects

    kept = remove_small_objects(sample.prediction, max_size=SMALL_PIXELS - 1, connectivity=2)
    return [np.packbits(kept).tobytes()]


def _our_lesions(sample: Sample) -> list[float]:
    found = count_lesions(true_regions(sample.truth), sample.prediction)
    return [found.num_true, found.num_predicted, found.num_found]


def _their_lesions(sample: Sample) -> list[float]:
    import panoptica
    from panoptica.metrics import Metric
    from panoptica.utils.constants import CCABackend

    cc3d = panoptica.ConnectedComponentsInstanceApproximator(cca_backend=CCABackend.cc3d)
    matcher = panoptica.NaiveThresholdMatching(Metric.IOU, MIN_IOU)
    evaluator = panoptica.Panoptica_Evaluator(
        expected_input=panoptica.InputType.SEMANTIC,
        instance_approximator=cc3d,
        instance_matcher=matcher,
        instance_metrics=[Metric.IOU],
        verbose=False,
    )
    masks = sample.prediction.astype(np.uint8), sample.truth.astype(np.uint8)
    (found,) = evaluator.evaluate(*masks, verbose=False).values()
    return [found.n_ref_instances, found.n_pred_instances, found.tp]


def _our_thresholds(sample: Sample) -> list[float]:
    regions = regions_of_classes(sample.truth.view(np.uint8), 2)
    found = sweep_case(regions, sample.probability[..., np.newaxis])
    return [*found.tp[0].tolist(), *found.fp[0].tolist(), *found.fn[0].tolist()]


def _their_thresholds(sample: Sample) -> list[float]:
    from sklearn.metrics import confusion_matrix

    truth = sample.truth.ravel()
    tables = [
        confusion_matrix(truth, sample.probability.ravel() >= np.float32(threshold)).ravel()
        for threshold in THRESHOLDS
    ]
    _, fp, fn, tp = np.transpose(tables).tolist()
    return [*tp, *fp, *fn]


@dataclass(frozen=True)
class Quotients:
    """Numerators and denominators of measures, (N,) each, and the cases (draws, N) to draw."""

    pairs: list[tuple[np.ndarray, np.ndarray]]
    cases: np.ndarray


def make_quotients(seed: int) -> Quotients:
    """Returns measures of many cases, and the draws of this project."""
    random = np.random.default_rng(seed)
    denominators = random.integers(1, 9000, (NUM_MEASURES, NUM_CASES)).astype(float)
    numerators = np.floor(denominators * random.random(denominators.shape))
    weights = np.random.default_rng(SEED).multinomial(
        NUM_CASES, np.full(NUM_CASES, 1 / NUM_CASES), NUM_DRAWS
    )
    cases = np.stack([np.repeat(np.arange(NUM_CASES), each) for each in weights])
    return Quotients(list(zip(numerators, denominators, strict=True)), cases)


def _our_intervals(sample: Quotients) -> list[float]:
    found = intervals(sample.pairs, np.arange(NUM_CASES))
    return [end for each in found if each for end in each]


def _their_intervals(sample: Quotients) -> list[float]:
    from scipy.stats import bootstrap

    class SameDraws(np.random.Generator):
        def integers(self, *arguments: Any, **options: Any) -> Any:
            super().integers(*arguments, **options)  # takes time, as usual
            return sample.cases

    ends: list[float] = []
    for pair in sample.pairs:
        found = bootstrap(
            pair,
            lambda above, below, axis: above.sum(axis=axis) / below.sum(axis=axis),
            paired=True,
            n_resamples=NUM_DRAWS,
            method="percentile",
            rng=SameDraws(np.random.PCG64(0)),
        )
        ends += found.confidence_interval
    return ends


@dataclass(frozen=True)
class Comparison:
    """A measure of this project and an independent implementation of it."""

    ours: Callable[[Any], Sequence[Any]]
    theirs: Callable[[Any], Sequence[Any]]
    name: str
    package: str  # to install

    @property
    def is_installed(self) -> bool:
        """Whether the other implementation can be imported."""
        return importlib.util.find_spec(self.name.split(".")[0]) is not None


_ROWS = (
    ("dice", _our_dice, _their_dice,
     "surface_distance.compute_dice_coefficient", "surface-distance"),
    ("iou", _our_iou, _their_iou, "sklearn.metrics.jaccard_score", "scikit-learn"),
    ("hd95_and_surface_dice", _our_surface, _their_surface,
     "surface_distance.compute_surface_distances", "surface-distance"),
    ("regions", _our_regions, _their_regions, "scipy.ndimage.label", "scipy"),
    ("without_small_regions", _our_large_regions, _their_large_regions,
     "skimage.morphology.remove_small_objects", "scikit-image"),
    ("lesions", _our_lesions, _their_lesions, "panoptica.Panoptica_Evaluator", "panoptica"),
    ("pixels_at_thresholds", _our_thresholds, _their_thresholds,
     "sklearn.metrics.confusion_matrix", "scikit-learn"),
    ("intervals", _our_intervals, _their_intervals, "scipy.stats.bootstrap", "scipy"),
)  # fmt: skip
COMPARISONS = {measure: Comparison(*others) for measure, *others in _ROWS}


def compare(comparison: Comparison, samples: Sequence[Any], repeats: int) -> dict[str, Any]:
    """Returns the largest difference, and the ms of a sample of both sides."""
    from machine import spread

    if not comparison.is_installed:
        return {"skipped": f"{comparison.name} needs {comparison.package}, which is not installed"}
    functions = {"ours": comparison.ours, "theirs": comparison.theirs}
    times_ms: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats + 1):
        found = {}
        for name, function in functions.items():
            started = time.process_time()
            found[name] = [function(sample) for sample in samples]
            times_ms[name].append(1e3 * (time.process_time() - started) / len(samples))
    pairs = zip(found["ours"], found["theirs"], strict=True)
    ours, theirs = (each[1:] for each in times_ms.values())  # the first run imports packages
    return {
        "implementation": comparison.name,
        "largest_difference": max(_largest_difference(*pair) for pair in pairs),
        "ours_cpu_ms": spread(ours),
        "theirs_cpu_ms": spread(theirs),
        "ours_over_theirs": spread([a / b for a, b in zip(ours, theirs, strict=True)]),
    }


def _largest_difference(ours: Sequence[Any], theirs: Sequence[Any]) -> float:
    if list(ours) == list(theirs):
        return 0.0
    if len(ours) != len(theirs) or isinstance(ours[0], bytes):
        return math.inf
    return max(_difference(*pair) for pair in zip(ours, theirs, strict=True))


@click.command()
@click.option("--masks", default=200, help="Pairs of small random masks.")
@click.option("--seed", default=0, help="Seed of the masks.")
@click.option("--image-size", default=512, help="Side of the larger masks, pixels.")
@click.option("--samples", default=6, help="Pairs of larger masks.")
@click.option("--repeats", default=5, help="Runs of each implementation.")
def main(masks: int, seed: int, image_size: int, samples: int, repeats: int) -> None:
    """Print differences and times, and store them in benchmarks/results/metrics.json."""
    from machine import describe_machine, write_result

    result: dict[str, Any] = {"seed": seed, **differences(masks, seed)}
    for name, value in result.items():
        print(f"{name:16s} {value:g}")
    pairs = make_samples(samples, image_size, seed)
    result |= {"image_size": image_size, "num_samples": samples, "measures": {}}
    for name, comparison in COMPARISONS.items():
        inputs = [make_quotients(seed)] if name == "intervals" else pairs
        found = result["measures"][name] = compare(comparison, inputs, repeats)
        print(f"{name:22s} {_shown(found)}")
    result["machine"] = describe_machine()
    write_result("metrics", result)
    largest = [each.get("largest_difference", 0.0) for each in result["measures"].values()]
    if max(largest) > LARGEST_DIFFERENCE:
        raise click.ClickException(f"a measure differs by {max(largest):g} from another one")


def _shown(found: dict[str, Any]) -> str:
    if "skipped" in found:
        return f"skipped: {found['skipped']}"
    ours, theirs = (found[name]["median"] for name in ("ours_cpu_ms", "theirs_cpu_ms"))
    ratio = found["ours_over_theirs"]
    return (
        f"{ours:.3f} ms, {found['implementation']} {theirs:.3f} ms: {ratio['median']:.3f} "
        f"({ratio['min']:.3f} to {ratio['max']:.3f}), difference {found['largest_difference']:.1g}"
    )


if __name__ == "__main__":
    main()
