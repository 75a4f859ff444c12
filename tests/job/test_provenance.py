"""Weights to start from: which were trained on what a run is evaluated on, and who refuses them."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from data_prep.config import PrepConfig
from data_prep.pipeline import prepare
from data_prep.sources.pairs import find_sources
from flexunet.errors import UsageError
from flexunet.storage import open_store
from job.config import TrainConfig
from job.data.dataset import Dataset, open_dataset
from job.data.folds import fold_of
from job.runs.provenance import (
    check_no_leakage,
    check_origin,
    find_origin,
    origin_json,
    read_origin,
)
from job.training.cross_validation import cross_validate
from tests import commands
from tests.job.discs import write_discs

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def dataset(trained_run: Path) -> Dataset:
    return open_dataset(str(trained_run.parents[1] / "dataset"))


def config_of(tmp_path: Path, source: Path | str, **values: object) -> TrainConfig:
    model = {"num_layers": 2, "base_filters": 8, "base_kernels": (5, 5)}  # of `trained_run`
    given = {"name": "new", "output": str(tmp_path / "new-runs"), "model": model}
    return TrainConfig.model_validate(given | {"init_from": str(source)} | values)


def prepared(source: Path, output: Path, **options: object) -> Dataset:
    values = {"fractions": (0.6, 0.2, 0.2), "num_processes": 1} | options
    config = PrepConfig.model_validate(values)
    prepare(find_sources(str(source)), str(output), config, progress=False)
    return open_dataset(str(output))


def seen(config: TrainConfig, dataset: Dataset, evaluated: str = "test") -> str:
    origin = find_origin(config, dataset)
    assert origin is not None
    assert (origin.run, origin.source) == ("new", config.init_from)
    return origin.seen(dataset, evaluated)


def keep_origin(run: Path, source: Path | str, dataset: Dataset, **values: object) -> None:
    """Lets `run` have started from `source`, as training keeps it."""
    changed(run, init_from=str(source), **values)
    config = TrainConfig.model_validate(yaml.safe_load((run / "config.yaml").read_text()))
    origin = find_origin(config, dataset)
    assert origin is not None
    (run / "origin.json").write_text(origin_json(origin))


def changed(run: Path, **values: object) -> None:
    """Changes the config that a run has stored."""
    path = run / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))


def test_weights_of_the_same_splits_are_no_leak(
    trained_run: Path, dataset: Dataset, tmp_path: Path
) -> None:
    config = config_of(tmp_path, trained_run)
    check_no_leakage(config, dataset)
    assert find_origin(config.model_copy(update={"init_from": None}), dataset) is None
    assert [seen(config, dataset, split) for split in ("test", "valid")] == ["no", "yes"]


def test_a_fold_is_refused_weights_that_have_seen_it(
    trained_run: Path, own_run: Path, dataset: Dataset, tmp_path: Path
) -> None:
    for fold in range(3):
        config = config_of(tmp_path, trained_run, folds=3, fold=fold)
        words = rf"on groups of fold {fold + 1} of 3 \(--fold {fold}\), on which"
        with pytest.raises(UsageError, match=words):
            check_no_leakage(config, fold_of(dataset, 3, fold))
    # The run of a fold: the same fold alone, as it was trained on one other and chose by the next.
    changed(own_run, folds=3, fold=1)
    for fold in range(3):
        config = config_of(tmp_path, own_run, folds=3, fold=fold)
        assert seen(config, fold_of(dataset, 3, fold)) == ("no" if fold == 1 else "yes")


def test_what_a_source_began_from_counts_too(
    trained_run: Path, own_run: Path, dataset: Dataset, tmp_path: Path
) -> None:
    config, fold = config_of(tmp_path, own_run, folds=3, fold=1), fold_of(dataset, 3, 1)
    for source, verdict in ((trained_run, "yes"), ("best_model.h5", "unknown")):
        keep_origin(own_run, source, fold, folds=3, fold=1)
        assert seen(config, fold) == verdict, source
        origin = find_origin(config, fold)
        assert origin is not None
        pool = [group for part in fold.splits.values() for group in part.groups]
        trained = (
            pool if verdict == "yes" else [g for g in pool if g not in fold.split("test").groups]
        )
        assert set(origin.groups) == set(trained)
    # It is what it was then: that its source is gone or another one by now says nothing.
    keep_origin(own_run, trained_run, fold, folds=3, fold=1)
    changed(own_run, init_from=str(tmp_path / "gone"))
    assert seen(config, fold) == "yes"
    (own_run / "origin.json").unlink()
    assert seen(config, fold) == "unknown"


def test_what_a_source_began_from_is_found_by_its_pixels(
    trained_run: Path, own_run: Path, dataset: Dataset, tmp_path: Path
) -> None:
    of_run = fold_of(dataset, 3, 1)
    keep_origin(own_run, trained_run, of_run, folds=3, fold=1)
    source = Path(dataset.url).parent / "source"
    paired = prepared(source, tmp_path / "paired", group_regex=r"([0-9])\.", image_size=32)
    origin = find_origin(config_of(tmp_path, own_run), paired)
    assert origin is not None
    # The run was trained on two folds of three, and its source on this one too.
    trained = {name for part in of_run.splits.values() for name in part.ids}
    assert set(origin.ids) == trained
    assert set(of_run.split("test").ids) & set(origin.ids)


def test_the_same_images_in_another_form_are_recognized(trained_run: Path, tmp_path: Path) -> None:
    classes = "background=0,0,0;disc=255,255,255"
    source = trained_run.parents[1] / "source"
    small = prepared(source, tmp_path / "small", image_size=16, classes=classes)
    config = config_of(tmp_path, trained_run)
    check_no_leakage(config, small)
    assert seen(config, small) == "no"
    with pytest.raises(UsageError, match="groups of fold 1 of"):
        check_no_leakage(config_of(tmp_path, trained_run, folds=3, fold=0), fold_of(small, 3, 0))


@pytest.mark.parametrize("size", [{"image_size": 32}, {"tile": 16}])
def test_the_same_images_in_other_groups_are_recognized(
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
        check_no_leakage(config, paired)
    # Ready-made, and the same splits.
    for name, split in base.splits.items():
        for kind in ("images", "masks"):
            (tmp_path / "made" / name / kind).mkdir(parents=True)
            for file in set(split.filenames):
                shutil.copy(source / kind / file, tmp_path / "made" / name / kind)
    made = prepared(tmp_path / "made", tmp_path / "again", **size)
    assert made.manifest.source_sha256 != base.manifest.source_sha256
    check_no_leakage(config, made)
    assert seen(config, made) == "no"


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
    assert "were trained on cases of the test split (16 training images of" in text
    assert "are not in this dataset, or are stored with" in text
    file = tmp_path / "best_model.h5"
    assert f"(the weight file {file} has no record of it); if" in warned(file)
    changed(own_run, data=other.url)
    assert f"(the dataset {other.url} of {own_run} was deleted or replaced" in warned(own_run)
    with pytest.raises(UsageError, match="no run here"):
        warned(tmp_path / "gone")


def test_weights_of_another_network_are_refused(
    trained_run: Path, dataset: Dataset, tmp_path: Path
) -> None:
    own = {"num_layers": 2, "base_filters": 8, "base_kernels": (5, 5)}
    check_origin(config_of(tmp_path, trained_run, model=own | {"dropout_rate": 0.5}), dataset)
    for changed_part, reported in (
        ({"base_filters": 4}, "--model.base-filters was 8, now 4"),
        ({"normalization": "group"}, "--model.normalization was none, now group"),
        ({"input_scaling": "none"}, "--model.input-scaling was unit, now none"),
    ):
        config = config_of(tmp_path, trained_run, model=own | changed_part)
        with pytest.raises(UsageError, match=f"its network differs: {reported}; give the"):
            check_origin(config, dataset)


def test_a_run_that_has_begun_needs_its_source_no_more(
    trained_run: Path, own_run: Path, dataset: Dataset, tmp_path: Path
) -> None:
    place = {"output": str(own_run.parent), "name": own_run.name, "folds": 3, "fold": 0}
    check_origin(config_of(tmp_path, tmp_path / "gone", **place), fold_of(dataset, 3, 0))
    shutil.rmtree(own_run / "checkpoints")
    with pytest.raises(UsageError, match="groups of fold 1 of"):
        check_origin(config_of(tmp_path, trained_run, **place), fold_of(dataset, 3, 0))


def test_no_fold_begins_where_one_would_leak(
    trained_run: Path, dataset: Dataset, tmp_path: Path
) -> None:
    config = config_of(tmp_path, trained_run, folds=3, data=dataset.url)

    def command(each: TrainConfig, file: str) -> list[str]:
        raise AssertionError("a fold was started")

    with pytest.raises(UsageError, match="groups of fold 1 of"):
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
    done = commands.run(*module, *options)
    assert done.returncode == 2, done.stderr
    reported = done.stderr.splitlines()[-1]
    assert "groups of fold 2 of 3 (--fold 1), on which leaks is evaluated" in reported
    assert not (tmp_path / "runs" / "leaks" / "checkpoints").exists()


def test_groups_that_a_run_itself_trains_are_no_refusal_and_no_clean_record(
    own_run: Path, tmp_path: Path
) -> None:
    for name, numbers in {"train": (0, 1, 2), "valid": (3,), "test": (0,)}.items():
        write_discs(tmp_path / "leaky" / name, num_images=1, seed=len(name))
        for kind in ("images", "masks"):
            first = next((tmp_path / "leaky" / name / kind).iterdir())
            for number in numbers:
                shutil.copy(first, first.with_name(f"{name}-patient{number}.png"))
            first.unlink()
    options = {"group_regex": "patient([0-9])", "allow_leaks": True, "image_size": 32}
    leaky = prepared(tmp_path / "leaky", tmp_path / "prepared", **options)
    changed(own_run, data=leaky.url)
    shutil.copy(tmp_path / "prepared" / "dataset.json", own_run)
    config = config_of(tmp_path, own_run)
    check_no_leakage(config, leaky)
    assert seen(config, leaky) == "yes"


def test_a_run_keeps_what_its_weights_began_from(
    trained_run: Path, dataset: Dataset, tmp_path: Path
) -> None:
    summary = json.loads((trained_run / "evaluation" / "summary.json").read_text())
    assert summary["init_from"] == []
    shutil.copytree(trained_run, tmp_path / "source-run")
    options = ["--data", dataset.url, "--output", str(tmp_path / "runs"), "--name", "next"]
    options += [
        "--preset",
        "reference",
        "--init-from",
        "source-run",
        "--epochs",
        "1",
        "--prediction-images",
        "0",
    ]
    options += ["--model.num-layers", "2", "--model.base-filters", "8", "--no-tensorboard"]
    options += ["--model.base-kernels", "5,5", "--precision", "float32"]
    run, known = (
        tmp_path / "runs" / "next",
        [{"run": "next", "source": str(tmp_path / "source-run"), "seen": "no"}],
    )

    def call(*command: str) -> None:
        done = commands.run(*command, folder=tmp_path)
        assert done.returncode == 0, done.stderr

    call("job.train", "--local", *options)
    summary = json.loads((run / "evaluation" / "summary.json").read_text())
    assert summary["init_from"] == known
    origin = read_origin(open_store(str(run)), config_of(tmp_path, tmp_path / "source-run"))
    assert origin is not None
    assert set(origin.ids) == set(dataset.split("train").ids) | set(dataset.split("valid").ids)
    # What is there by now, under the name of the source, is not asked.
    shutil.rmtree(tmp_path / "source-run")
    call("job.evaluate", str(run), "--no-progress")
    summary = json.loads((run / "evaluation" / "summary.json").read_text())
    assert summary["init_from"] == known
