"""Compares Dice, IoU, HD95 and surface Dice with DeepMind's `surface-distance` on random masks.

python benchmarks/metrics.py [--masks 200]
"""

import math
import warnings

import click
import numpy as np

from job.metrics.confusion import dice, iou
from job.metrics.surface_distance import contour_distances, hausdorff, surface_dice

TOLERANCE = 1.0  # in the unit of the spacing
DIVIDING = (0.05, 0.1, 0.2, 0.25, 0.5, 1.0)  # spacings with contours exactly at the tolerance


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


@click.command()
@click.option("--masks", default=200, help="Pairs of random masks.")
@click.option("--seed", default=0, help="Seed of the masks.")
def main(masks: int, seed: int) -> None:
    """Print the largest differences and store them in benchmarks/results/metrics.json."""
    from machine import write_result

    result = differences(masks, seed)
    for name, value in result.items():
        print(f"{name:16s} {value:g}")
    write_result("metrics", {"seed": seed, **result})


if __name__ == "__main__":
    main()
