"""The size below which predicted regions are removed, fitted by hand-worked cases."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from data_prep.config import PrepConfig
from data_prep.imaging.geometry import undo_geometry
from data_prep.pipeline import prepare
from data_prep.sources.pairs import find_sources
from flexunet.errors import ContentError, UsageError
from flexunet.storage import open_store
from job.data.reader import read_sample
from job.data.shard_cache import open_reader
from job.evaluation.pipeline import EvaluateConfig, dataset_of, evaluate_run
from job.inference.options import InferConfig
from job.inference.pipeline import infer
from job.models.ensemble import make_probability_step, network_of
from job.postprocessing.masks import class_ids, without_small
from job.postprocessing.region_filter import (
    FILE_NAME,
    FittedOn,
    RegionTally,
    SmallRegions,
    read_min_pixels,
)
from job.runs.loading import EnsembleMember, load_model, open_run


def case(*parts: tuple[int, int, int]) -> np.ndarray:
    """Returns a mask (8, 32) with class 1 in columns first..last of a row, for each part."""
    ids = np.zeros((8, 32), np.uint8)
    for row, first, last in parts:
        ids[row, first:last] = 1
    return ids


def test_fit_keeps_lesions_and_drops_tiny_regions() -> None:
    tally = RegionTally(["mass"])
    # A lesion of 10, found whole, beside a speck of 2: 2*10/22, and 1 without the speck.
    tally.add(case((0, 0, 10)), case((0, 0, 10), (4, 0, 2)))
    # Nothing there, a speck of 3: 0, and left out of the mean without it.
    tally.add(case(), case((2, 5, 8)))
    # A lesion of 6 of which 4 are found: 8/10, which goes down to 0 where regions of 4 go.
    tally.add(case((6, 0, 6)), case((6, 0, 4)))
    (fit,) = tally.fit()
    assert fit.name == "mass"
    assert fit.min_pixels == 4  # 3 and fewer go
    assert fit.dice_before == pytest.approx((20 / 22 + 0 + 0.8) / 3)
    assert fit.dice == pytest.approx((1 + 0.8) / 2)


def test_fit_drops_nothing_where_that_is_best() -> None:
    tally = RegionTally(["mass"])
    tally.add(case((0, 0, 7)), case((0, 0, 7)))
    (fit,) = tally.fit()
    assert (fit.min_pixels, fit.dice_before, fit.dice) == (0, 1.0, 1.0)


def test_fit_of_cases_without_the_class() -> None:
    tally = RegionTally(["mass", "calcification"])
    tally.add(case(), case())
    for fit in tally.fit():
        assert (fit.min_pixels, fit.dice) == (0, None)


def test_fit_agrees_with_removing_and_counting() -> None:
    random = np.random.default_rng(3)
    pairs = []
    tally = RegionTally(["mass"])
    for _ in range(8):
        truth = np.zeros((40, 40), np.uint8)
        row, column = random.integers(0, 30, 2)
        truth[row : row + 9, column : column + 7] = 1
        prediction = np.where(random.random((40, 40)) < 0.06, 1 - truth, truth).astype(np.uint8)
        pairs.append((truth, prediction))
        tally.add(truth, prediction)
    (fit,) = tally.fit()

    def mean_dice(limit: int) -> float:
        scores = []
        for truth, prediction in pairs:
            kept = without_small(prediction, (limit,))
            scores.append(2 * np.sum(truth & kept) / (truth.sum() + kept.sum()))
        return float(np.mean(scores))

    every = [mean_dice(limit) for limit in range(100)]
    assert fit.dice_before == pytest.approx(every[0])
    assert fit.dice == pytest.approx(max(every))
    assert mean_dice(fit.min_pixels) == pytest.approx(max(every))


def write_with_tiny_regions(folder: Path, num_images: int) -> None:
    """Writes pictures of 64x96 with a bright disc, and bright specks that are in no mask."""
    random = np.random.default_rng(6)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    y, x = np.mgrid[:64, :96]
    for index in range(num_images):
        a, b = random.uniform(28, 36), random.uniform(40, 55)
        disc = (y - a) ** 2 + (x - b) ** 2 <= random.uniform(15, 18) ** 2
        bright = disc.copy()
        for top, left in ((2, 2), (50, 80), (2, 80)):
            bright[top : top + 12, left : left + 14] = True
        image = random.integers(20, 90, (64, 96)) + 120 * bright
        for kind, pixels in (("images", image), ("masks", 255 * disc)):
            path = folder / kind / f"disc-{index:02d}.png"
            assert cv2.imwrite(str(path), pixels.astype(np.uint8))


def without(mask: np.ndarray, least: float) -> np.ndarray:
    """Returns the mask (H, W) bool without regions of fewer than `least` pixels."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    kept = [i for i in range(1, len(stats)) if stats[i, cv2.CC_STAT_AREA] >= least]
    return np.isin(labels, kept)


