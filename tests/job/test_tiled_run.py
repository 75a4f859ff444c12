"""A run that the real command trained on tiles: pictures are what is evaluated and predicted."""

import csv
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from flexunet import progress
from flexunet.errors import UsageError
from flexunet.storage import open_store
from job.data.cases import cases_of, read_case
from job.data.dataset import open_dataset
from job.data.folds import fold_of
from job.data.shard_cache import open_reader
from job.distributed import watchdog
from job.distributed.watchdog import Watchdog
from job.evaluate import main as evaluate_main
from job.evaluation.evaluator import make_evaluator
from job.evaluation.pipeline import EvaluateConfig, dataset_of, evaluate_run
from job.infer import main as infer_main
from job.inference.options import InferConfig
from job.inference.pipeline import infer
from job.models.ensemble import network_of
from job.runs.loading import model_for, open_ensemble, open_run
from job.runs.run import Run
from job.training.loop import train_and_evaluate
from job.training.setup import Callbacks
from tests import commands
from tests.job.discs import prepare_discs, write_discs
from tests.job.setups import one_process_setup

PROJECT = Path(__file__).resolve().parents[2]
SIDE, TILE = 72, 32  # 72 in steps of at most 24: tiles at 0, 20 and 40


@pytest.fixture(scope="module")
def tiled_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a run on 10 pictures of 72x72 in 9 tiles each: 6 train, 2 valid, 2 test."""
    folder = tmp_path_factory.mktemp("tiled")
    data = prepare_discs(folder, num_images=10, side=SIDE, tile=TILE)
    options = {
        "data": data,
        "output": str(folder / "runs"),
        "name": "tiles",
        "epochs": "6",
        "global-batch-size": "2",
        "precision": "float32",
        "prediction-images": "1",
        "preset": "reference",
        "model.num-layers": "2",
        "model.base-filters": "8",
        "model.base-kernels": "5,5",
        "optimizer.learning-rate": "0.003",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    done = commands.run(
        "job.train", "--local", "--no-tensorboard", "--fit-postprocessing", *arguments
    )
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "tiles"


@pytest.fixture
def own_tiled_run(tiled_run: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "own" / "tiles"
    shutil.copytree(tiled_run, folder)
    return folder


def evaluate(run: Path, **options: Any) -> tuple[dict[str, Any], Path]:
    """Returns the summary and the folder of an evaluation."""
    config = EvaluateConfig(progress=False, **options)
    trained, *others = open_ensemble([str(run), *config.ensemble])
    device = tf.distribute.OneDeviceStrategy("CPU:0")
    dataset = dataset_of(trained, None, others)
    evaluation, url = evaluate_run(trained, dataset, device, config, others)
    return evaluation.summary, Path(url)


class SlowNetwork:
    """A network that takes its time for each batch of windows."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.num_batches = 0

    def __call__(self, windows: np.ndarray) -> np.ndarray:
        time.sleep(self.seconds)
        self.num_batches += 1
        return np.full((*windows.shape[:3], 2), 0.5, np.float32)


def test_a_large_image_may_take_longer_than_a_step(
    tiled_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "_TICK_S", 0.02)
    run = open_run(str(tiled_run))
    device = tf.distribute.OneDeviceStrategy("CPU:0")
    network = network_of([model_for(run.config, run.manifest)])
    slow = SlowNetwork(0.1)
    evaluator = replace(
        make_evaluator(run.config, device, dataset_of(run, None), network), probabilities=slow
    )
    expired: list[str] = []
    with Watchdog(phase_s=60, step_s=1.5, expired=expired.append) as dog:
        dog.enter("end of epoch 1")
        dog.beat()  # from here on it has the time of a step
        evaluator.mask_of(np.zeros((120, 120, 1), np.uint8), dog.heartbeat)
        assert slow.num_batches == 7 * 4  # 2.8 s
    assert expired == []


