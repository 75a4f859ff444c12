"""Postprocessing fitted on validation cases, and what evaluate and infer do with it."""

import csv
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from data_prep.imaging.geometry import Geometry
from flexunet.progress import no_heartbeat
from flexunet.storage import open_store
from job.data.dataset import Dataset
from job.data.reader import read_sample
from job.data.shard_cache import open_reader
from job.distributed.process_group import ProcessGroup
from job.evaluation.case_file import CaseFile
from job.evaluation.case_measures import CaseInput, CaseMeasures
from job.evaluation.evaluator import Evaluator, make_evaluator
from job.evaluation.pipeline import EvaluateConfig, dataset_of, evaluate_run
from job.evaluation.rank_evaluation import RankResult, Watch
from job.evaluation.validation_fit import (
    _fit_classes,
    _ValidationCases,
    fit_postprocessing,
    log_fit,
)
from job.inference.options import InferConfig
from job.inference.pipeline import infer
from job.metrics.thresholds import THRESHOLDS
from job.models.ensemble import network_of
from job.postprocessing.stored import POSTPROCESSING_NAME, FittedPostprocessing
from job.reporting.html_report import render
from job.runs.loading import find_checkpoint, load_model, open_run
from tests.job.test_infer import mask_of
from tests.job.test_shared_evaluation import in_both

WATCH = Watch(shown=False, should_stop=lambda: False, heartbeat=no_heartbeat)


@dataclass(frozen=True)
class Fitted:
    """A fit of a network that finds too few pixels, on the twelve training cases."""

    dataset: Dataset
    evaluator: Evaluator
    found: FittedPostprocessing
    num_predicted: int


@pytest.fixture(scope="module")
def fitted(trained_run: Path) -> Fitted:
    run = open_run(str(trained_run))
    dataset = dataset_of(run, None)
    # Four validation cases are too few for an interval: fit on the twelve of training.
    many = replace(dataset.split("train"), name="valid")
    dataset = replace(dataset, splits={**dataset.splits, "valid": many})
    network = network_of([load_model(run, which="best")[0]])
    num_predicted = 0

    def count(images: Any) -> None:
        nonlocal num_predicted
        num_predicted += images.shape[0]

    def timid(images: tf.Tensor) -> tf.Tensor:
        tf.py_function(count, [images], [])
        return network(images) + tf.constant([3.0, -3.0])

    config = run.config.model_copy(update={"global_batch_size": 3})
    evaluator = make_evaluator(config, tf.distribute.OneDeviceStrategy("CPU:0"), dataset, timid)
    reader = open_reader(dataset, many, cache="full", cache_dir=None)
    best = find_checkpoint(run.store, which="best")
    found = fit_postprocessing(evaluator, reader, [best.prefix, best.sha256], WATCH)
    return Fitted(dataset, evaluator, found, num_predicted)