def test_tiny_regions_go_at_both_sizes_of_resized_images(own_run: Path, tmp_path: Path) -> None:
    write_with_tiny_regions(tmp_path / "source", 15)
    prep = PrepConfig(image_size=32, fractions=(0.4, 0.3, 0.3), num_processes=1)
    sources = find_sources(str(tmp_path / "source"))
    prepare(sources, str(tmp_path / "dataset"), prep, progress=False)
    # As if the run had been trained on it.
    shutil.copy(tmp_path / "dataset" / "dataset.json", own_run / "dataset.json")
    run = open_run(str(own_run))
    dataset = dataset_of(run, str(tmp_path / "dataset"))
    config = EvaluateConfig(remove_small_regions=True, progress=False)
    device = tf.distribute.OneDeviceStrategy("CPU:0")
    evaluation, url = evaluate_run(run, dataset, device, config)
    (fit,) = evaluation.summary["prediction"]["small_regions"]["classes"]
    assert fit["min_pixels"] > 1
    assert fit["dice"] > fit["dice_before"] + 0.05

    options = {"overlays": False, "progress": False}
    masks: dict[str, dict[str, np.ndarray]] = {}
    for name, small_regions in (("all", None), ("large", url)):
        output = tmp_path / name
        infer(
            str(own_run), str(tmp_path / "source" / "images"), str(output),
            InferConfig(small_regions=small_regions, **options),
        )  # fmt: skip
        masks[name] = {p.name: np.asarray(Image.open(p)) == 1 for p in output.glob("*.png")}
    least = fit["min_pixels"] * 64 * 96 / (32 * 32)  # as large a part of the picture
    num_removed = 0
    for name, mask in masks["all"].items():
        assert np.array_equal(masks["large"][name], without(mask, least))
        num_removed += int(np.any(masks["large"][name] != mask))
    assert num_removed == 15

    step = make_probability_step(network_of([load_model(run, which="best")[0]]))
    reader = open_reader(dataset, evaluation.split, cache="full", cache_dir=None)
    assert evaluation.measured is not None
    sizes = evaluation.measured.case_metrics
    for index, case in enumerate(evaluation.cases):
        image, truth = read_sample(reader, index)
        found = class_ids(step(image[np.newaxis]).numpy()[0]) == 1
        source = tmp_path / "source" / "masks" / case.filename
        pairs = {
            "network": (truth == 1, without(found, fit["min_pixels"])),
            "original": (undo_geometry(truth, case.geometry, nearest=True) == 1,
                         masks["large"][case.filename]),
        }  # fmt: skip
        assert pairs["original"][0].shape == cv2.imread(str(source)).shape[:2]
        for size, (true, predicted) in pairs.items():
            case = sizes[size][index].classes[0]
            counts = np.sum(true & predicted), np.sum(~true & predicted), np.sum(true & ~predicted)
            assert (case.tp, case.fp, case.fn) == counts


