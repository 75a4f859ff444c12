import json
from typing import Any, get_args

import pytest

from flexunet.errors import UsageError
from flexunet.settings import fields_of, parse_settings, read_yaml, write_yaml
from job.config import (
    LossName,
    MetricName,
    TrainConfig,
    identity_of,
    stored_config,
    values_of_identity,
)

# What may change between two attempts of one run. A field that is not here is part of the run's
# identity: adding one to either side is a decision.
FREE = {
    "preset",
    "data",
    "output",
    "name",
    "epochs",
    "time_budget",
    "time_schedule",
    "prediction_images",
    "prediction_folder",
    "window_overlap",
    "checkpoint_every_minutes",
    "keep_checkpoints",
    "cache_dir",
    "cache",
    "cache_size",
    "cpu_replicas",
    "accumulate",
    "keep_memory",
    "gradient_exchange",
    "exchange_flops_per_byte",
    "threads",
    "xla",
    "tensorboard",
    "tracker",
    "tracking_uri",
    "experiment",
    "progress",
    "phase_timeout",
    "step_timeout",
    "storage_timeout",
}
IDENTITY = {
    "global_batch_size",
    "seed",
    "precision",
    "deterministic",
    "init_from",
    "metrics",
    "model.name",
    "model.num_layers",
    "model.base_filters",
    "model.base_kernels",
    "model.dilation",
    "model.dropout_rate",
    "model.normalization",
    "model.normalization_momentum",
    "model.activation",
    "model.input_scaling",
    "model.image_channels",
    "model.num_classes",
    "loss.name",
    "loss.class_weights",
    "optimizer.name",
    "optimizer.learning_rate",
    "optimizer.beta_1",
    "optimizer.beta_2",
    "optimizer.epsilon",
    "optimizer.weight_decay",
    "optimizer.clipvalue",
    "optimizer.clipnorm",
    "schedule.reduce_on_plateau",
    "schedule.reducer_factor",
    "schedule.reducer_patience",
    "schedule.min_learning_rate",
    "schedule.early_stopping_patience",
}
LATER_KINDS = ("scale", "crop", "contrast", "gamma", "blur", "noise")


def test_every_field_is_free_or_part_of_the_identity() -> None:
    names = {".".join(path) for path, _ in fields_of(TrainConfig)}
    earlier = set(identity_of(TrainConfig(random_streams=1)))
    of_augmentation = {name for name in earlier if name.startswith("augmentation.")}
    # Each later option of augmentation at another value than that of earlier versions.
    augmentation = {
        "border": "mirror",
        "preset": "light",
        **{f"{kind}_probability": 0.5 for kind in LATER_KINDS},
        **{f"{kind}_range": [0.9, 0.95] for kind in LATER_KINDS},
        "crop_aspects": [1, 1],
    }
    later_of_augmentation = {f"augmentation.{name}" for name in augmentation}
    schedule = {"warmup_epochs": 1, "cosine": True, "reduce_on_plateau": False}
    values = {"folds": 3, "fold": 0, "foreground_share": 0.5, "schedule": schedule}
    values |= {
        "augmentation": augmentation,
        "foreground_share_end": 0.1,
        "optimizer": {"ema_momentum": 0.99, "encoder_learning_rate_factor": 0.1},
    }
    values |= {"hybrid_weights": [1.6, 0.4], "fit_postprocessing": True}
    values["gradient_dtype"] = "bfloat16"
    values["model"] = {
        "name": "encoder-unet",
        "max_filters": 64,
        "residual_blocks": [2],
        "deep_supervision": 1,
        "encoder": "mobilenet-v2",
        "encoder_weights": "w.h5",
        "encoder_batch_norm": "frozen",
        "encoder_frozen_epochs": 1,
    }
    identity = identity_of(parse_settings(TrainConfig, values, "test"))
    later = {"folds", "fold", "foreground_share", "schedule.warmup_epochs", "schedule.cosine"}
    later |= {"random_streams", "hybrid_weights", "foreground_share_end", "optimizer.ema_momentum"}
    later |= {"fit_postprocessing", "gradient_dtype", *later_of_augmentation}
    later |= {f"model.{name}" for name in values["model"]} - {"model.name"}
    later |= {"optimizer.encoder_learning_rate_factor"}
    assert set(identity) == IDENTITY | of_augmentation | later
    # Runs that were begun before there were these keep their identity.
    assert earlier == IDENTITY | of_augmentation
    assert names == FREE | set(identity)
    # Each kind of augmentation changes what is learned.
    assert len(of_augmentation) == 28


