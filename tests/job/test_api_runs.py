"""What `flexunet.Run` and its tables return for datasets and files that have changed."""

import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import pytest

import flexunet
from flexunet.tables import csv_table
from job.api import prediction
from job.config import TrainConfig
from job.data.folds import fold_of
from job.inference.prediction import Predictor, load_predictor
from job.models.flips import Flips
from job.runs import loading
from job.runs.loading import EnsembleMember
from tests.job.discs import prepare_discs


@pytest.fixture
def dataset_url(trained_run: Path) -> str:
    return str(trained_run.parents[1] / "dataset")


def with_options(run: Path, **options: object) -> flexunet.Run:
    """Returns the run with other stored options."""
    found = loading.open_run(str(run))
    values = found.config.model_dump() | options
    return flexunet.Run(
        loading.TrainedRun(
            found.store, TrainConfig.model_validate(values), found.manifest, found.dataset_digest
        )
    )


def test_the_dataset_of_a_fold_has_the_splits_of_the_fold(
    trained_run: Path, dataset_url: str
) -> None:
    dataset = with_options(trained_run, folds=4, fold=1).open_dataset()
    expected = fold_of(flexunet.open_dataset(dataset_url)._dataset, 4, 1).splits
    assert dataset.splits == {name: len(split) for name, split in expected.items()}
    assert "fold 2 of 4" in repr(dataset)
    table = dataset.samples
    for name, split in expected.items():
        assert set(table.index[table["split"] == name]) == set(split.ids)
    assert len(table) == sum(dataset.splits.values()) == 16
    image, _ = next(iter(dataset.as_tf_dataset("test")))
    assert (image == dataset.read(expected["test"].ids[0]).image).numpy().all()


def test_another_dataset_in_the_place_of_that_of_the_run_is_refused(
    trained_run: Path, tmp_path: Path
) -> None:
    other = prepare_discs(tmp_path, num_images=16)
    with pytest.raises(flexunet.UsageError, match=r"not the dataset of this run .*open_dataset"):
        with_options(trained_run, data=other).open_dataset()


def test_the_tables_have_names_as_written_and_numbers_as_numbers(own_run: Path) -> None:
    run = flexunet.open_run(own_run)
    names = ["-a", "NA", "null", "None", "'b", "007"]
    rows = [(name, f"{name}.png", name, None if name == "NA" else 0.5, 3) for name in names]
    columns = ["id", "filename", "group", "dice_mass", "tp_px_mass"]
    (own_run / "evaluation" / "per_case.csv").write_text(csv_table(columns, rows))
    assert run.summary is not None
    cases = run.summary.cases
    assert list(cases.index) == list(cases["group"]) == names
    assert list(cases["filename"]) == [f"{name}.png" for name in names]
    assert math.isnan(cases.loc["NA", "dice_mass"])
    assert cases["dice_mass"].count() == 5
    assert cases["tp_px_mass"].dtype == int
    (own_run / "metrics" / "history.csv").write_text("epoch,loss\n0,0.5\n1,\n")
    assert run.history["loss"].count() == 1
    (own_run / "metrics" / "history.csv").unlink()
    assert list(run.history.index) == []
    assert run.history.index.name == "epoch"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("evaluation/per_case.csv", "id,group,dice_mass\na,b,0.5\nc"),
        ("evaluation/per_case.csv", "id,group,dice_mass\na,b,0.5x\n"),
        ("evaluation/per_case.csv", None),
        ("evaluation/per_case.csv", 'id,group\n"a'),
        ("metrics/history.csv", "epoch,loss\n0,0.5\nx,\n"),
        ("metrics/history.csv", "loss\n0.5\n"),
        ("metrics/history.csv", "epoch,loss\n0\n1,0.5\n"),
    ],
)
def test_a_damaged_table_is_a_content_error_with_a_remedy(
    file: str, text: str | None, own_run: Path
) -> None:
    run = flexunet.open_run(own_run)
    assert run.summary is not None
    (own_run / file).unlink()
    if text is not None:
        (own_run / file).write_text(text)
    with pytest.raises(flexunet.ContentError, match=rf"{file}: .*; .*(restore|evaluate)"):
        _ = run.summary.cases if "case" in file else run.history


def test_weights_are_loaded_again_only_for_other_weights(
    own_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[tuple[list[str], str]] = []

    def load(members: Sequence[EnsembleMember], flips: Flips, *, needs_gpu: bool) -> Predictor:
        loads.append(([member.checkpoint for member in members], flips))
        return load_predictor(members, flips, needs_gpu=needs_gpu)

    monkeypatch.setattr(prediction, "load_predictor", load)
    image = np.zeros((20, 30), np.uint8)
    run = flexunet.open_run(own_run)
    newest, kept = sorted((own_run / "checkpoints").glob("step-*/a*"))[-1], own_run / "kept"
    shutil.move(newest, kept)  # as before the end of the last epoch
    for options in ({}, {"max_pixels": 10_000}, {"full_scale": 4095}, {"batch_size": 2}):
        run.predict(image, checkpoint="last", **options)
    assert len(loads) == 1
    shutil.move(kept, newest)
    run.predict(image, checkpoint="last")
    assert [name for (name,), _ in loads][1] == str(newest.relative_to(own_run))
    run.predict(image, checkpoint="last", flips="both")
    assert [flips for _, flips in loads] == ["none", "none", "both"]


def test_a_folder_gets_the_warnings_of_infer_once(
    trained_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    colors = np.random.default_rng(1).integers(0, 255, (32, 40, 3)).astype(np.uint8)
    for name in ("a.png", "b.png"):
        cv2.imwrite(str(tmp_path / name), colors)
    run = flexunet.open_run(trained_run)
    tensorflow = logging.getLogger("tensorflow")
    before = tensorflow.level
    for _ in range(2):
        for _ in run.predict(tmp_path, window="sliding"):
            assert tensorflow.level == before
    warnings = [line for line in caplog.messages if "in training" in line or "colour" in line]
    assert len(warnings) == 2
    assert "everything appears larger than in training" in warnings[0]
    assert "1 image is in colour (RGB), first a.png" in warnings[1]


def test_prepare_leaves_pillow_and_opencv_as_they_were(tmp_path: Path) -> None:
    threads, limit = cv2.getNumThreads(), PIL.Image.MAX_IMAGE_PIXELS
    cv2.setNumThreads(3)
    try:
        prepare_discs(tmp_path, num_images=16)
        assert (cv2.getNumThreads(), PIL.Image.MAX_IMAGE_PIXELS) == (3, limit)
    finally:
        cv2.setNumThreads(threads)


def test_the_repr_of_a_summary_is_short(trained_run: Path) -> None:
    summary = flexunet.open_run(trained_run).summary
    assert repr(summary).startswith("<EvaluationSummary: test, 4 images, foreground Dice 0.")
    assert len(repr(summary)) < 120
    assert repr(flexunet.EvaluationSummary({}, "runs/a")) == "<EvaluationSummary: runs/a>"