def test_sizes_are_read_for_the_same_weights_only(tmp_path: Path) -> None:
    import json

    members = [EnsembleMember("runs/a", "checkpoints/x", "1" * 64)]
    store = open_store(str(tmp_path))
    with pytest.raises(UsageError, match="is missing"):
        read_min_pixels(store, ["mass"], members, "none", 8)
    tally = RegionTally(["mass"])
    tally.add(case((0, 0, 10)), case((0, 0, 10), (4, 0, 2)))
    regions = SmallRegions(
        fitted_on=FittedOn(split="valid", num_cases=1, dataset_sha256="3" * 64, fold=None),
        runs=tuple(members),
        flips="none",
        overlap=8,
        classes=tuple(tally.fit()),
    )
    store.put(FILE_NAME, regions.model_dump_json().encode())
    assert read_min_pixels(store, ["mass"], members, "none", 8) == (3,)
    # The same weights in another place.
    moved = [EnsembleMember("elsewhere/a", "checkpoints/x", "1" * 64)]
    assert read_min_pixels(store, ["mass"], moved, "none", 8) == (3,)
    others = [EnsembleMember("runs/a", "checkpoints/x", "2" * 64)]
    for arguments, words in (
        ((others, "none", 8), "fitted for other weights; evaluate again"),
        ((members, "both", 8), "fitted for flips none, not both; evaluate again"),
        ((members, "none", None), "fitted for overlap 8, not None; evaluate again"),
        ((others, "none", 4), "fitted for other weights and overlap 8, not 4; evaluate again"),
    ):
        with pytest.raises(UsageError, match=words):
            read_min_pixels(store, ["mass"], *arguments)
    with pytest.raises(ContentError, match="its classes are mass, the run's mass, calcification"):
        read_min_pixels(store, ["mass", "calcification"], members, "none", 8)
    whole = regions.model_dump(mode="json")
    (fit,) = whole["classes"]
    for data, words in (
        (b"{}", "is required"),
        (b"[1]", "not a JSON object"),
        (b"\xff", "damaged"),
        (b"[" * 100_000, "damaged"),
        (b" " * (2**20 + 1), "1048577 bytes"),
        (json.dumps({**whole, "classes": [{**fit, "min_pixels": -1}]}).encode(), "min_pixels=-1"),
        (json.dumps({**whole, "classes": [{**fit, "min_pixels": 1e999}]}).encode(), "min_pixels"),
        (json.dumps({**whole, "flips": "twice"}).encode(), "flips='twice'"),
        (json.dumps({**whole, "runs": [{"run": "a"}]}).encode(), "checkpoint is required"),
    ):
        store.put(FILE_NAME, data)
        with pytest.raises(ContentError, match=words) as caught:
            read_min_pixels(store, ["mass"], members, "none", 8)
        assert str(caught.value).endswith("; evaluate again")
        assert "\n" not in str(caught.value)


def test_fit_is_not_above_the_true_lesions() -> None:
    # Two cases gain by a size above the lesions of a third, which are small and badly hit.
    tally = RegionTally(["mass"])
    for _ in range(2):
        tally.add(case((0, 0, 20)), case((0, 0, 20), (4, 0, 12)))
    tally.add(case((0, 0, 9)), case((0, 6, 12)))
    (fit,) = tally.fit()
    # Of 13 on, the first two would be found whole and the third not at all: 2/3.
    assert fit.min_pixels == 0
    assert fit.dice == fit.dice_before == pytest.approx((2 * 40 / 52 + 6 / 15) / 3)


def test_one_slip_of_many_lesions_does_not_forbid_a_size() -> None:
    tally = RegionTally(["mass"])
    for index in range(42):
        slip = ((6, 26, 32),) if index == 0 else ()
        tally.add(case((0, 0, 20), *slip), case((0, 0, 20), (4, 0, 9)))
    (fit,) = tally.fit()
    assert fit.min_pixels == 10
    (line,) = tally.describe([fit])
    assert line.startswith(
        "mass: removes predicted regions of fewer than 10 pixels; "
        "Dice, mean over the validation images: "
    )
    assert line.endswith("1 of 43 lesions of valid are smaller")


def test_tiny_regions_of_the_truth_do_not_forbid_a_size() -> None:
    tally = RegionTally(["mass"])
    for _ in range(3):
        tally.add(case((0, 0, 20), (6, 30, 31)), case((0, 0, 20), (4, 0, 9)))
    (fit,) = tally.fit()
    assert fit.min_pixels == 10
    (line,) = tally.describe([fit])
    assert line.endswith("0 of 3 lesions of valid are smaller")


def test_no_size_is_fitted_where_no_lesion_shows_how_small_they_are() -> None:
    tally = RegionTally(["mass"])
    tally.add(case(), case((2, 5, 8)))
    (fit,) = tally.fit()
    assert fit.min_pixels == 0
    assert tally.describe([fit]) == [
        "mass: all regions are kept (Dice, mean over the validation images: 0.0000)"
    ]
