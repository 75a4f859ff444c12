"""Keyword arguments of the Python API become settings; unknown ones are answered with the right."""

from pathlib import Path
from typing import Any

import pytest

from data_prep.config import PrepConfig
from flexunet.errors import UsageError
from flexunet.settings import Settings, option
from job.api.keywords import keyword_errors, keyword_values, settings_of
from job.config import TrainConfig


class Model(Settings):
    """A group."""

    num_layers: int = option(3, "Levels.", ge=1)
    base_kernels: tuple[int, int] = option((9, 9), "Kernel, pixels.")


class Config(Settings):
    """Two levels, with names of real options."""

    epochs: int = option(10, "Epochs.", ge=1)
    data: str | None = option(None, "Dataset.", path=True)
    ensemble: tuple[str, ...] = option((), "Runs.", path=True)
    model: Model = Model()


def test_keywords_become_settings() -> None:
    options = {"epochs": 5, "data": Path("a/b"), "model": {"base_kernels": [3, 3]}}
    config = settings_of("train", Config, options)
    assert config == Config(epochs=5, data="a/b", model=Model(base_kernels=(3, 3)))
    assert settings_of("infer", Config, {"ensemble": [Path("a"), "b"]}).ensemble == ("a", "b")
    assert settings_of("train", Config, {"data": None}).data is None


def test_a_group_may_be_settings_of_which_only_what_was_set_counts() -> None:
    """The rest is as the file, the preset or the run says."""
    found = keyword_values("train", Config, {"model": Model(num_layers=4)})
    assert found == {"model": {"num_layers": 4}}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"epocs": 5}, "unknown option 'epocs'; did you mean 'epochs'?"),
        ({"max_epochs": 5}, "unknown option 'max_epochs'; did you mean 'epochs'?"),
        ({"num_layers": 5}, "did you mean model={'num_layers': ...}?"),
        ({"depth": 5}, "did you mean model={'num_layers': ...}?"),
        ({"input_dir": "a"}, "unknown option 'input_dir'; did you mean 'source'?"),
        ({"zzz": 1}, "unknown option 'zzz'; known: data, ensemble, epochs, model"),
        ({"epocs": 1, "depth": 2}, "unknown option 'epocs'; did you mean 'epochs'?; 'depth'; did"),
        ({"model": {"num_layer": 5}}, "unknown key 'model.num_layer'; did you mean 'num_layers'?"),
        ({"epochs": 0}, "flexunet.f(): epochs=0: input should be greater than or equal to 1"),
        ({"model": {"num_layers": "x"}}, "flexunet.f(): model.num_layers='x': input should be a"),
        ({"model": 5}, "flexunet.f(): model: expected a group of keys, got 5"),
    ],
)
def test_a_wrong_keyword_is_answered(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        settings_of("f", Config, options, ["source", "output"])
    assert problem in str(caught.value)
    assert str(caught.value).startswith("flexunet.f(): ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no dataset: give --data DATASET, a folder", "no dataset: give data=DATASET, a folder"),
        ("give --folds 3 or another --name", "give folds=3 or another name"),
        ("--preset recipe: remove it", "preset recipe: remove it"),
        ("--skip-bad needs a file", "skip_bad needs a file"),
        ("lower --optimizer.learning-rate", "lower optimizer={'learning_rate': ...}"),
        ("use `flexunet train --data D`", "use `flexunet train --data D`"),
        ("leave out --no-tensorboard; --other", "leave out tensorboard=False; --other"),
    ],
)
def test_errors_name_keywords_and_not_options(text: str, expected: str) -> None:
    with pytest.raises(UsageError) as caught, keyword_errors(TrainConfig, ("skip_bad",)):
        raise UsageError(text)
    assert str(caught.value) == expected


@pytest.mark.parametrize("classes", [{"background": (0, 0, 0)}, ["background"], 3])
def test_classes_that_are_no_text_get_an_example(classes: object) -> None:
    message = r'classes.*: must be a string such as "background=0,0,0;mass=255,255,255"$'
    with pytest.raises(UsageError, match=message):
        settings_of("prepare", PrepConfig, {"classes": classes}, ())
