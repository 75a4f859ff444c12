"""Evaluation of a run that the real command trained, against masks counted with numpy."""

import csv
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.imaging.codecs import read_image
from data_prep.imaging.geometry import Box, Geometry
from flexunet.storage import open_store
from job.config import identity_of
from job.data.reader import read_sample
from job.data.shard_cache import open_reader
from job.evaluate import main
from job.evaluation.case_measures import CaseInput, CaseMeasures, scales_of
from job.evaluation.pipeline import EvaluateConfig, dataset_of, evaluate_run
from job.inference.options import InferConfig
from job.inference.pipeline import infer
from job.metrics.lesions import MIN_PIXELS, regions_of_classes
from job.metrics.per_case import CaseMetrics, Scale, nothing_predicted
from job.models.ensemble import Network, network_of
from job.optimization.optimizer import Adam
from job.reporting.html_report import write_report
from job.runs import serialization
from job.runs.loading import fetch_checkpoint, load_model, open_ensemble, open_run
from job.runs.run import Run
from job.train import show_end
from tests.job.discs import prepare_discs


def evaluate(run_folder: Path, **options: Any) -> str:
    """Returns the URL of what the body of the command wrote, on one device of this process."""
    run = open_run(str(run_folder))
    config = EvaluateConfig(progress=False, **options)
    device = tf.distribute.OneDeviceStrategy("CPU:0")
    return evaluate_run(run, dataset_of(run, config.data), device, config)[1]


@pytest.fixture(scope="module")
def evaluated(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the `evaluation` folder of the 4 test cases, in steps of 3: two are padding."""
    run = tmp_path_factory.mktemp("evaluated") / "discs"
    shutil.copytree(trained_run, run)
    return Path(evaluate(run, batch_size=3))


def rows_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "per_case.csv").read_text().splitlines()))


def summary_of(folder: Path) -> dict[str, Any]:
    """Returns the summary, read as strict JSON."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    summary: dict[str, Any] = json.loads(
        (folder / "summary.json").read_text(), parse_constant=refuse
    )
    return summary


def counts_of_mass(row: dict[str, str]) -> np.ndarray:
    return np.array([int(row[f"{name}_px_mass"]) for name in ("tp", "fp", "fn", "tn")])


def test_evaluate_counts_the_pixels_of_the_masks_that_infer_writes(
    evaluated: Path, trained_run: Path, tmp_path: Path
) -> None:
    # Pictures are as large as the dataset's, so both commands see the same pixels.
    source = trained_run.parents[1] / "source"
    infer(str(trained_run), str(source / "images"), str(tmp_path), InferConfig(overlays=False))
    rows = rows_of(evaluated)
    assert len(rows) == 4
    for row in rows:
        predicted = np.asarray(Image.open(tmp_path / row["filename"])) == 1
        true = cv2.imread(str(source / "masks" / row["filename"]), cv2.IMREAD_GRAYSCALE) == 255
        counts = [np.sum(predicted & true), np.sum(predicted & ~true), np.sum(~predicted & true)]
        assert counts_of_mass(row).tolist() == [*counts, 32 * 32 - sum(counts)]
        tp, fp, fn = counts
        assert float(row["dice_mass"]) == pytest.approx(2 * tp / (2 * tp + fp + fn), abs=1e-12)
        assert float(row["iou_mass"]) == pytest.approx(tp / (tp + fp + fn), abs=1e-12)
        assert float(row["sensitivity_mass"]) == pytest.approx(tp / (tp + fn), abs=1e-12)
        # What is background to one class is foreground to the other.
        assert int(row["tp_px_background"]) == 32 * 32 - sum(counts)


