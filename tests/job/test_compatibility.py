"""Networks and datasets that do not go together."""

from dataclasses import replace
from pathlib import Path

import pytest

from flexunet.errors import UsageError
from flexunet.settings import parse_settings
from job.config import ModelConfig, TrainConfig
from job.data.dataset import Dataset, open_dataset
from job.models.compatibility import check_compatible, image_shape, num_outputs, window_overlap
from job.runs.loading import open_run
from job.train import main
from tests.job.discs import prepare_discs


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Grey pictures of 32x32, of two classes."""
    return open_dataset(prepare_discs(tmp_path_factory.mktemp("discs")))


def config(**model: int | str) -> TrainConfig:
    return TrainConfig(model=ModelConfig.model_validate({"num_layers": 3} | model))


def test_heads_of_one_output_per_class_or_a_sigmoid_fit(dataset: Dataset) -> None:
    for wanted, outputs in ((None, 2), (2, 2), (1, 1)):
        fitting = config() if wanted is None else config(num_classes=wanted)
        check_compatible(fitting, dataset)
        assert num_outputs(fitting, dataset.manifest) == outputs


def test_grey_images_fit_a_network_for_colour(dataset: Dataset) -> None:
    assert image_shape(config(image_channels=3), dataset.manifest) == (32, 32, 3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "flexnet"}, "--model.name='flexnet': no such model; did you mean 'flexunet'"),
        ({"num_classes": 3}, "--model.num-classes=3: the dataset has 2 classes"),
        ({"num_layers": 7}, "--model.num-layers=7 needs image sides divisible by 64, got 32x32"),
        (
            {"num_layers": 6, "normalization": "instance"},
            "--model.normalization=instance: level 6 of images of 32x32 is one pixel",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    dataset: Dataset, wrong: dict[str, int | str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        check_compatible(config(**wrong), dataset)


def test_a_model_that_does_not_exist_leaves_the_name_of_the_run_free(
    dataset: Dataset, tmp_path: Path
) -> None:
    wrong = ["--local", "--data", dataset.url, "--output", str(tmp_path), "--name", "a"]
    assert main([*wrong, "--model.num-layers", "3", "--model.name", "flexnet"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_class_weights_must_be_one_per_class(dataset: Dataset) -> None:
    values = {"model": {"num_layers": 3}, "loss": {"class_weights": [1, 2]}}
    check_compatible(parse_settings(TrainConfig, values, "test"), dataset)
    values["loss"] = {"class_weights": [1, 2, 3]}
    with pytest.raises(UsageError, match=r"--loss\.class-weights=1,2,3: give 2 numbers"):
        check_compatible(parse_settings(TrainConfig, values, "test"), dataset)


def test_small_tiles_fit_neither_structural_similarity_nor_a_wide_overlap(tmp_path: Path) -> None:
    tiles = open_dataset(prepare_discs(tmp_path, num_images=10, tile=8))
    hybrid = {"model": {"num_layers": 3}, "loss": {"name": "basnet_hybrid"}}
    with pytest.raises(UsageError, match="at least 11x11 pixels, got 8x8"):
        check_compatible(parse_settings(TrainConfig, hybrid, "test"), tiles)
    check_compatible(config().model_copy(update={"window_overlap": 7}), tiles)
    with pytest.raises(UsageError, match="overlap by 8; give --window-overlap below 8"):
        check_compatible(config().model_copy(update={"window_overlap": 8}), tiles)


def test_images_that_are_never_cut_fit_any_overlap(dataset: Dataset) -> None:
    check_compatible(config().model_copy(update={"window_overlap": 99}), dataset)


def test_a_missing_split_is_named(dataset: Dataset) -> None:
    del (splits := dict(dataset.splits))["valid"]
    without = Dataset(dataset.url, dataset.manifest, dataset.digest, splits)
    with pytest.raises(UsageError, match="split 'valid' has no samples"):
        check_compatible(config(), without)


def test_a_run_is_not_begun_with_what_does_not_fit(dataset: Dataset, tmp_path: Path) -> None:
    from job.train import main

    options = ["--data", dataset.url, "--output", str(tmp_path), "--name", "new"]
    assert main(["--local", *options, "--model.num-layers", "7"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_pixels_that_float16_cannot_hold_are_refused(dataset: Dataset) -> None:
    deep = replace(dataset, manifest=dataset.manifest.model_copy(update={"value_max": 65535}))
    half = config().model_copy(update={"precision": "mixed_float16"})
    check_compatible(half, deep)
    as_stored = half.model_copy(update={"model": config(input_scaling="none").model})
    check_compatible(as_stored, dataset)
    with pytest.raises(UsageError, match="pixel values of up to 65535 exceed the largest"):
        check_compatible(as_stored, deep)
    check_compatible(as_stored.model_copy(update={"precision": "float32"}), deep)


def test_window_overlap_is_the_first_that_is_set(trained_run: Path) -> None:
    manifest = open_run(str(trained_run)).manifest
    assert window_overlap(manifest, None, None) == 16
    assert window_overlap(manifest, None, 4) == 4
    assert window_overlap(manifest, 0, 4) == 0
    with pytest.raises(UsageError, match="overlap by 32; give --overlap below 32"):
        window_overlap(manifest, 32)
