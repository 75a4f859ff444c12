"""The options of a run: command line over file over the run as it was begun, and its name."""

from pathlib import Path
from typing import Any

import pytest

from flexunet.errors import (
    ContentError,
    UsageError,
)
from flexunet.settings import fields_of, parse_settings, write_yaml
from job.config import TrainConfig, identity_of
from job.planning.options import resolve_config, run_name
from job.runs.run import Run
from tests.job.test_ini_mapping import MINIMAL


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("data: some/where\nepochs: 7\nmodel:\n  num_layers: 4\n  base_filters: 8\n")
    config = resolve_config({"epochs": 9, "model": {"num_layers": 5}}, str(path))
    assert (config.epochs, config.model.num_layers, config.model.base_filters) == (9, 5, 8)
    assert config.name == "where"


def test_a_preset_is_refused_where_the_file_would_win_over_it(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("data: d\nloss:\n  name: dice\nmodel:\n  num_layers: 4\n")
    recipe = {"preset": "recipe"}
    with pytest.raises(
        UsageError, match=r"--preset recipe: .* would override it, since it sets loss.name; "
    ):
        resolve_config(recipe, str(path))
    again = resolve_config(recipe | {"loss": {"name": "dice"}}, str(path))
    assert (again.loss.name, again.model.normalization) == ("dice", "group")
    # A file may set them over its own preset; the same one again changes nothing.
    path.write_text("preset: recipe\n" + path.read_text())
    for options in ({}, recipe):
        config = resolve_config(options, str(path))
        assert (config.loss.name, config.model.normalization) == ("dice", "group")
    with pytest.raises(UsageError, match=r"--preset reference: .* would override it"):
        resolve_config({"preset": "reference"}, str(path))


def test_a_preset_is_refused_beside_a_run_of_another(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(write_yaml(TrainConfig(data="d")))
    with pytest.raises(UsageError, match=r"sets foreground_share, loss.name, .*optimizer.name"):
        resolve_config({"preset": "recipe"}, str(path))


def test_an_unknown_key_of_the_file_is_named_with_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("data: d\nmodel:\n  num_layer: 4\n")
    with pytest.raises(UsageError, match=r"unknown key 'model.num_layer'; did you mean"):
        resolve_config({}, str(path))


def test_a_file_cannot_run_code(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"data: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n")
    with pytest.raises(UsageError, match="not valid YAML"):
        resolve_config({}, str(path))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("gs://bucket/INbreast_512/", "inbreast-512"),
        ("512", "run-512"),
        ("x" * 60, "x" * 47),
    ],
)
def test_run_name_comes_from_the_dataset(url: str, name: str) -> None:
    assert run_name(url) == name


def begin_run(output: Path, name: str, config: TrainConfig) -> None:
    """Leaves what a run has when its first process has just begun."""
    with Run.open(str(output), name) as run:
        run.check_identity(identity_of(config), "d" * 64)
        run.put_text("config.yaml", write_yaml(config))


BEGUN: dict[str, Any] = {
    "preset": "recipe", "random_streams": 1, "precision": "float32", "epochs": 50,
    "global_batch_size": 8, "accumulate": 8, "model": {"num_layers": 5},
}  # fmt: skip


def test_a_run_goes_on_as_it_was_begun_where_the_command_says_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = {"data": "gs://b/data", "output": str(tmp_path), "name": "run"}
    begun = parse_settings(TrainConfig, place | BEGUN, "test")
    begin_run(tmp_path, "run", begun)
    caplog.set_level("INFO")
    # Its precision is what `auto` finds.
    expected = begun.model_copy(update={"precision": "auto"})
    assert resolve_config(place, None) == expected
    assert "run keeps the options of its first start: " in caplog.text
    for reported in ("--model.num-layers 5", "--random-streams 1", "--optimizer.clipvalue null"):
        assert reported in caplog.text
    # By its name alone, and one thing at a time, whatever does not go with today's defaults.
    del place["data"]
    assert resolve_config(place, None) == expected
    assert resolve_config(place | {"accumulate": 4}, None).accumulate == 4
    assert resolve_config(place | {"schedule": {"cosine": True}}, None) == expected
    assert resolve_config(place | {"epochs": 70}, None).epochs == 70
    # The command that began it says nothing new, and one that says something else is refused later.
    caplog.clear()
    assert identity_of(resolve_config(place | BEGUN, None)) == identity_of(begun)
    assert caplog.text == ""
    other = resolve_config(place | {"preset": "reference", "seed": 5}, None)
    assert (other.seed, other.model.num_layers, other.model.normalization) == (5, 5, "none")