def test_identity_changes_with_the_values_and_not_with_free_ones() -> None:
    base = identity_of(TrainConfig())
    assert identity_of(TrainConfig(epochs=3, output="gs://bucket", name="a")) == base
    changed = identity_of(parse_settings(TrainConfig, {"model": {"base_kernels": [3, 3]}}, "test"))
    assert {key for key in base if base[key] != changed[key]} == {"model.base_kernels"}
    # JSON types: a tuple that was read back from a file is a list.
    assert changed["model.base_kernels"] == [3, 3]


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        TrainConfig(random_streams=1, foreground_share=0.5),
        parse_settings(TrainConfig, {"preset": "recipe"}, "test"),
        parse_settings(
            TrainConfig, {"folds": 3, "fold": 0, "loss": {"class_weights": [1, 2]}}, "test"
        ),
    ],
)
def test_an_identity_gives_its_config_back(config: TrainConfig) -> None:
    again = parse_settings(TrainConfig, values_of_identity(identity_of(config)), "test")
    assert identity_of(again) == identity_of(config)
    assert identity_of(again, is_whole=True) == identity_of(config, is_whole=True)


def test_a_config_that_lacks_what_came_later_means_what_it_meant() -> None:
    values = json.loads(TrainConfig(foreground_share=0.5).model_dump_json())
    for name in ("random_streams", "folds", "fold", "foreground_share"):
        del values[name]
    found = stored_config(values, "config.yaml")
    assert (found.random_streams, found.foreground_share) == (1, None)
    with pytest.raises(UsageError, match=r"config\.yaml: unknown key 'epoch'"):
        stored_config({"epoch": 3}, "config.yaml")


def test_a_written_config_is_read_as_the_same() -> None:
    values = {
        "data": "gs://bucket/data",
        "init_from": None,
        "optimizer": {"learning_rate": 7e-5, "clipvalue": None, "clipnorm": 0.5},
        "loss": {"name": "focal", "class_weights": [1, 20.5]},
        "model": {"base_kernels": [5, 7], "num_classes": 1},
        "metrics": ["dice_coef", "sensitivity"],
        "augmentation": {"enabled": True, "rotation_angles": [5, -5]},
    }
    config = parse_settings(TrainConfig, values, "test")
    again = parse_settings(TrainConfig, read_yaml(write_yaml(config), "config.yaml"), "config.yaml")
    assert again == config
    assert identity_of(again) == identity_of(config)


def test_defaults_are_the_inbreast_network() -> None:
    config = TrainConfig()
    # Copied by hand from the reference implementation's INbreast file.
    assert (config.model.num_layers, config.model.base_filters) == (8, 16)
    assert (config.model.base_kernels, config.model.dilation) == ((9, 9), (1, 1))
    assert (config.model.dropout_rate, config.optimizer.clipvalue) == (0.04, 0.4)
    assert (config.epochs, config.global_batch_size) == (100, 2)
    assert config.schedule.reducer_patience == 4
    assert config.schedule.early_stopping_patience == 10


def test_preset_lies_below_what_is_given() -> None:
    values = {"preset": "recipe", "optimizer": {"learning_rate": 0.5}, "foreground_share": None}
    config = parse_settings(TrainConfig, values, "test")
    assert (config.loss.name, config.model.normalization) == ("ce_dice", "group")
    assert (config.optimizer.name, config.optimizer.learning_rate) == ("adamw", 0.5)
    assert config.foreground_share is None
    assert config.model.num_layers == TrainConfig().model.num_layers
    # A run's own file has every value written out, the preset's too.
    again = parse_settings(TrainConfig, read_yaml(write_yaml(config), "config.yaml"), "config.yaml")
    assert again == config
    assert identity_of(TrainConfig(preset="reference")) == identity_of(TrainConfig())


