"""Weights to start from: which were trained on what a run is evaluated on, and who refuses them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_prep.errors import UsageError
from data_prep.pairs import find_sources
from data_prep.prep import PrepConfig, prepare
from job.config import TrainConfig
from job.data import Dataset, open_dataset
from job.folds import cross_validate
from job.origin import Origin, check_origin, origin_of, refuse_seen
from job.splits import fold_of
from tests.job.discs import prepare_discs

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def dataset(trained_run: Path) -> Dataset:
    return open_dataset(str(trained_run.parents[1] / "dataset"))


def config_of(tmp_path: Path, source: Path | str, **values: object) -> TrainConfig:
    output = str(tmp_path / "new-runs")
    return TrainConfig.model_validate(
        {"name": "new", "output": output, "init_from": str(source)} | values
    )


def changed(run: Path, **values: object) -> None:
    """Changes the config that a run has stored."""
    path = run / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))


def test_weights_of_the_same_splits_are_no_leak(
    trained_run: Path, dataset: Dataset, tmp_path: Path
) -> None:
    config = config_of(tmp_path, trained_run)
    assert refuse_seen(config, dataset) == Origin("new", str(trained_run), "no")
    assert origin_of(config.model_copy(update={"init_from": None}), dataset) is None
    assert origin_of(config, dataset, "valid") == Origin("new", str(trained_run), "yes")


def test_a_fold_is_refused_weights_that_have_seen_it(
    trained_run: Path, own_run: Path, dataset: Dataset, tmp_path: Path
) -> None:
    for fold in range(3):
        config = config_of(tmp_path, trained_run, folds=3, fold=fold)
        with pytest.raises(UsageError, match=rf"validation on groups of fold {fold} of 3"):
            refuse_seen(config, fold_of(dataset, 3, fold))
    # The run of a fold: the same fold alone, as it was trained on one other and chose by the next.
    changed(own_run, folds=3, fold=1)
    for fold in range(3):
        config = config_of(tmp_path, own_run, folds=3, fold=fold)
        origin = origin_of(config, fold_of(dataset, 3, fold))
        assert origin is not None
        assert origin.seen == ("no" if fold == 1 else "yes")


def test_what_a_source_began_from_counts_too(
    trained_run: Path, own_run: Path, dataset: Dataset, tmp_path: Path
) -> None:
    config = config_of(tmp_path, own_run, folds=3, fold=1)
    for source, seen in (
        (str(trained_run), "yes"),
        ("best_model.h5", "unknown"),
        (str(tmp_path / "gone"), "unknown"),
        (str(own_run), "no"),  # itself
    ):
        changed(own_run, folds=3, fold=1, init_from=source)
        origin = origin_of(config, fold_of(dataset, 3, 1))
        assert origin is not None
        assert origin.seen == seen, source


def test_the_same_pictures_in_another_form_are_recognized(
    trained_run: Path, tmp_path: Path
) -> None:
    options = PrepConfig(image_size=16, fractions=(0.6, 0.2, 0.2), num_processes=1)
    sources = find_sources(str(trained_run.parents[1] / "source"))
    prepare(sources, str(tmp_path / "small"), options, progress=False)
    small = open_dataset(str(tmp_path / "small"))
    config = config_of(tmp_path, trained_run)
    assert refuse_seen(config, small) == Origin("new", str(trained_run), "no")
    with pytest.raises(UsageError, match="groups of fold 0"):
        refuse_seen(config_of(tmp_path, trained_run, folds=3, fold=0), fold_of(small, 3, 0))


def test_weights_of_unknown_cases_are_warned_of(
    trained_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = open_dataset(prepare_discs(tmp_path, num_images=10))
    for source in (str(trained_run), str(tmp_path / "best_model.h5")):
        caplog.clear()
        check_origin(config_of(tmp_path, source), other)
        assert "which cases these weights were trained on is not known" in caplog.text
    with pytest.raises(UsageError, match="no run here"):
        check_origin(config_of(tmp_path, tmp_path / "gone"), other)


def test_a_run_that_has_begun_needs_its_source_no_more(
    trained_run: Path, own_run: Path, dataset: Dataset, tmp_path: Path
) -> None:
    place = {"output": str(own_run.parent), "name": own_run.name, "folds": 3, "fold": 0}
    check_origin(config_of(tmp_path, tmp_path / "gone", **place), fold_of(dataset, 3, 0))
    shutil.rmtree(own_run / "checkpoints")
    with pytest.raises(UsageError, match="groups of fold 0"):
        check_origin(config_of(tmp_path, trained_run, **place), fold_of(dataset, 3, 0))


def test_no_fold_begins_where_one_would_leak(
    trained_run: Path, dataset: Dataset, tmp_path: Path
) -> None:
    config = config_of(tmp_path, trained_run, folds=3, data=dataset.url)

    def command(each: TrainConfig, file: str) -> list[str]:
        raise AssertionError("a fold was started")

    with pytest.raises(UsageError, match="groups of fold 0"):
        cross_validate(config, command, 1, lambda: False)
    # Folds that are trained need a source no more that is gone; the others say so themselves.
    gone = config.model_copy(update={"init_from": str(tmp_path / "gone")})
    with pytest.raises(AssertionError, match="a fold was started"):
        cross_validate(gone, command, 1, lambda: False)


@pytest.mark.parametrize("module", [("job.train", "--local"), ("launcher", "train")])
def test_commands_refuse_weights_that_have_seen_the_cases(
    trained_run: Path, dataset: Dataset, tmp_path: Path, module: tuple[str, str]
) -> None:
    options = ["--data", dataset.url, "--output", str(tmp_path / "runs"), "--name", "leaks"]
    options += ["--init-from", str(trained_run), "--folds", "3", "--fold", "1"]
    options += ["--model.num-layers", "2"]
    command = [sys.executable, "-m", *module, *options]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "groups of fold 1 of 3, on which leaks is evaluated" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "runs" / "leaks" / "checkpoints").exists()


def test_an_evaluation_records_what_its_weights_began_from(
    trained_run: Path, own_run: Path, tmp_path: Path
) -> None:
    summary = json.loads((trained_run / "evaluation" / "summary.json").read_text())
    assert summary["init_from"] == []
    changed(own_run, init_from=str(trained_run))
    command = [sys.executable, "-m", "job.evaluate", str(own_run), "--no-progress"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads((own_run / "evaluation" / "summary.json").read_text())
    assert summary["init_from"] == [{"run": "discs", "source": str(trained_run), "seen": "no"}]