def test_training_reports_every_batch_of_windows(tiled_run: Path, tmp_path: Path) -> None:
    config = open_run(str(tiled_run)).config
    config = config.model_copy(update={"output": str(tmp_path), "name": "again", "epochs": 1})
    device = tf.distribute.OneDeviceStrategy("CPU:0")
    reported: dict[str, int] = {}
    phases = ["starting"]

    def report(event: Any) -> None:
        if event["event"] == "phase":
            phases.append(event["name"])

    def heartbeat() -> None:
        reported[phases[-1]] = reported.get(phases[-1], 0) + 1

    with Run.open(str(tmp_path), "again") as run:
        setup = one_process_setup(config, run, device)
        train_and_evaluate(setup, Callbacks(report, lambda: False, heartbeat))
    # 4 rows of 4 windows in batches of 2, for one picture after an epoch; for two of the test
    # split, which report again when they are measured and when they are drawn, and for 9 batches of
    # tiles. The best checkpoint is read in two pieces, its record and its weights. The fit reports
    # the windows of two images of the validation split, and each image three times.
    assert reported["end of epoch 1"] == 8
    assert reported["evaluation"] == 2 + 9 + 2 * (8 + 1 + 1) + 2 * (8 + 3)


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_images_are_put_together_from_their_tiles(tiled_run: Path) -> None:
    source = tiled_run.parents[1] / "source"
    dataset = open_dataset(str(tiled_run.parents[1] / "dataset"))
    names = []
    for split in dataset.splits.values():
        reader = open_reader(dataset, split, cache="full", cache_dir=None)
        cases = cases_of(split)
        assert sorted(i for each in cases for i in each.samples) == list(range(len(split)))
        for case in cases:
            names.append(case.id)
            image, mask = read_case(reader, case)
            stored = cv2.imread(str(source / "images" / case.filename), cv2.IMREAD_GRAYSCALE)
            assert np.array_equal(image[..., 0], stored)
            true = cv2.imread(str(source / "masks" / case.filename), cv2.IMREAD_GRAYSCALE)
            assert np.array_equal(255 * mask, true)
            assert case.geometry.crop is None
    assert len(names) == len(set(names)) == 10