def test_what_a_preset_sets_identifies_the_run_although_its_name_is_free() -> None:
    recipe, base = identity_of(TrainConfig(preset="recipe")), identity_of(TrainConfig())
    optimizer = {f"optimizer.{each}" for each in ("name", "learning_rate", "clipvalue", "clipnorm")}
    schedule = {
        f"schedule.{each}"
        for each in ("reduce_on_plateau", "early_stopping_patience", "warmup_epochs", "cosine")
    }
    others = {"model.normalization", "loss.name", "foreground_share"}
    assert {key for key in recipe if recipe[key] != base.get(key)} == optimizer | schedule | others


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"base_kernels": [3, 4]}}, "a kernel must be odd and positive"),
        ({"model": {"dilation": [0, 1]}}, "a dilation must be 1 or more"),
        ({"model": {"num_layers": 13}}, "model.num_layers=13: .*less than or equal to 12"),
        # 0.2 times 7 is 1.4 at level 7.
        (
            {"preset": "reference", "model": {"dropout_rate": 0.2}},
            "model: dropout_rate=0.2 gives 1.40 at level 7",
        ),
        ({"loss": {"name": "dise"}}, "loss.name='dise': input should be 'categorical_crossentr"),
        ({"metrics": ["dice"]}, "metrics.0='dice': input should be 'dice_coef_multiclass'"),
        ({"optimizer": {"learning_rate": 0}}, "optimizer.learning_rate=0: .*greater than 0"),
        ({"optimizer": {"learning_rates": 1}}, "'optimizer.learning_rates'; did you mean"),
        ({"name": "Uppercase"}, "name='Uppercase': not a run name; use 1 to 47 lower-case letters"),
        ({"name": "a" * 48}, "not a run name"),
        ({"name": "a-"}, "not a run name"),
        ({"folds": 2}, "folds=2 is too few: a run is evaluated on one fold, validates on another"),
        ({"fold": 0}, "--fold needs --folds; give the number of folds"),
        ({"fold": 3, "folds": 3}, "fold=3 does not exist with folds=3; give 0 to 2"),
        ({"seed": 2**31}, "seed=2147483648: .*less than 2147483648"),
        ({"epochs": 0}, "epochs=0"),
        ({"preset": "best"}, "preset='best': input should be 'auto', 'reference' or 'recipe'"),
        (
            {"preset": "reference", "schedule": {"cosine": True}},
            "schedule: cosine and reduce_on_plateau exclude each",
        ),
        ({"schedule": {"early_stopping_patience": -1}}, "greater than or equal to 0"),
        ({"global_batch_size": 4, "accumulate": 3}, "accumulate=3 does not divide .*size=4"),
        (
            {"xla": "on", "model": {"normalization": "batch"}},
            "xla=on does not support model.normalization=batch",
        ),
        (
            {"accumulate": 2, "model": {"normalization": "batch"}},
            "accumulate=2 does not support model.normalization=batch",
        ),
    ],
)
def test_values_that_cannot_work_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_settings(TrainConfig, values, "options")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["a", "inbreast", "a" * 47, "run-2"])
def test_run_names_may_be(name: str) -> None:
    assert TrainConfig(name=name).name == name


@pytest.mark.parametrize("value", [0, 0.0, None])
def test_clipping_can_be_switched_off(value: float | None) -> None:
    values = {"optimizer": {"clipvalue": value, "clipnorm": value}}
    config = parse_settings(TrainConfig, values, "options").optimizer
    assert not config.clipvalue
    assert not config.clipnorm


def test_names_of_losses_and_metrics_are_those_that_exist() -> None:
    # Inside: these two need TensorFlow, and the rest of this module does not wait for it.
    from job.losses import LOSSES
    from job.metrics.batch import REFERENCE_METRICS

    assert set(get_args(LossName)) <= set(LOSSES)
    assert set(get_args(MetricName)) == set(REFERENCE_METRICS)