def plain_dice(truths: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> float:
    pairs = zip(truths, masks, strict=True)
    return float(np.mean([2 * np.sum(t & m) / (t.sum() + m.sum()) for t, m in pairs]))


def test_a_timid_network_gets_a_lower_threshold(
    fitted: Fitted, caplog: pytest.LogCaptureFixture
) -> None:
    assert fitted.num_predicted == 12  # each case once
    (mass,) = fitted.found.classes
    truths, shares = [], []
    reader = open_reader(
        fitted.dataset, fitted.dataset.split("valid"), cache="full", cache_dir=None
    )
    for index in range(12):
        image, truth = read_sample(reader, index)
        truths.append(truth == 1)
        shares.append(fitted.evaluator.predict(image)[..., 1])
    scores = [plain_dice(truths, [each >= limit for each in shares]) for limit in THRESHOLDS]
    assert mass.threshold.best == THRESHOLDS[int(np.argmax(scores))]
    assert mass.threshold.value == mass.threshold.best < 0.3
    assert mass.threshold.score == pytest.approx(max(scores), abs=1e-4)
    assert mass.threshold.score_before == pytest.approx(scores[THRESHOLDS.index(0.5)], abs=1e-4)
    assert mass.threshold.low is not None
    assert mass.threshold.low > 0
    assert fitted.found.num_groups == 12
    assert fitted.found.dice is not None
    assert fitted.found.dice >= max(scores) - 1e-4
    assert fitted.found.gain == pytest.approx(fitted.found.dice - (fitted.found.dice_before or 0))
    # Logits are 6 apart from those that the labels taught: less certain is more likely.
    assert fitted.found.temperature.value > 1
    caplog.set_level(logging.INFO)
    log_fit(fitted.found)
    assert caplog.messages[-1].startswith(
        f"postprocessing fitted on 12 validation images (12 groups): mass: threshold "
        f"{mass.threshold.value:g}"
    )


@dataclass
class Cases:
    """Stands for a `RankEvaluation` whose cases are already predicted."""

    cases: list[tuple[np.ndarray, np.ndarray]]
    measures: CaseMeasures
    rank: int = 0
    num_processes: int = 1

    def predicted(self, found: RankResult, watch: Watch) -> tuple[Iterator[CaseInput], int]:
        geometry = Geometry("stretch", 8, 8, 0, 0, 8, 8)
        own = range(self.rank, len(self.cases), self.num_processes)
        inputs = (CaseInput(i, geometry, None, *self.cases[i]) for i in own)
        return inputs, len(own)


@pytest.mark.parametrize("num_outputs", [1, 2, 3])
def test_processes_that_share_the_cases_fit_the_same(num_outputs: int) -> None:
    random = np.random.default_rng(num_outputs)
    num_classes = max(2, num_outputs)
    cases = []
    for _ in range(9):
        truth = random.integers(0, num_classes, (8, 8)).astype(np.uint8)
        truth[0] = 255
        logits = random.normal(0, 1, (8, 8, num_classes))
        logits[..., 0] += 1.5  # timid
        logits += 2 * np.eye(num_classes)[np.minimum(truth, num_classes - 1)]
        shares = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        cases.append((truth, shares.astype(np.float32)[..., 1 - num_outputs % 2 :][..., :]))
    if num_outputs == 1:
        cases = [(truth, shares[..., -1:]) for truth, shares in cases]
    elif num_outputs == 2:
        cases = [(truth, np.concatenate([1 - s[..., -1:], s[..., -1:]], -1)) for truth, s in cases]
    names = [f"class-{index}" for index in range(1, num_classes)]
    groups = [str(index) for index in range(9)]

    def fit_in(group: ProcessGroup) -> Any:
        own: Any = Cases(cases, CaseMeasures(num_classes, 255), group.rank, group.size)
        with CaseFile() as file:
            of_group = _ValidationCases(own, group, WATCH, file)
            likelihoods = of_group.predict()
            return np.array(likelihoods), _fit_classes(of_group, names, groups)

    alone = fit_in(ProcessGroup(tf.distribute.OneDeviceStrategy("CPU:0")))
    for likelihoods, (classes, before, after) in in_both(fit_in):
        assert np.array_equal(likelihoods, alone[0])
        assert classes == alone[1][0]
        for pair, expected in ((before, alone[1][1]), (after, alone[1][2])):
            assert all(np.array_equal(a, b) for a, b in zip(pair, expected, strict=True))
    assert alone[1][0][0].threshold.value < 0.5


def test_evaluate_and_infer_use_the_fit_of_the_run(
    fitted: Fitted, own_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    device = tf.distribute.OneDeviceStrategy("CPU:0")
    run = open_run(str(own_run))

    plain = json.loads((own_run / "evaluation" / "summary.json").read_text())  # as training left it
    assert "prediction" not in plain
    assert "without_postprocessing" not in plain
    (own_run / POSTPROCESSING_NAME).write_text(fitted.found.text())
    config = EvaluateConfig(progress=False)
    evaluation, url = evaluate_run(run, dataset_of(run, None), device, config)
    summary, folder = evaluation.summary, Path(url)
    value = fitted.found.classes[0].threshold.value
    used = summary["prediction"]["postprocessing"]
    assert (used["thresholds"], used["not_used"]) == ([value], None)
    assert used["fitted_on"]["num_cases"] == 12
    names = ("foreground_mean", "foreground_pooled", "classes", "pixel_accuracy")
    assert {n: summary["without_postprocessing"][n] for n in names} == {n: plain[n] for n in names}
    assert summary["foreground_mean"] != plain["foreground_mean"]
    # The thresholds table is of the probabilities: the row of the fitted value is what is used.
    rows = list(csv.DictReader((folder / "thresholds.csv").read_text().splitlines()))
    row = next(each for each in rows if float(each["threshold"]) == value)
    assert float(row["dice_mean"]) == pytest.approx(summary["foreground_mean"]["dice"], abs=1e-9)
    calibration = summary["calibration"]
    assert calibration["temperature"] == fitted.found.temperature.value
    before = plain["calibration"]["classes"][0]["ece"]
    assert calibration["classes"][0]["ece"] == pytest.approx(before, abs=1e-6)
    assert calibration["classes"][0]["ece_with_temperature"] != before
    bins = list(csv.DictReader((folder / "calibration.csv").read_text().splitlines()))
    assert sum(int(each["pixels"]) for each in bins) == 4 * 4 * 32 * 32

    page = render(open_store(str(own_run)))
    assert "Postprocessing was fitted on 12 images of the valid split" in page
    assert f"ECE with temperature {fitted.found.temperature.value:.3g}" in page
    # A class and the top class, without and with temperature; then Dice over thresholds, mean and
    # pooled, and lesions found.
    assert page.count("<polyline") == 4 + 3

    images, source = tmp_path / "masks", own_run.parents[1] / "images"
    source.mkdir()
    # Not of the dataset: any image will do.
    image = np.random.default_rng(0).integers(20, 200, (32, 32)).astype(np.uint8)
    tf.io.write_file(str(source / "a.png"), tf.io.encode_png(image[..., None]))
    caplog.clear()
    quiet = {"overlays": False, "progress": False, "batch_size": 1}
    infer(str(own_run), str(source), str(images), InferConfig(**quiet, probabilities="float32"))
    assert any(f"threshold {value:g}" in text for text in caplog.messages)
    record = json.loads((images / "inference.json").read_text())
    assert record["threshold"] == [value]
    assert record["temperature"] == fitted.found.temperature.value
    options = InferConfig(**quiet, probabilities="float32", threshold=(0.5,), min_region=(0,),
                          temperature=1.0)  # fmt: skip
    infer(str(own_run), str(source), str(tmp_path / "plain-masks"), options)
    shares = np.load(tmp_path / "plain-masks" / "probabilities" / "a.npy")
    assert np.array_equal(mask_of(tmp_path / "plain-masks", "a.png"), shares.argmax(axis=-1))
    assert np.array_equal(mask_of(images, "a.png"), shares[..., 1] >= np.float32(value))
    assert "threshold" not in json.loads((tmp_path / "plain-masks/inference.json").read_text())
