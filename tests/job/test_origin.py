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
from tests.job.discs import write_discs

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def dataset(trained_run: Path) -> Dataset:
    return open_dataset(str(trained_run.parents[1] / "dataset"))


def config_of(tmp_path: Path, source: Path | str, **values: object) -> TrainConfig:
    output = str(tmp_path / "new-runs")
    return TrainConfig.model_validate(
        {"name": "new", "output": output, "init_from": str(source)} | values
    )


def prepared(source: Path, output: Path, **options: object) -> Dataset:
    values = {"fractions": (0.6, 0.2, 0.2), "num_processes": 1} | options
    config = PrepConfig.model_validate(values)
    prepare(find_sources(str(source)), str(output), config, progress=False)
    return open_dataset(str(output))


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
        with pytest.raises(UsageError, match=f"on groups of fold {fold} .of 0 to 2., on which"):
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
    classes = "background=0,0,0;disc=255,255,255"
    source = trained_run.parents[1] / "source"
    small = prepared(source, tmp_path / "small", image_size=16, classes=classes)
    config = config_of(tmp_path, trained_run)
    assert refuse_seen(config, small) == Origin("new", str(trained_run), "no")
    with pytest.raises(UsageError, match="groups of fold 0"):
        refuse_seen(config_of(tmp_path, trained_run, folds=3, fold=0), fold_of(small, 3, 0))


@pytest.mark.parametrize("size", [{"image_size": 32}, {"tile": 16}])
def test_the_same_pictures_in_other_groups_are_recognized(
    own_run: Path, dataset: Dataset, tmp_path: Path, size: dict[str, int]
) -> None:
    source = Path(dataset.url).parent / "source"
    base = prepared(source, tmp_path / "base", **size)
    changed(own_run, data=base.url)
    shutil.copy(tmp_path / "base" / "dataset.json", own_run)
    config = config_of(tmp_path, own_run)
    # Groups of two pictures: of the 4 that are tested, some were trained on.
    paired = prepared(source, tmp_path / "paired", group_regex=r"([0-9])\.", **size)
    with pytest.raises(UsageError, match="groups of the test split, on which new is evaluated"):
        refuse_seen(config, paired)
    # Ready-made, and the same splits.
    for name, split in base.splits.items():
        for kind in ("images", "masks"):
            (tmp_path / "made" / name / kind).mkdir(parents=True)
            for file in set(split.filenames):
                shutil.copy(source / kind / file, tmp_path / "made" / name / kind)
    made = prepared(tmp_path / "made", tmp_path / "again", **size)
    assert made.manifest.source_sha256 != base.manifest.source_sha256
    assert refuse_seen(config, made) == Origin("new", str(own_run), "no")


def test_weights_of_unknown_cases_are_warned_of(
    own_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_discs(tmp_path / "source", num_images=10, seed=1)
    other = prepared(tmp_path / "source", tmp_path / "other", image_size=32)

    def warned(source: Path) -> str:
        caplog.clear()
        check_origin(config_of(tmp_path, source), other)
        return caplog.text

    # 12 of train and 4 of valid.
    text = warned(own_run)
    assert "were trained on cases of the test split is not known (of the 16 pictures of" in text
    assert "that it was trained on, 16 are not in this dataset, or stored in" in text
    file = tmp_path / "best_model.h5"
    assert f"is not known (a file of weights, {file}, does not say it); if" in warned(file)
    changed(own_run, data=other.url)
    assert f"(the dataset {other.url} of {own_run} is gone, or another one" in warned(own_run)
    with pytest.raises(UsageError, match="no run here"):
        warned(tmp_path / "gone")


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
    told = done.stderr.splitlines()[-1]
    assert "groups of fold 1 (of 0 to 2), on which leaks is evaluated" in told
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