def test_evaluate_summarizes_its_cases(evaluated: Path) -> None:
    rows, summary = rows_of(evaluated), summary_of(evaluated)
    cases = np.array([counts_of_mass(row) for row in rows])
    tp, fp, fn, tn = cases.sum(axis=0)
    assert summary["split"] == "test"
    assert summary["num_cases"] == 4
    dices = [float(row["dice_mass"]) for row in rows]
    assert summary["foreground_mean"]["dice"] == pytest.approx(np.mean(dices))
    assert summary["foreground_pooled"]["dice"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert summary["foreground_mean"]["dice"] > 0.85  # the discs were learnt
    assert summary["pixel_accuracy"] == pytest.approx((tp + tn) / cases.sum())
    # Nothing but background: no disc is found, and every other pixel is right.
    baseline = summary["all_background"]
    assert baseline["foreground_mean"]["dice"] == 0
    assert baseline["pixel_accuracy"] == pytest.approx((fp + tn) / cases.sum())
    assert [each["name"] for each in summary["classes"]] == ["background", "mass"]


def test_evaluate_writes_the_references_table(evaluated: Path) -> None:
    summary = summary_of(evaluated)
    assert (evaluated / "evaluation.csv").read_text() == (
        f"categorical_crossentropy,{summary['loss']:.4f}\n"
        f"dice_coef_multiclass,{summary['reference_dice_coef_multiclass']:.4f}\n"
    )


def test_evaluate_agrees_with_the_evaluation_that_ends_training(
    evaluated: Path, trained_run: Path
) -> None:
    ours, theirs = evaluated, trained_run / "evaluation"
    assert (ours / "per_case.csv").read_text() == (theirs / "per_case.csv").read_text()
    assert summary_of(ours)["loss"] == pytest.approx(summary_of(theirs)["loss"], rel=1e-5)


def test_evaluate_shows_each_of_few_cases_once(evaluated: Path) -> None:
    cases = sorted(path.name for path in (evaluated / "examples").iterdir())
    assert cases == sorted(path.name for path in (evaluated / "overlays").iterdir())
    named = list(csv.DictReader((evaluated / "examples.csv").read_text().splitlines()))
    assert [f"{row['picture']}.png" for row in named] == cases
    dices = [float(row["foreground_dice"]) for row in named]
    assert dices == sorted((float(row["dice_mass"]) for row in rows_of(evaluated)), reverse=True)
    # The three best leave one of four cases, the worst.
    assert cases == ["best-1.png", "best-2.png", "best-3.png", "worst-1.png"]
    for name in cases:
        # Three panels of 512 pixels side by side.
        data = (evaluated / "examples" / name).read_bytes()
        assert read_image(data, name=name).shape[1] > 3 * 512


def test_evaluate_measures_contours_lesions_and_thresholds(evaluated: Path) -> None:
    rows, summary = rows_of(evaluated), summary_of(evaluated)
    network = summary["sizes"]["network"]
    assert summary["sizes"]["original"] == network  # the pictures are as large as the network's
    mass = network["classes"][0]
    assert mass["dice_mean"]["value"] == pytest.approx(summary["foreground_mean"]["dice"])
    assert mass["dice_pooled"]["value"] == pytest.approx(summary["foreground_pooled"]["dice"])
    assert mass["dice_mean"]["num_groups"] == 4  # too few for an interval
    assert mass["dice_mean"]["low"] is mass["dice_mean"]["high"] is None
    assert "enlarged" in summary["truth"]["original"]
    assert 0 <= mass["hd95_px"]["value"] < 8
    assert mass["num_lesions"] == 4
    measures = list(csv.DictReader((evaluated / "measures_network.csv").read_text().splitlines()))
    assert [row["id"] for row in measures] == [row["id"] for row in rows]
    assert [row["dice_mass"] for row in measures] == [row["dice_mass"] for row in rows]
    sweep = list(csv.DictReader((evaluated / "thresholds.csv").read_text().splitlines()))
    half = next(row for row in sweep if row["threshold"] == "0.5")
    assert float(half["dice_mean"]) == pytest.approx(summary["foreground_mean"]["dice"])


def test_evaluate_measures_at_the_images_own_size_in_mm(own_run: Path) -> None:
    run = open_run(str(own_run))
    dataset = dataset_of(run, None)
    split = dataset.split("test")
    # As if pictures of 64x96 pixels had been made narrower and lower.
    geometry = Geometry("stretch", 64, 96, 0, 0, 32, 32)
    wide = replace(split, geometries=(geometry,) * len(split), spacings=((0.1, 0.1),) * len(split))
    dataset = replace(dataset, splits={**dataset.splits, "test": wide})
    device = tf.distribute.OneDeviceStrategy("CPU:0")
    evaluation, _ = evaluate_run(run, dataset, device, EvaluateConfig(progress=False))
    assert evaluation.measured is not None
    sizes = evaluation.measured.case_metrics
    for network, original in zip(sizes["network"], sizes["original"], strict=True):
        small, large = network.classes[0], original.classes[0]
        # A stored pixel is 2x3 pixels of the picture, 0.2 x 0.3 mm.
        assert large.tp + large.fn == 6 * (small.tp + small.fn)
        assert network.unit == original.unit == "mm"
        assert small.hd95 is not None
        assert large.hd95 == pytest.approx(small.hd95, abs=0.3)
    assert any(case.classes[0].hd95 for case in sizes["original"])


def metrics_of(
    geometry: Geometry, truth: np.ndarray, probabilities: np.ndarray, ids: np.ndarray
) -> dict[str, CaseMetrics]:
    """Returns the metrics of a case of two classes at each size."""
    case = CaseInput(0, geometry, None, truth, probabilities)
    regions = regions_of_classes(truth, 2, min_pixels=MIN_PIXELS)
    return CaseMeasures(2, None).metrics_of(case, ids, regions)


def test_tiny_regions_are_the_same_at_both_sizes() -> None:
    # 64x96 pixels were stored as 32x32, each of them 6.
    geometry = Geometry("stretch", 64, 96, 0, 0, 32, 32)
    truth = np.zeros((32, 32), np.uint8)
    truth[2, 2:7] = 1  # 5 pixels, 30 of the picture
    truth[20, 2:8] = 1
    nothing = np.zeros_like(truth)
    probabilities = np.stack([1.0 - nothing, nothing], axis=-1).astype(np.float32)
    cases = metrics_of(geometry, truth, probabilities, nothing)
    for size in ("network", "original"):
        lesions = cases[size].classes[0].lesions
        assert (lesions.num_true, lesions.num_tiny_regions) == (1, 1), size


@pytest.mark.parametrize("factor", [1.3, 2.6, 5.2])
def test_tiny_regions_are_the_same_where_the_factor_is_no_whole_number(factor: float) -> None:
    height, width = round(128 * factor), round(128 * 1.25 * factor)
    geometry = Geometry("stretch", height, width, 0, 0, 128, 128)
    truth = np.zeros((128, 128), np.uint8)
    for index, (row, column) in enumerate(np.ndindex(25, 18)):
        # By turns 6 and 5 stored pixels, which are not equally many of the picture's.
        truth[row * 5 + 1 : row * 5 + 3, column * 7 + 1 : column * 7 + 4] = 1
        if index % 2:
            truth[row * 5 + 1, column * 7 + 1] = 0
    probabilities = np.stack([1.0 - truth, truth], axis=-1).astype(np.float32)
    cases = metrics_of(geometry, truth, probabilities, truth)
    for size in ("network", "original"):
        lesions = cases[size].classes[0].lesions
        assert (lesions.num_true, lesions.num_tiny_regions) == (225, 225), size
    assert cases["network"].classes[0].lesions.num_found == 225


def test_missing_all_never_makes_a_case_better_at_either_size() -> None:
    @settings(deadline=None)
    @given(
        seed=st.integers(0, 2**32 - 1), source=st.tuples(st.integers(16, 70), st.integers(16, 70))
    )
    def check(seed: int, source: tuple[int, int]) -> None:
        random = np.random.default_rng(seed)
        geometry = Geometry("stretch", *source, 0, 0, 16, 16)
        truth = (random.random((16, 16)) < random.uniform(0.05, 0.6)).astype(np.uint8)
        truth[8, 8] = 1
        mass = random.random((16, 16)).astype(np.float32)
        found, lost = (
            metrics_of(
                geometry, truth, np.stack([1 - each, each], axis=-1), (each > 0.5).astype(np.uint8)
            )
            for each in (mass, np.zeros_like(mass))
        )
        for size in ("network", "original"):
            one, other = found[size].classes[0], lost[size].classes[0]
            assert (other.presence, other.tp, other.nsd) == ("truth_only", 0, 0)
            assert other.tp + other.fn == one.tp + one.fn
            assert one.hd95 is not None
            assert other.hd95 is not None
            assert other.hd95 >= one.hd95
            assert other.lesions.num_true == one.lesions.num_true
            assert other.lesions.num_found == 0
            assert other.lesions.num_true == lost["network"].classes[0].lesions.num_true
        # As with an empty prediction, which is the baseline.
        assert nothing_predicted(found["original"]) == lost["original"]

    check()


def test_scales_follow_the_geometry_of_each_axis() -> None:
    # 64x96 source pixels of 0.1 x 0.2 mm in 32x32 stored ones.
    scales = scales_of(Geometry("stretch", 64, 96, 0, 0, 32, 32), (0.1, 0.2))
    assert scales["original"] == Scale((0.1, 0.2), "mm")
    assert scales["network"].spacing == pytest.approx((0.2, 0.6))
    assert scales_of(Geometry("stretch", 64, 96, 0, 0, 32, 32), None)["network"].unit == "px"
    # Of which the 32x48 in the middle were stored: half as many in as many.
    part = Geometry("stretch", 64, 96, 0, 0, 32, 32, Box(16, 24, 32, 48))
    assert scales_of(part, (0.1, 0.2))["network"].spacing == pytest.approx((0.1, 0.3))


def test_evaluate_puts_cropped_and_flipped_cases_back(own_run: Path) -> None:
    run = open_run(str(own_run))
    dataset = dataset_of(run, None)
    split = dataset.split("test")
    # As if the right half of pictures of 32x64 had been stored mirrored: the lesions stay as large.
    geometry = Geometry("stretch", 32, 64, 0, 0, 32, 32, Box(0, 32, 32, 32), is_flipped=True)
    part = replace(split, geometries=(geometry,) * len(split), spacings=((0.1, 0.1),) * len(split))
    dataset = replace(dataset, splits={**dataset.splits, "test": part})
    device = tf.distribute.OneDeviceStrategy("CPU:0")
    evaluation, _ = evaluate_run(run, dataset, device, EvaluateConfig(progress=False))
    assert evaluation.measured is not None
    sizes = evaluation.measured.case_metrics
    for network, original in zip(sizes["network"], sizes["original"], strict=True):
        small, large = network.classes[0], original.classes[0]
        assert (small.tp, small.fp, small.fn) == (large.tp, large.fp, large.fn)
        assert small.hd95 == pytest.approx(large.hd95)


def test_evaluate_of_another_split_leaves_the_test_split_alone(own_run: Path) -> None:
    before = (own_run / "evaluation" / "per_case.csv").read_text()
    folder = Path(evaluate(own_run, split="valid"))
    assert folder == own_run / "evaluation" / "valid"
    assert summary_of(folder)["split"] == "valid"
    assert not {r["id"] for r in rows_of(folder)} & {r["id"] for r in rows_of(folder.parent)}
    assert (own_run / "evaluation" / "per_case.csv").read_text() == before


def test_evaluate_takes_the_last_weights_when_asked(own_run: Path, tmp_path: Path) -> None:
    commit_weights(own_run, tmp_path, lambda weights: np.full(weights.shape, np.nan))
    assert summary_of(Path(evaluate(own_run)))["foreground_mean"]["dice"] > 0.85
    folder = Path(evaluate(own_run, checkpoint="last"))
    # No probability is the highest, so every pixel is background; the JSON stays strict.
    summary = summary_of(folder)
    assert summary["foreground_mean"]["dice"] == 0
    assert summary["loss"] is None
    assert math.isnan(float((folder / "evaluation.csv").read_text().splitlines()[0].split(",")[1]))


def test_evaluate_says_which_checkpoint_it_took(
    own_run: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = json.loads((own_run / "outcome.json").read_text())
    best = outcome["best"]["epoch"] + 1
    assert outcome["evaluation"]["checkpoint"] == {"which": "best", "epochs": [best]}
    caplog.set_level("INFO")
    summary = summary_of(Path(evaluate(own_run, checkpoint="last")))
    assert summary["checkpoint"] == {"which": "last", "epochs": [5]}
    assert caplog.messages[0] == "evaluating the last checkpoint, after 5 epochs"
    # A later `train` shows this one too, as the report does.
    show_end(outcome, str(own_run))
    printed = capsys.readouterr().out
    assert "test split: 4 images, the last checkpoint" in " ".join(printed.split())
    write_report(open_store(str(own_run)))
    assert "with the last checkpoint, after 5 epochs" in (own_run / "report.html").read_text()
    (own_run / "outcome.json").unlink()
    caplog.clear()
    evaluate(own_run)
    assert "it is still training, or its process was killed" in caplog.messages[0]


def commit_weights(folder: Path, staging: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Adds a checkpoint to a run, after its best one, whose weights are changed."""
    trained = open_run(str(folder))
    model = load_model(trained, which="last")[0]
    for weight in model.weights:
        weight.assign(change(weight.numpy()))
    _, members = fetch_checkpoint(trained.store, str(staging), which="last")
    state = serialization.read_state(members[serialization.STATE_NAME])
    optimizer = Adam(trained.config.optimizer, model.trainable_variables)
    (staging / "new").mkdir()
    members = serialization.take(str(staging / "new"), model, optimizer, state)()
    with Run.open(str(folder.parent), folder.name) as run:
        run.check_identity(identity_of(trained.config), trained.dataset_digest)
        run.commit(state["step"] + 1, state["epoch"], members, {})


def test_ensemble_predicts_the_mean_of_its_runs(own_run: Path, tmp_path: Path) -> None:
    # Of two runs and two classes, the mean of logits would choose the same class.
    others = tuple(str(tmp_path / name / "discs") for name in ("second", "third"))
    random = np.random.default_rng(4)
    for folder in map(Path, others):
        shutil.copytree(own_run, folder)
        commit_weights(folder, folder.parent, lambda w: w * random.uniform(0.3, 1.7, w.shape))
    options = {"checkpoint": "last", "progress": False}
    config = EvaluateConfig(ensemble=others, output=str(tmp_path / "both"), **options)
    runs = open_ensemble([str(own_run), *others])
    dataset = dataset_of(runs[0], None, runs[1:])
    device = tf.distribute.OneDeviceStrategy("CPU:0")
    evaluation, _ = evaluate_run(runs[0], dataset, device, config, runs[1:])
    images = own_run.parents[1] / "images"
    images.mkdir()
    split = dataset.split("test")
    reader = open_reader(dataset, split, cache="full", cache_dir=None)
    truths = []
    for index, name in enumerate(split.filenames):
        pixels, truth = read_sample(reader, index)
        truths.append(truth)
        assert cv2.imwrite(str(images / name), pixels)
    masks = InferConfig(overlays=False, ensemble=others, **options)
    infer(str(own_run), str(images), str(tmp_path / "masks"), masks)

    networks = [load_model(run, which="last")[0] for run in runs]
    num_differing = np.zeros(4, int)  # from each run, and from the mean of logits
    for index, name in enumerate(split.filenames):
        pixels = cv2.imread(str(images / name), cv2.IMREAD_GRAYSCALE)
        batch = pixels[np.newaxis, ..., np.newaxis].astype(np.float32)
        logits = [network(batch).numpy()[0] for network in networks]
        expected = np.argmax(np.mean(tf.nn.softmax(logits), axis=0), axis=-1)
        rivals = [*logits, np.mean(logits, axis=0)]
        num_differing += [np.any(np.argmax(each, axis=-1) != expected) for each in rivals]
        assert np.array_equal(np.asarray(Image.open(tmp_path / "masks" / name)), expected)
        pairs = [(1, 1), (0, 1), (1, 0), (0, 0)]  # (truth, prediction): tp, fp, fn, tn
        counts = [np.sum((truths[index] == t) & (expected == p)) for t, p in pairs]
        assert evaluation.counts[index, 1].tolist() == counts
    assert num_differing.min() > 0, num_differing


def seen_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns the list to which each network adds how many pictures it is given at once."""
    sizes: list[int] = []

    def watched(*arguments: Any) -> Network:
        network = network_of(*arguments)

        def reported(images: tf.Tensor) -> tf.Tensor:
            sizes.append(images.shape[0])
            return network(images)

        return reported

    monkeypatch.setattr("job.models.ensemble.network_of", watched)
    return sizes


def test_a_device_gets_no_more_at_once_than_in_training(
    own_run: Path, two_cpus: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The loss depends on the batch (dice_loss is of all of it), and never on the devices."""
    path = own_run / "config.yaml"
    text = path.read_text().replace("global_batch_size: 1\n", "global_batch_size: 4\n")
    path.write_text(text.replace("name: categorical_crossentropy", "name: dice"))
    sizes = seen_sizes(monkeypatch)

    def evaluated_by(strategy: Any, replicas: int | None, name: str, **options: Any) -> Any:
        """Returns the summary, for a run that says how many replicas have trained it."""
        environment = {} if replicas is None else {"replicas": replicas}
        (own_run / "environment.json").write_text(json.dumps(environment))
        sizes.clear()
        run = open_run(str(own_run))
        config = EvaluateConfig(progress=False, output=str(tmp_path / name), **options)
        return evaluate_run(run, dataset_of(run, None), strategy, config)[0].summary

    one_cpu = tf.distribute.OneDeviceStrategy("CPU:0")
    expected = evaluated_by(one_cpu, 1, "whole")
    assert set(sizes) == {4}
    for strategy, replicas, held in (
        (one_cpu, None, 4), (one_cpu, 4, 1), (two_cpus, 1, 2),
    ):  # fmt: skip
        found = evaluated_by(strategy, replicas, "again")
        assert set(sizes) == {held}, (replicas, held)
        assert found["classes"] == expected["classes"]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    # What is asked for is spread over the devices, however much that is.
    evaluated_by(two_cpus, 4, "asked", batch_size=4)
    assert set(sizes) == {2}


def test_a_run_in_float16_predicts_in_float32_on_a_cpu(own_run: Path) -> None:
    if tf.config.list_physical_devices("GPU"):
        pytest.skip("this machine has a GPU")
    run = open_run(str(own_run))
    for precision, computed in (("mixed_float16", "float32"), ("mixed_bfloat16", "bfloat16")):
        config = run.config.model_copy(update={"precision": precision})
        model, _ = load_model(replace(run, config=config), which="best")
        assert model.layers[2].compute_dtype == computed


def test_command_refuses_another_dataset(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = prepare_discs(tmp_path, num_images=8)
    assert main([str(trained_run), "--data", other]) == 2
    error = capsys.readouterr().err
    assert "not the dataset of this run" in error
    assert f"was trained on, {trained_run.parents[1] / 'dataset'}; give --data only if" in error
    assert error.count("\n") == 1


def test_command_refuses_tiles_as_images_where_there_are_none(
    own_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(own_run.rglob("*"))
    assert main([str(own_run), "--tiles-as-pictures"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--tiles-as-pictures: " in line
    assert "was prepared without tiles (geometry stretch)" in line
    assert sorted(own_run.rglob("*")) == before


def test_command_refuses_a_run_without_a_checkpoint(
    own_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(own_run / "checkpoints")
    assert main([str(own_run)]) == 2
    assert "no checkpoint yet" in capsys.readouterr().err


def test_command_refuses_a_folder_without_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 2
    assert "config.yaml is missing" in capsys.readouterr().err


def test_command_refuses_a_machine_without_the_gpu_that_was_asked_for(
    own_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if tf.config.list_physical_devices("GPU"):
        pytest.skip("this machine has a GPU")
    before = sorted(own_run.rglob("*"))
    assert main([str(own_run), "--needs-gpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a GPU was requested, but TensorFlow finds none on" in line
    assert sorted(own_run.rglob("*")) == before