def test_training_evaluates_and_shows_images(tiled_run: Path) -> None:
    rows = rows_of(tiled_run / "evaluation" / "per_case.csv")
    assert [row["filename"] for row in rows] == [f"{row['id']}.png" for row in rows]
    assert len(rows) == 2
    for row in rows:
        counts = [int(row[f"{name}_px_mass"]) for name in ("tp", "fp", "fn", "tn")]
        assert sum(counts) == SIDE * SIDE
    summary = json.loads((tiled_run / "evaluation" / "summary.json").read_text())
    assert (summary["case"], summary["overlap"]) == ("picture", TILE // 2)
    assert summary["num_cases"] == summary["sizes"]["original"]["num_cases"] == 2
    assert summary["foreground_mean"]["dice"] > 0.7
    fitted = json.loads((tiled_run / "postprocessing.json").read_text())
    assert (fitted["overlap"], fitted["fitted_on"]["num_cases"]) == (16, 2)  # half a window
    (shown, *_) = (tiled_run / "epoch_change_infer").iterdir()
    assert cv2.imread(str(shown)).shape == (SIDE, SIDE, 3)


def test_evaluate_counts_the_pixels_of_the_masks_that_infer_writes(
    own_tiled_run: Path, tiled_run: Path, tmp_path: Path
) -> None:
    source = tiled_run.parents[1] / "source"
    summary, folder = evaluate(own_tiled_run, overlap=8)
    assert summary["overlap"] == 8
    config = InferConfig(overlays=False, progress=False, overlap=8, batch_size=4)
    infer(str(own_tiled_run), str(source / "images"), str(tmp_path / "masks"), config)
    for row in rows_of(folder / "per_case.csv"):
        predicted = np.asarray(Image.open(tmp_path / "masks" / row["filename"])) == 1
        true = cv2.imread(str(source / "masks" / row["filename"]), cv2.IMREAD_GRAYSCALE) == 255
        counts = [np.sum(predicted & true), np.sum(predicted & ~true), np.sum(~predicted & true)]
        assert [int(row[f"{name}_px_mass"]) for name in ("tp", "fp", "fn")] == counts


def test_tiles_are_cases_only_when_asked(own_tiled_run: Path) -> None:
    summary, folder = evaluate(own_tiled_run, split="valid", tiles_as_pictures=True)
    assert (summary["case"], summary["num_cases"]) == ("tile", 18)
    rows = rows_of(folder / "per_case.csv")
    assert sum(int(row["tn_px_mass"]) for row in rows) < 18 * TILE * TILE
    # Loss and metrics of the reference are of the tiles either way.
    assert evaluate(own_tiled_run, split="valid")[0]["loss"] == pytest.approx(summary["loss"])


def test_ensemble_of_a_run_with_itself_is_that_run(own_tiled_run: Path, tmp_path: Path) -> None:
    alone, folder = evaluate(own_tiled_run)
    twice, place = evaluate(
        own_tiled_run, ensemble=(str(own_tiled_run),), output=str(tmp_path / "both")
    )
    assert place == tmp_path / "both"
    assert (place / "per_case.csv").read_text() == (folder / "per_case.csv").read_text()
    assert twice["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    assert len(twice["prediction"]["runs"]) == 2
    flipped, _ = evaluate(own_tiled_run, flips="both")
    assert flipped["loss"] != pytest.approx(alone["loss"], rel=1e-4)
    assert flipped["foreground_mean"]["dice"] > 0.7


def test_small_regions_are_fitted_on_valid_and_used_by_infer(
    own_tiled_run: Path, tiled_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    summary, folder = evaluate(own_tiled_run, remove_small_regions=True)
    found = json.loads((folder / "small_regions.json").read_text())
    assert found == summary["prediction"]["small_regions"]
    assert (found["fitted_on"]["split"], found["fitted_on"]["num_cases"]) == ("valid", 2)
    valid = evaluate(own_tiled_run, split="valid")[0]
    dice_before = found["classes"][0]["dice_before"]
    assert dice_before == pytest.approx(valid["foreground_mean"]["dice"])
    # A size that removes everything, as if it had been fitted.
    found["classes"][0]["min_pixels"] = SIDE * SIDE
    (folder / "small_regions.json").write_text(json.dumps(found))
    images = str(tiled_run.parents[1] / "source" / "images")
    config = {"overlays": False, "progress": False, "batch_size": 4}
    for name, options in (("all", {}), ("none", {"small_regions": str(folder)})):
        infer(str(own_tiled_run), images, str(tmp_path / name), InferConfig(**config, **options))
        masks = [np.asarray(Image.open(p)) for p in sorted((tmp_path / name).glob("*.png"))]
        assert any(mask.any() for mask in masks) == (name == "all")
        record = json.loads((tmp_path / name / "inference.json").read_text())
        assert record["overlap"] == TILE // 2  # though nobody named it
        assert record.get("min_pixels") == (None if name == "all" else [SIDE * SIDE])
    # Masks by other sizes are not continued, though these lie in the same place.
    found["classes"][0]["min_pixels"] = 0
    (folder / "small_regions.json").write_text(json.dumps(found))
    changed = rf"way: the sizes of {folder} were \[{SIDE * SIDE}\], now \[0\]; give"
    with pytest.raises(UsageError, match=changed):
        infer(str(own_tiled_run), images, str(tmp_path / "none"), InferConfig(**config, **options))
    for options, words in (
        ({"flips": "both"}, "fitted for flips none, not both"),
        ({"overlap": 8}, "fitted for overlap 16, not 8"),
    ):
        other = InferConfig(**config, **options, small_regions=str(folder))
        with pytest.raises(UsageError, match=words):
            infer(str(own_tiled_run), images, str(tmp_path / "other"), other)
    # An evaluation without it keeps the fit, and says what goes and what stays.
    fit = (folder / "small_regions.json").read_bytes()
    caplog.clear()
    with caplog.at_level("INFO", logger="job.evaluation"):
        assert evaluate(own_tiled_run)[0]["prediction"]["small_regions"] is None
    assert (folder / "small_regions.json").read_bytes() == fit
    assert caplog.messages[1:] == [
        f"replacing the evaluation in {folder} (--output writes to another folder); "
        "small_regions.json stays"
    ]


def test_infer_slides_over_large_images_of_any_run(trained_run: Path, tmp_path: Path) -> None:
    """A run on pictures of 32x32 finds the discs of a picture of 90x100 at their own size."""
    y, x = np.mgrid[:90, :100]
    centers = [(20, 20), (60, 75), (75, 25)]
    truth = np.any([(y - a) ** 2 + (x - b) ** 2 <= 36 for a, b in centers], axis=0)
    noise = np.random.default_rng(5).integers(20, 90, (90, 100))
    (tmp_path / "images").mkdir()
    assert cv2.imwrite(str(tmp_path / "images" / "a.png"), (noise + 120 * truth).astype(np.uint8))
    config = {"progress": False, "batch_size": 3}
    output = tmp_path / "masks"
    infer(
        str(trained_run), str(tmp_path / "images"), str(output),
        InferConfig(**config, window="sliding", overlap=20),
    )  # fmt: skip
    predicted = np.asarray(Image.open(output / "a.png")) == 1
    assert predicted.shape == truth.shape
    assert 2 * np.sum(predicted & truth) / (predicted.sum() + truth.sum()) > 0.8
    record = json.loads((output / "inference.json").read_text())
    assert (record["window"], record["overlap"]) == ("sliding", 20)
    with pytest.raises(UsageError, match="another way: --window was sliding, now auto; give"):
        infer(str(trained_run), str(tmp_path / "images"), str(output), InferConfig(**config))


def test_infer_says_how_far_a_large_image_is(
    trained_run: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 0.0)
    (tmp_path / "images").mkdir()
    assert cv2.imwrite(str(tmp_path / "images" / "a.png"), np.zeros((70, 40), np.uint8))
    caplog.set_level("INFO")
    config = InferConfig(window="sliding", overlap=10, overlays=False)
    infer(str(trained_run), str(tmp_path / "images"), str(tmp_path / "masks"), config)
    # 70 rows in windows of 32 that overlap by 10.
    reported = [line for line in caplog.messages if line.startswith("infer: ")]
    assert [line.split(", ")[-1] for line in reported[:3]] == [
        f"a.png: {number}/3 rows of windows" for number in (1, 2, 3)
    ]
    assert reported[-1].startswith("infer: 1/1 images")
    assert "predicting windows of 32x32 pixels at original size, but this run was" in caplog.text


def test_infer_by_one_window_writes_the_masks_of_a_plain_pass(
    trained_run: Path, tmp_path: Path
) -> None:
    images = str(trained_run.parents[1] / "source" / "images")
    masks = {}
    for window in ("auto", "sliding"):
        config = InferConfig(overlays=False, progress=False, window=window)
        infer(str(trained_run), images, str(tmp_path / window), config)
        store = open_store(str(tmp_path / window))
        names = [stat.name for stat in store.list() if stat.name.endswith(".png")]
        masks[window] = {name: store.get(name) for name in names}
    assert len(masks["auto"]) == 20
    assert masks["auto"] == masks["sliding"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ensemble", "TILES"], "geometry is tile, but"),
        (["--ensemble", "MISSING"], "no run here"),
        (["--ensemble", "RUN"], "give --output"),
        (["--output", "RUN"], "has files that are not of an evaluation"),
        (["--tiles-as-pictures", "--remove-small-regions"], "fits sizes for whole images"),
        (
            ["--split", "valid", "--remove-small-regions"],
            "scores of --split valid would be optimistic",
        ),
    ],
)
def test_evaluate_refuses_in_one_line(
    tiled_run: Path,
    trained_run: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    places = {"TILES": str(tiled_run), "RUN": str(trained_run), "MISSING": str(trained_run) + "x"}
    assert evaluate_main([str(trained_run), *(places.get(a, a) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_an_overlap_is_refused_where_there_are_windows(
    own_run: Path, own_tiled_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run in (own_run, own_tiled_run):  # as a config of the reference may say it
        text = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(text.replace("window_overlap: null", "window_overlap: 32"))
    write_discs(tmp_path / "source", num_images=1)
    images = str(tmp_path / "source" / "images")
    line = "windows of 32x32 pixels cannot overlap by 32; give --overlap below 32"
    for command, arguments in (
        (evaluate_main, [str(own_tiled_run)]),
        (infer_main, [str(own_tiled_run), images]),
        (infer_main, [str(own_run), images, "--window", "sliding"]),
    ):
        assert command(arguments) == 2
        assert capsys.readouterr().err.endswith(f"{line}\n")
    assert infer_main([str(own_run), images]) == 0
    evaluate(own_run)
    assert json.loads((own_run / "evaluation" / "summary.json").read_text())["overlap"] is None


def test_infer_refuses_runs_that_are_not_alike(
    tiled_run: Path, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = str(trained_run.parents[1] / "source" / "images")
    arguments = [str(trained_run), images, str(tmp_path / "out"), "--ensemble", str(tiled_run)]
    assert infer_main(arguments) == 2
    assert "an ensemble needs runs with the same" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_runs_of_other_folds_predict_the_test_split_alone(
    own_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folds = []
    for fold in (0, 1):
        folder = tmp_path / f"fold-{fold}"
        shutil.copytree(own_run, folder)
        text = (folder / "config.yaml").read_text()
        text = text.replace("folds: null", "folds: 3").replace("fold: null", f"fold: {fold}")
        (folder / "config.yaml").write_text(text)
        folds.append(open_run(str(folder)))
    dataset = open_dataset(str(folds[0].config.data))
    together = dataset_of(folds[0], None, folds[1:])
    assert list(together.splits) == ["test"]
    assert together.split("test").ids == dataset.split("test").ids
    alone = dataset_of(folds[0], None)
    assert alone.split("test").ids == fold_of(dataset, 3, 0).split("test").ids
    first, second = (each.store.url for each in folds)
    arguments = ["--ensemble", second, "--split", "valid", "--output", str(tmp_path / "out")]
    assert evaluate_main([first, *arguments]) == 2
    assert (
        "--split valid: runs of several folds were trained on each other's images"
        in capsys.readouterr().err
    )
