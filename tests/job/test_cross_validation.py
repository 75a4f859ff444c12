"""Cross-validation: who is in which fold, the runs of the folds, and what is pooled of them."""

import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from data_prep.config import PrepConfig
from data_prep.pipeline import prepare
from data_prep.sources.pairs import find_sources
from flexunet.errors import ContentError, UsageError
from flexunet.storage import open_store
from flexunet.tables import plain_cell
from job.config import TrainConfig
from job.data.dataset import Dataset, open_dataset
from job.data.folds import fold_configs, fold_of
from job.data.reader import read_sample
from job.data.shard_cache import open_reader
from job.evaluation.fold_pooling import pool_folds
from job.metrics.per_case import Scale, measure_case, summarize_cases
from job.reporting.fold_tables import show_folds
from job.reporting.html_report import write_report
from job.training.cross_validation import cross_validate, separate_process
from tests import commands
from tests.job.discs import prepare_discs, write_discs

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Returns 24 discs in ten groups, by the last digit of their number."""
    folder = tmp_path_factory.mktemp("grouped")
    write_discs(folder / "source", num_images=24, side=16)
    config = PrepConfig(
        image_size=16,
        fractions=(0.5, 0.25, 0.25),
        group_regex=r"([0-9])\.png$",
        num_folds=4,
        num_processes=1,
    )
    sources = find_sources(str(folder / "source"))
    prepare(sources, str(folder / "dataset"), config, progress=False)
    return open_dataset(str(folder / "dataset"))


def members(dataset: Dataset, name: str) -> set[str]:
    return set(dataset.split(name).ids)


def test_folds_evaluate_every_case_of_train_and_valid_once(grouped: Dataset) -> None:
    pool = members(grouped, "train") | members(grouped, "valid")
    evaluated: list[str] = []
    for fold in range(4):
        folded = fold_of(grouped, 4, fold)
        parts = [members(folded, name) for name in ("train", "valid", "test")]
        assert set.union(*parts) == pool
        assert sum(len(part) for part in parts) == len(pool)
        evaluated += sorted(parts[2])
        # The next fold validates.
        assert parts[1] == members(fold_of(grouped, 4, (fold + 1) % 4), "test")
    assert sorted(evaluated) == sorted(pool)


def test_folds_keep_groups_whole_and_leave_the_test_split_out(grouped: Dataset) -> None:
    for fold in range(4):
        folded = fold_of(grouped, 4, fold)
        groups = [set(folded.split(name).groups) for name in ("train", "valid", "test")]
        assert not groups[0] & groups[1]
        assert not groups[0] & groups[2]
        assert not groups[1] & groups[2]
        assert not groups[2] & set(grouped.split("test").groups)


def test_folds_are_those_that_prep_has_written(grouped: Dataset) -> None:
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(f"{grouped.url}/samples.parquet").read()
    column = dict(zip(table["id"].to_pylist(), table["fold"].to_pylist(), strict=True))
    for fold in range(4):
        assert {column[name] for name in members(fold_of(grouped, 4, fold), "test")} == {fold}


def test_folds_read_their_samples_from_the_shards_of_both_splits(grouped: Dataset) -> None:
    most_shards = 0
    for fold in range(4):
        folded = fold_of(grouped, 4, fold)
        for split in folded.splits.values():
            most_shards = max(most_shards, len(set(split.shards)))
            reader = open_reader(folded, split, cache="full", cache_dir=None)
            for index in range(len(split)):
                image, _ = read_sample(reader, index)  # checks the record's id
                assert image.shape == (16, 16, 1)
    assert most_shards == 2


def test_folds_without_a_class_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_discs(tmp_path / "source", num_images=9, side=16)
    for path in sorted((tmp_path / "source" / "masks").iterdir())[1:]:
        assert cv2.imwrite(str(path), np.zeros((16, 16), np.uint8))
    options = PrepConfig(image_size=16, fractions=(0.5, 0.5, 0.0), num_processes=1)
    sources = find_sources(str(tmp_path / "source"))
    prepare(sources, str(tmp_path / "dataset"), options, progress=False)
    config = config_in(tmp_path, str(tmp_path / "dataset"))
    caplog.clear()
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    assert cross_validate(config, lambda *_: command, 3, lambda: False) == 3
    dataset = open_dataset(str(tmp_path / "dataset"))
    for fold in range(3):
        has_mass = bool(fold_of(dataset, 3, fold).split("test").has_foreground.any())
        assert (
            f"fold {fold + 1} of 3 (--fold {fold}) has no pixel of class foreground" in caplog.text
        ) != has_mass
    assert caplog.text.count("has no pixel of class foreground") == 2


def test_folds_need_as_many_groups(grouped: Dataset) -> None:
    with pytest.raises(UsageError, match="folds"):
        fold_of(grouped, 50, 0)


def test_config_refuses_a_fold_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give 0 to"):
        TrainConfig.model_validate({"folds": 3, "fold": 3})
    config = TrainConfig(folds=3, name="a" * 41)
    with pytest.raises(UsageError, match="is not allowed"):
        fold_configs(config)


def test_tables_of_folds_fit_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    masks = (random.random((10, 2, 64, 64)) < 0.3).astype(np.uint8)
    cases = [measure_case(*pair, 2, Scale((9.0, 9.0), "mm")) for pair in masks]
    groups = [str(index) for index in range(10)]
    for name in ("mass", "architectural distortion", "a" * 70):
        pooled = summarize_cases(cases, groups, [name])
        found = {"pooled": pooled, "folds": [pooled] * 5}
        summary = {"num_folds": 5, "sizes": {"network": found, "original": found}}
        (tmp_path / "cv").mkdir(exist_ok=True)
        (tmp_path / "cv" / "cross_validation.json").write_text(json.dumps(summary))
        show_folds(TrainConfig(output=str(tmp_path), name="cv"))
        lines = capsys.readouterr().out.splitlines()
        assert max(len(line) for line in lines if str(tmp_path) not in line) <= 80
        words = "".join(part for line in lines for part in line.split() if part not in "│┃")
        assert words.count("falsepositivesperimage") == 4 or name.startswith("aa")
        assert "…" not in words


def waiting(config: TrainConfig, file: str) -> list[str]:
    """Returns a process that ends with 6 when it is asked to, and notes that it began."""
    code = (
        "import pathlib, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(6)); "
        f"pathlib.Path({str(config.output)!r}, {str(config.name)!r}).touch(); time.sleep(60)"
    )
    return [sys.executable, "-c", code]


def config_in(tmp_path: Path, data: str) -> TrainConfig:
    (tmp_path / "out").mkdir()
    return TrainConfig(data=data, output=str(tmp_path / "out"), name="cv", folds=3)


def test_a_stop_is_passed_on_to_the_folds_that_run(tmp_path: Path) -> None:
    config = config_in(tmp_path, prepare_discs(tmp_path, num_images=10, side=16))

    def both_began() -> bool:
        return len(os.listdir(config.output)) == 2

    begin = time.monotonic()
    assert cross_validate(config, waiting, 2, both_began) == 6
    assert time.monotonic() - begin < 50  # they did not sleep to their end
    assert sorted(os.listdir(config.output)) == ["cv-fold-0", "cv-fold-1"]


def test_folds_run_no_file_of_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_in(tmp_path, prepare_discs(tmp_path, num_images=10, side=16))
    work = tmp_path / "work"
    work.mkdir()
    for name in ("job", "numpy", "launcher", "cv2", "data_prep", "flexunet"):
        (work / f"{name}.py").write_text("raise SystemExit('this file of the user was run')")
    monkeypatch.chdir(work)
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    for module in ("job.train", "launcher"):
        command = separate_process(module, "train", "--no-such-option")(config, "file.yaml")
        assert subprocess.run(command, capture_output=True, check=False).returncode == 1
        assert cross_validate(config, lambda *_, words=command: words, 1, lambda: False) == 2


def test_a_fold_that_fails_stops_the_others(tmp_path: Path) -> None:
    config = config_in(tmp_path, prepare_discs(tmp_path, num_images=10, side=16))

    def command(each: TrainConfig, file: str) -> list[str]:
        if each.fold == 1:
            return [sys.executable, "-c", "raise SystemExit(3)"]
        return waiting(each, file)

    assert cross_validate(config, command, 2, lambda: False) == 3
    assert "cv-fold-2" not in os.listdir(config.output)


@pytest.mark.cluster
def test_command_pools_what_each_fold_has_not_seen(tmp_path: Path) -> None:
    # A spreadsheet would take these names for formulas.
    write_discs(tmp_path / "source", num_images=15, side=16)
    for path in sorted((tmp_path / "source").glob("*/*.png")):
        path.rename(path.with_name(f"={path.name}"))
    data = str(tmp_path / "dataset")
    prep = PrepConfig(image_size=16, fractions=(0.6, 0.2, 0.2), num_processes=1)
    prepare(find_sources(str(tmp_path / "source")), data, prep, progress=False)
    options = ["--folds", "3", "--epochs", "2", "--data", data, "--output", str(tmp_path / "runs")]
    options += ["--name", "cv", "--no-tensorboard", "--prediction-images", "0"]
    options += ["--model.num-layers", "2", "--model.base-filters", "4", "--precision", "float32"]
    options += ["--preset", "reference"]
    done = commands.run("tests.script", "--forks", "-m", "job.train", "--local", *options)
    assert done.returncode == 0, done.stderr
    runs = tmp_path / "runs"
    tables = done.stdout + done.stderr
    for line in done.stdout.splitlines():
        assert len(line) <= 80 or str(runs) in line
    assert "…" not in done.stdout
    for fold in range(3):
        words = f"fold {fold + 1} of 3 (--fold {fold})"
        assert f"{words}: {runs}/cv-fold-{fold}" in done.stderr
        assert f"evaluating {words} with the best checkpoint" in tables
        assert f"{words}: 4 images, the best checkpoint" in " ".join(tables.split())
        page = (runs / f"cv-fold-{fold}" / "report.html").read_text()
        assert f"for 4 images of {words}, at network size" in page
    assert "test split" not in tables
    assert "all folds, original size (same as network size): 12 groups" in tables
    summary = json.loads((runs / "cv" / "cross_validation.json").read_text())
    network = summary["sizes"]["network"]
    rows = list(csv.DictReader((runs / "cv" / "measures_network.csv").read_text().splitlines()))
    dataset = open_dataset(data)
    assert {plain_cell(row["id"]) for row in rows} == members(dataset, "train") | members(
        dataset, "valid"
    )
    for fold in range(3):
        own = {plain_cell(row["id"]) for row in rows if row["fold"] == str(fold)}
        assert own == members(fold_of(dataset, 3, fold), "test")
        config = (runs / f"cv-fold-{fold}" / "config.yaml").read_text()
        assert f"fold: {fold}\n" in config
    dices = [float(row["dice_foreground"]) for row in rows]
    pooled = network["pooled"]["classes"][0]["dice_mean"]
    assert pooled["value"] == pytest.approx(np.mean(dices))
    assert pooled["low"] <= pooled["value"] <= pooled["high"]
    assert pooled["num_cases"] == len(rows) == 12
    assert [each["num_cases"] for each in network["folds"]] == [4, 4, 4]
    page = (runs / "cv" / "report.html").read_text()
    over = network["over_folds"]["classes"][0]["dice_mean"]
    values = [each["classes"][0]["dice_mean"]["value"] for each in network["folds"]]
    assert over["mean"] == pytest.approx(statistics.mean(values))
    assert over["sd"] == pytest.approx(statistics.stdev(values))
    mean = f'<td class="number">{over["mean"]:.4f}</td><td class="number">{over["sd"]:.4f}</td>'
    assert mean in page
    row = f'<td>Dice, mean over images</td><td class="number">{pooled["value"]:.4f}</td>'
    assert row in page
    for words in (
        "3 folds, taken from train and valid (12 images)",
        "no groups were given: images of one patient may be",
        "intervals draw images, not patients",
        "Trained from random weights.",
    ):
        assert words in page
    assert f"{pooled['low']:.4f} to {pooled['high']:.4f}" in page
    for fold, each in enumerate(network["folds"]):
        dice = each["classes"][0]["dice_mean"]["value"]
        assert f'<td class="number">{dice:.4f}</td>' in page
        assert f'<a href="../cv-fold-{fold}/report.html">' in page
        assert (runs / f"cv-fold-{fold}" / "report.html").exists()
    check_pools_only_what_was_evaluated_alike(runs)


def check_pools_only_what_was_evaluated_alike(runs: Path) -> None:
    values = yaml.safe_load((runs / "cv-fold-1" / "config.yaml").read_text())
    config = TrainConfig.model_validate(values | {"name": "cv", "fold": None})
    before = (runs / "cv" / "measures_network.csv").read_text()

    def evaluate(*options: str, run: str = "cv-fold-1") -> None:
        # In a process of its own, like training: TensorFlow's devices are set once for each.
        done = commands.run("job.evaluate", str(runs / run), *options)
        assert done.returncode == 0, done.stderr

    evaluate()  # as training did
    pool_folds(config)
    assert (runs / "cv" / "measures_network.csv").read_text() == before
    check_pools_only_one_postprocessing(runs, config)
    check_pools_only_the_cases_of_the_folds(runs, config, evaluate)
    evaluate()
    check_reports_what_an_earlier_version_has_not_stored(runs, config)
    evaluate("--flips", "both", "--checkpoint", "last")
    with pytest.raises(
        UsageError,
        match=r"cv-fold-1: evaluated with another checkpoint and flips \(last, both\) than "
        r".*cv-fold-0 \(best, none\); evaluate all folds in the same way",
    ):
        pool_folds(config)
    summary = runs / "cv-fold-1" / "evaluation" / "summary.json"
    for text in ("[]", '{"case": "picture"}', "[" * 100_000):
        summary.write_text(text)
        with pytest.raises(ContentError, match=r"evaluate the run again: .*cv-fold-1"):
            pool_folds(config)
    summary.unlink()
    with pytest.raises(ContentError, match=r"summary\.json is missing"):
        pool_folds(config)


def check_pools_only_one_postprocessing(runs: Path, config: TrainConfig) -> None:
    paths = [runs / f"cv-fold-{k}" / "evaluation" / "summary.json" for k in range(3)]
    texts = [path.read_text() for path in paths]
    used = {"thresholds": [0.4], "min_region": [0], "fitted_on": {"split": "valid"}}
    for path, text, given in zip(paths, texts, ([], ["thresholds"], []), strict=True):
        summary = json.loads(text)
        # Training stores no "prediction" where it fits nothing.
        summary.setdefault("prediction", {})["postprocessing"] = {**used, "given": given}
        path.write_text(json.dumps(summary))
    words = r"cv-fold-1: .* postprocessing \(fitted, but thresholds \[0\.4\]\) than .* \(fitted\)"
    with pytest.raises(UsageError, match=words):
        pool_folds(config)
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)


def check_pools_only_the_cases_of_the_folds(
    runs: Path, config: TrainConfig, evaluate: Callable[..., None]
) -> None:
    output = ("--output", str(runs / "cv-fold-1" / "evaluation"))
    # Of three folds one trains: what trained fold 2 is evaluated by fold 1, case by case.
    evaluate("--split", "train", *output, run="cv-fold-2")
    with pytest.raises(
        UsageError, match="cv-fold-1/evaluation: evaluates the train split of a run"
    ):
        pool_folds(config)
    evaluate("--ensemble", str(runs / "cv-fold-0"), *output)
    alone = runs / "cv-fold-1" / "evaluation" / "summary.json"
    summary = json.loads(alone.read_text())
    summary["prediction"]["runs"] = summary["prediction"]["runs"][:1]
    alone.write_text(json.dumps(summary))
    with pytest.raises(
        UsageError,
        match=r"3 cases that are not in fold 2 of 3 \(--fold 1\) and lacks 4 of its 4; evaluate",
    ):
        pool_folds(config)
    evaluate()
    summary = json.loads(alone.read_text())
    origin = {"run": "cv-fold-1", "source": "runs/first", "seen": "yes"}
    alone.write_text(json.dumps(summary | {"init_from": [origin]}))
    words = r"runs/first, which was trained on groups of fold 2 of 3 \(--fold 1\)"
    with pytest.raises(UsageError, match=words):
        pool_folds(config)
    del summary["init_from"]  # an earlier version
    alone.write_text(json.dumps(summary))
    assert pool_folds(config)["init_from"] == []


def check_reports_what_an_earlier_version_has_not_stored(runs: Path, config: TrainConfig) -> None:
    table = runs / "cv-fold-1" / "evaluation" / "measures_network.csv"
    text = table.read_text()
    table.write_text(text.replace("specks_foreground", "another"))
    with pytest.raises(
        ContentError,
        match=r"cv-fold-1/evaluation/measures_network\.csv: 'specks_foreground' is missing.*; "
        r"evaluate the run again: flexunet evaluate .*cv-fold-1$",
    ):
        pool_folds(config)
    table.write_text(text)
    pooled = runs / "cv" / "cross_validation.json"
    text = pooled.read_text()
    pooled.write_text(text.replace('"num_specks"', '"another"'))
    with pytest.raises(ContentError, match=r"cross_validation\.json: 'num_specks' is missing"):
        write_report(open_store(str(runs / "cv")))
    pooled.write_text(text)
