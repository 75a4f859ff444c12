"""The folds of a cross-validation as one ensemble by one name, and their spread."""

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import flexunet
from flexunet.errors import UsageError
from job.evaluation.pipeline import EvaluateConfig, evaluate
from job.infer import main
from job.inference.options import InferConfig
from job.inference.pipeline import infer
from job.metrics.fold_spread import spread, spread_of_folds
from job.runs.status import member_urls
from tests.job.test_infer import mask_of, write_same


@pytest.fixture
def folds(trained_run: Path, tmp_path: Path) -> Path:
    """Returns the folder of a cross-validation of three folds, all with the weights of one run."""
    for fold in range(3):
        run = tmp_path / "runs" / f"cv-fold-{fold}"
        shutil.copytree(trained_run, run)
        path = run / "config.yaml"
        text = path.read_text().replace("folds: null", "folds: 3")
        path.write_text(text.replace("fold: null", f"fold: {fold}"))
    return tmp_path / "runs" / "cv"


def test_a_run_is_itself_and_a_cross_validation_its_folds(folds: Path) -> None:
    runs = [f"{folds}-fold-{fold}" for fold in range(3)]
    assert member_urls(runs[1]) == (runs[1],)
    assert member_urls(str(folds)) == tuple(runs)
    assert member_urls(f"{folds}-other") == (f"{folds}-other",)


def test_an_unfinished_fold_is_named(folds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (Path(f"{folds}-fold-1") / "outcome.json").unlink()
    shutil.rmtree(f"{folds}-fold-2")
    words = (
        f"{folds}: a cross-validation of 3 folds, of which fold 2 of 3 (--fold 1) is not finished; "
        "fold 3 of 3 (--fold 2) has not started; the same train command with --folds trains the "
        "rest"
    )
    with pytest.raises(UsageError) as error:
        flexunet.open_run(folds)
    assert str(error.value) == words
    assert main([str(folds), str(folds.parent), str(folds.parent / "masks")]) == 2
    assert words in capsys.readouterr().err


def test_folds_predict_and_are_evaluated_together(
    folds: Path, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_same(tmp_path / "images", 2)
    options = InferConfig(overlays=False, progress=False, batch_size=2)
    result = infer(str(folds), str(tmp_path / "images"), None, options)
    assert result.output_url == f"{folds}/inference"
    record = json.loads((folds / "inference" / "inference.json").read_text())
    members = [record["run"], *(each.partition("/checkpoints")[0] for each in record["ensemble"])]
    assert members == [f"{folds}-fold-{fold}" for fold in range(3)]

    run = flexunet.open_run(folds)
    assert (run.url, run.status, run.summary) == (str(folds), "finished", None)
    assert run.runs == tuple(members)
    assert (run.config.name, run.config.folds, run.config.fold) == ("cv", 3, None)
    image = tmp_path / "images" / "image-000.png"
    found = run.predict(image, probabilities=True)
    assert np.array_equal(found.mask, mask_of(folds / "inference", "image-000.png"))
    pixels = tf.io.decode_png(image.read_bytes()).numpy()
    assert run.load_model()(pixels[None]).numpy()[0] == pytest.approx(found.probabilities, abs=1e-6)
    with pytest.raises(UsageError, match=r"its own history; open one .*cv-fold-0'\)"):
        _ = run.history

    device = tf.distribute.OneDeviceStrategy("CPU:0")
    monkeypatch.setattr("job.distributed.strategy.configure", lambda *_: device)
    for split in ("train", "valid"):
        with pytest.raises(UsageError, match=r"trained on each other's images; only the test"):
            evaluate(str(folds), EvaluateConfig(split=split, progress=False))
    _, url = evaluate(str(folds), EvaluateConfig(progress=False))
    assert url == f"{folds}/evaluation"
    assert run.summary is not None
    assert run.summary["num_cases"] == 4
    assert len(run.summary["prediction"]["runs"]) == 3
    theirs = json.loads((trained_run / "evaluation" / "summary.json").read_text())
    assert run.summary["foreground_mean"] == pytest.approx(theirs["foreground_mean"])


def fold_of_values(dice: float | None, **others: Any) -> dict[str, Any]:
    measures = {"dice_mean": {"value": dice}, **{k: {"value": v} for k, v in others.items()}}
    return {
        "foreground": measures,
        "classes": [{"id": 1, "name": "mass", "num_missed": 3} | measures],
    }


def test_spread_is_that_of_the_folds_that_have_a_value() -> None:
    found = spread_of_folds(
        [fold_of_values(0.5), fold_of_values(0.7), fold_of_values(0.9, nsd_mm=1)]
    )
    dice = found["classes"][0]["dice_mean"]
    assert dice == {"mean": pytest.approx(0.7), "sd": pytest.approx(0.2), "num_folds": 3}
    assert dice["sd"] == pytest.approx(statistics.stdev([0.5, 0.7, 0.9]))
    assert found["foreground"]["nsd_mm"] == {"mean": 1, "sd": None, "num_folds": 1}
    assert set(found["classes"][0]) == {"id", "name", "dice_mean", "nsd_mm"}
    assert spread([None, 0.4]) == {"mean": 0.4, "sd": None, "num_folds": 1}
    assert spread([None]) == {"mean": None, "sd": None, "num_folds": 0}