def test_every_part_of_an_identity_is_kept(tmp_path: Path) -> None:
    """Each field alone, with another value than the default, as where it was the only option."""
    base = TrainConfig(data="gs://b/data", output=str(tmp_path), name="run")
    others = {"categorical_crossentropy": "dice", "adam": "adamw", "none": "group"}
    for number, (path, _) in enumerate(fields_of(TrainConfig)):
        name = ".".join(path)
        if name not in identity_of(base, is_whole=True) or name in ("precision", "fold", "folds"):
            continue
        value = changed(identity_of(base, is_whole=True)[name], others)
        nested: Any = value
        for part in reversed(path):
            nested = {part: nested}
        options = {"data": "gs://b/data", "output": str(tmp_path), "name": f"run-{number}"}
        try:
            begun = parse_settings(TrainConfig, options | nested, "test")
        except UsageError:
            continue  # no such value: some other test has it
        begin_run(tmp_path, f"run-{number}", begun)
        found = resolve_config(options, None)
        assert identity_of(found, is_whole=True)[name] == value, name
        assert identity_of(found) == identity_of(begun), name


def changed(value: Any, others: dict[str, str]) -> Any:
    """Returns another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1 if isinstance(value, int) else value / 2 + 0.01
    if isinstance(value, list) and value and not isinstance(value[0], str):
        return [each + 2 if isinstance(each, int) else each for each in value]
    return others.get(value, value) if isinstance(value, str) else value


def test_a_single_fold_goes_on_by_its_own_name(tmp_path: Path) -> None:
    place = {"data": "gs://b/data", "output": str(tmp_path)}
    begun = parse_settings(
        TrainConfig, place | {"name": "cv-fold-1", "folds": 3, "fold": 1, "seed": 7}, "test"
    )
    begin_run(tmp_path, "cv-fold-1", begun)
    assert resolve_config(place | {"name": "cv-fold-1"}, None) == begun
    both = resolve_config(place | {"name": "cv-fold-1", "folds": 3, "fold": 1}, None)
    assert both == begun


def test_folds_go_on_as_the_first_of_them_that_was_begun(tmp_path: Path) -> None:
    options = {"data": "gs://b/data", "output": str(tmp_path), "name": "cv", "folds": 3}
    begun = parse_settings(
        TrainConfig, options | {"fold": 1, "seed": 7, "random_streams": 1}, "test"
    )
    begin_run(tmp_path, "cv-fold-1", begun)
    found = resolve_config(options, None)
    assert (found.name, found.seed, found.random_streams) == ("cv", 7, 1)
    assert (found.folds, found.fold) == (3, None)


def test_a_new_run_takes_the_defaults_of_today(tmp_path: Path) -> None:
    options = {"data": "gs://b/data", "output": str(tmp_path), "name": "new"}
    assert resolve_config(options, None).random_streams == 3
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "config",
    ["[]", '"x"', "3", '{"model": 3, "model.num_layers": 4}', '{"model.of_later": 1}',
     '{"random_streams": 9}'],
)  # fmt: skip
def test_an_identity_that_cannot_be_read_is_named(config: str, tmp_path: Path) -> None:
    place = {"data": "gs://b/data", "output": str(tmp_path), "name": "run"}
    (tmp_path / "run").mkdir()
    text = f'{{"config": {config}, "dataset_digest": "d"}}'
    (tmp_path / "run" / "identity.json").write_text(text)
    with pytest.raises(ContentError, match=r"/run: this version cannot read identity\.json and"):
        resolve_config(place, None)


def test_a_run_and_a_cross_validation_never_share_a_folder(tmp_path: Path) -> None:
    place = {"output": str(tmp_path), "data": "gs://b/data"}
    fold = parse_settings(TrainConfig, place | {"name": "cv-fold-0", "folds": 4, "fold": 0}, "test")
    begin_run(tmp_path, "cv-fold-0", fold)
    for options in (place, {"output": str(tmp_path)}):
        with pytest.raises(
            UsageError, match=r"/cv is a cross-validation; give --folds 4 to resume"
        ):
            resolve_config(options | {"name": "cv"}, None)
    (tmp_path / "pooled").mkdir()
    (tmp_path / "pooled" / "cross_validation.json").write_text("{}")
    with pytest.raises(UsageError, match="is a cross-validation; give --folds N"):
        resolve_config(place | {"name": "pooled"}, None)
    begin_run(tmp_path, "plain", parse_settings(TrainConfig, place | {"name": "plain"}, "test"))
    with pytest.raises(UsageError, match="/plain is a single run, not a cross-validation"):
        resolve_config(place | {"name": "plain", "folds": 3}, None)
    assert resolve_config(place | {"name": "plain"}, None).name == "plain"
    assert resolve_config(place | {"name": "cv", "folds": 4}, None).folds == 4


@pytest.mark.parametrize("progress", [True, False])
def test_the_notes_on_a_reference_config_are_not_shown_without_progress(
    progress: bool, discs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.config"
    file.write_text(MINIMAL)
    options = {"progress": progress, "data": discs, "output": str(tmp_path / "runs")}
    resolve_config(options, str(file), function="flexunet.train()")
    assert bool(capsys.readouterr().err) == progress
