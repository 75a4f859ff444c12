"""Defines `TrainConfig`, all options of `flexunet train`."""

import re
from typing import Any, Literal

from pydantic import ModelWrapValidatorHandler, field_validator, model_validator

from flexunet.errors import UsageError
from flexunet.paths import has_secret
from flexunet.settings import Settings, deep_merge, option
from job.config.augmentation import AugmentationConfig
from job.config.groups import (
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from job.config.network_checks import check_encoder_training, check_statistics
from job.config.presets import PRESETS, companions, unset

# Valid in every storage and on every cluster.
RUN_NAME = re.compile(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?")
RUN_NAME_RULE = "1 to 47 lower-case letters a-z, digits and hyphens; first a letter, last no hyphen"

MetricName = Literal[
    "dice_coef_multiclass",
    "dice_coef",
    "iou_coef",
    "sensitivity",
    "specificity",
    "dice_coef_foreground",
    "dice_coef_hybrid",
]
TRACKER_OPTIONS = ("tracker", "tracking_uri", "experiment")  # no effect on training
DATABRICKS = frozenset({"databricks", "databricks-uc"})  # addresses of a tracker, not folders
HYBRID_WEIGHTS = (1.5, 0.5)
_MIN_FOLDS = 3


class TrainConfig(Settings):
    """The options of one training run."""

    preset: Literal["auto", "reference", "recipe"] = option(
        "auto",
        "Set of defaults for the other options. auto: planned from the dataset and the machine of "
        "the first worker, see `flexunet plan`. reference: the training of the reference "
        "implementation. recipe: group normalisation, cross-entropy plus Dice loss over the "
        "foreground classes, AdamW, warm-up and cosine decay, half of the samples with "
        "foreground. The defaults shown for the other options are those of reference.",
        not_identity=True,
    )
    data: str | None = option(
        None,
        "Dataset: folder or gs:// URL written by prep. Required, except with a .config file.",
        not_identity=True,
        path=True,
    )
    output: str = option("runs", "Folder or gs:// URL of the runs.", not_identity=True, path=True)
    name: str | None = option(
        None,
        f"Run name: {RUN_NAME_RULE}. The same name again resumes that run. none: the name of the "
        "dataset.",
        not_identity=True,
    )
    epochs: int | None = option(
        100,
        "Passes over the training split. A higher number continues a finished run, unless it "
        "stopped early; with schedule.cosine the learning rate then jumps back up. none: until "
        "time_budget is used, which is the default with time_budget.",
        not_identity=True,
        ge=1,
    )
    time_budget: float | None = option(
        None,
        "Minutes for training with its validations and checkpoints, in all attempts together; not "
        "for the start and the final evaluation. schedule.cosine falls over this time. At the end "
        "of the time the run validates and is finished, also within an epoch. Of a "
        "cross-validation, each run has this time. A higher number continues a finished run.",
        not_identity=True,
        gt=0,
    )
    time_schedule: str | None = option(
        None,
        "With time_budget: folder or gs:// URL of a run whose recorded time to follow instead of "
        "the clock. With deterministic, equal options and hardware, the result equals that run.",
        not_identity=True,
        path=True,
    )
    global_batch_size: int = option(2, "Samples per step over all devices.", ge=1)
    accumulate: int = option(
        1,
        "Micro-batches per step, computed one after the other, for batches that do not fit into "
        "memory; also in evaluations. The result equals that of the whole batch. Overlap losses "
        "(dice, iou) need one more forward pass in training.",
        not_identity=True,
        ge=1,
    )
    folds: int | None = option(
        None,
        "Cross-validation: divide the groups of train and valid into this many folds, at least 3, "
        "and train one run per fold. Each run is evaluated on its fold, validates on the next and "
        "trains on the others. The test split is not used.",
        le=100,
    )
    fold: int | None = option(
        None, "Train only this fold: 0 to folds-1, as in the names of the runs.", ge=0
    )
    foreground_share: float | None = option(
        None,
        "Oversample images with foreground to this share of each epoch, if the dataset has fewer. "
        "The epoch keeps its length: it repeats some images with foreground and skips some "
        "without. none: every sample once.",
        gt=0,
        lt=1,
    )
    foreground_share_end: float | None = option(
        None,
        "Let foreground_share fall linearly to this share in the last epoch; 0: to every sample "
        "once. none: it stays the same.",
        ge=0,
        lt=1,
    )
    seed: int = option(
        1234, "Random seed of weights, sample order, dropout and augmentation.", ge=0, lt=2**31
    )
    random_streams: int = option(
        3,
        "Version of the random streams drawn from the seed; 1: those of version 0.1.0; 2: earlier "
        "dropout, which draws for each sample alone.",
        ge=1,
        le=3,
    )
    precision: Literal["auto", "float32", "mixed_bfloat16", "mixed_float16", "float64"] = option(
        "auto",
        "Numeric precision. auto: mixed_bfloat16 if the hardware supports it; mixed_float16, with "
        "a dynamic loss scale, on GPUs of compute capability 7.0 to 7.5; else float32.",
    )
    deterministic: bool = option(False, "Produce bitwise identical results every time; slower.")
    init_from: str | None = option(
        None,
        "Initial weights: an earlier run, or a .h5 file of the reference implementation. A run "
        "that was trained on groups of the evaluated cases is refused; for a file this cannot be "
        "checked.",
        path=True,
    )
    metrics: tuple[MetricName, ...] = option(
        ("dice_coef_multiclass",),
        "Metrics of the reference implementation to write to train_metrics.csv.",
    )
    hybrid_weights: tuple[float, float] = option(
        HYBRID_WEIGHTS,
        "For the metric dice_coef_hybrid: weights of dice_coef_multiclass and of "
        "dice_coef_foreground, which add up to 2.",
    )
    fit_postprocessing: bool = option(
        False,
        "After training, fit the threshold and the smallest region of each class and the "
        "temperature on the validation split. evaluate and infer then use them.",
    )
    prediction_images: int = option(
        6, "Images predicted after every epoch; 0: no predictions.", not_identity=True, ge=0
    )
    prediction_folder: str | None = option(
        None,
        "Folder or gs:// URL of these images; none: the first images of the validation split.",
        not_identity=True,
        path=True,
    )
    window_overlap: int | None = option(
        None,
        "Minimum overlap of prediction windows, pixels; none: half a window.",
        not_identity=True,
        ge=0,
    )
    checkpoint_every_minutes: float = option(
        10.0,
        "Minutes between checkpoints within an epoch; 0: checkpoints only at the end of epochs.",
        not_identity=True,
        ge=0,
    )
    keep_checkpoints: int = option(
        2, "Number of newest checkpoints to keep, besides the best.", not_identity=True, ge=1
    )
    cache_dir: str | None = option(
        None,
        "Cache folder for shards of remote datasets; none: ~/.cache/flexunet.",
        not_identity=True,
        path=True,
    )
    cache: Literal["full", "ranges"] = option(
        "full",
        "full: copy all shards first; ranges: keep nothing, read samples over the network.",
        not_identity=True,
    )
    cache_size: float | None = option(
        None,
        "With --cache full: most GiB of a remote dataset to keep on a node. Of a larger dataset "
        "samples are kept up to this size, and the others are read over the network in each "
        "epoch. none: copy all shards.",
        not_identity=True,
        gt=0,
    )
    cpu_replicas: int = option(
        1, "Number of mirrored replicas on a machine without a GPU.", not_identity=True, ge=1, le=64
    )
    gradient_exchange: Literal["auto", "all_reduce"] = option(
        "auto",
        "Exchange between replicas. auto: for each layer, exchange gradients or layer inputs: the "
        "faster one; if about equal, the one that sends less. all_reduce: always gradients.",
        not_identity=True,
    )
    gradient_dtype: Literal["float32", "bfloat16"] = option(
        "float32",
        "Type in which replicas send gradients. float32: as they are computed. bfloat16: half of "
        "the bytes, with 8 bits of each number, for many workers on a slow network. Gathered layer "
        "inputs are sent as they are. No effect with one replica.",
    )
    exchange_flops_per_byte: float | None = option(
        None,
        "For gradient_exchange auto: floating-point operations that a replica computes in the "
        "time of sending one byte; none: measured at the start, or 1000 if deterministic.",
        not_identity=True,
        gt=0,
    )
    keep_memory: bool = option(
        False,
        "On CPUs, keep the memory of freed tensors for the next step: less CPU time, more memory "
        "(70 % more at 512x512). No effect if TensorFlow uses oneDNN.",
        not_identity=True,
    )
    xla: Literal["auto", "on", "off"] = option(
        "off",
        "Compile the network of the training step with XLA; gradients are then always "
        "all-reduced. auto: on GPUs, unless batch normalisation or deterministic is on. Not yet "
        "tested on a GPU.",
        not_identity=True,
    )
    threads: int = option(0, "Number of CPU threads; 0: one per core.", not_identity=True, ge=0)
    phase_timeout: float = option(
        600.0,
        "Seconds for all processes to connect, and for each epoch, validation or evaluation to "
        "finish its first step.",
        not_identity=True,
        gt=0,
    )
    step_timeout: float = option(
        0.0,
        "Seconds after which a step counts as hung; 0: ten times its usual time, at least 120.",
        not_identity=True,
        ge=0,
    )
    storage_timeout: float = option(
        600.0,
        "Seconds for which training continues while storage cannot be reached.",
        not_identity=True,
        ge=0,
    )
    tensorboard: bool = option(
        True,
        "Write TensorBoard event files: the numbers of each epoch, overlays and precision-recall "
        "curves of the predicted images.",
        not_identity=True,
    )
    tracker: Literal["mlflow"] | None = option(
        None,
        "Send options, numbers and curves to a tracker, too: mlflow, with the extra "
        "flexunet[mlflow]. Training does not wait for the tracker. What it misses is sent later, "
        "from the files of the run.",
        not_identity=True,
    )
    tracking_uri: str | None = option(
        None,
        "With tracker: address of the MLflow server, or a folder. none: MLFLOW_TRACKING_URI. User "
        "and password come from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.",
        not_identity=True,
        path=True,
    )
    experiment: str | None = option(
        None,
        "With tracker: name of the MLflow experiment, which is created if needed. none: "
        "MLFLOW_EXPERIMENT_NAME, else Default.",
        not_identity=True,
        min_length=1,
    )
    progress: bool = option(True, "Show a progress bar on a terminal.", not_identity=True)

    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    augmentation: AugmentationConfig = AugmentationConfig()

    @field_validator("name")
    @classmethod
    def _is_run_name(cls, name: str | None) -> str | None:
        if name is not None and not RUN_NAME.fullmatch(name):
            raise ValueError(f"not a run name; use {RUN_NAME_RULE}")
        return name

    @field_validator("tracking_uri")
    @classmethod
    def _has_no_secret(cls, uri: str | None) -> str | None:
        if uri is not None and has_secret(uri):
            raise ValueError(
                "an address with a user, password or query would be stored with the run; set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            )
        return uri

    @field_validator("hybrid_weights")
    @classmethod
    def _add_up_to_two(cls, weights: tuple[float, float]) -> tuple[float, float]:
        if min(weights) < 0 or abs(sum(weights) - 2) > 1e-6:
            raise ValueError("give two numbers, each 0 or more, that add up to 2")
        return weights

    @model_validator(mode="wrap")
    @classmethod
    def _over_preset(cls, values: Any, parse: ModelWrapValidatorHandler["TrainConfig"]) -> Any:
        """Merges the explicit options over those of the preset.

        With the preset auto, only the explicit options count as set: the others are planned.
        """
        if not isinstance(values, dict):
            return parse(values)
        preset = str(values.get("preset", cls.model_fields["preset"].default))
        base = PRESETS.get(preset, {})
        if values.get("time_budget") is not None:
            base = {**base, "epochs": None}
        if preset == "auto":
            base = deep_merge(base, companions(values))
        config = parse(deep_merge(base, values))
        if preset == "auto":
            unset(config, base, values)
        return config

    @model_validator(mode="after")
    def _ends(self) -> "TrainConfig":
        if self.time_budget is None and self.epochs is None:
            raise ValueError("epochs=none needs time_budget; give the minutes, or a number")
        if self.time_budget is None and self.time_schedule is not None:
            raise ValueError("time_schedule needs time_budget; give the minutes, too")
        return self

    @model_validator(mode="after")
    def _network_fits_the_training(self) -> "TrainConfig":
        check_encoder_training(self.model, self.optimizer, self.init_from)
        check_statistics(self.model, accumulate=self.accumulate, xla=self.xla)
        if self.global_batch_size % self.accumulate:
            raise ValueError(
                f"accumulate={self.accumulate} does not divide "
                f"global_batch_size={self.global_batch_size}; choose a divisor of the batch"
            )
        return self

    @model_validator(mode="after")
    def _share_falls(self) -> "TrainConfig":
        start, end = self.foreground_share, self.foreground_share_end
        if end is not None and (start is None or end > start):
            raise ValueError(
                f"foreground_share_end={end} needs a foreground_share of at least {end}, from "
                "which the share falls; give it, or leave foreground_share_end out"
            )
        return self

    @model_validator(mode="after")
    def _folds_fit(self) -> "TrainConfig":
        if self.folds is not None and self.folds < _MIN_FOLDS:
            raise ValueError(
                f"folds={self.folds} is too few: a run is evaluated on one fold, validates on "
                f"another and trains on the rest; give at least {_MIN_FOLDS}"
            )
        if self.fold is None:
            return self
        if self.folds is None:
            raise ValueError("--fold needs --folds; give the number of folds, too")
        if self.fold >= self.folds:
            raise ValueError(
                f"fold={self.fold} does not exist with folds={self.folds}; "
                f"give 0 to {self.folds - 1}"
            )
        return self


def checked_run_name(name: str) -> str:
    """Returns `name` if it is a valid run name.

    Raises:
        UsageError: some storage or cluster does not allow it.
    """
    if not RUN_NAME.fullmatch(name):
        raise UsageError(f"run name {name!r} is not allowed; use {RUN_NAME_RULE}")
    return name
