"""`TrainConfig`: every option of `flexunet train`, its default, unit and meaning; presets."""

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import field_validator, model_validator

from flexunet.errors import UsageError
from flexunet.settings import Settings, merged, option
from job.config.groups import (
    AugmentationConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
)

# A form that every storage and cluster takes.
RUN_NAME = re.compile(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?")
RUN_NAME_RULE = "1 to 47 small letters a-z, digits and hyphens; a letter first, no hyphen last"

MetricName = Literal["dice_coef_multiclass", "dice_coef", "iou_coef", "sensitivity", "specificity"]
_MIN_FOLDS = 3


# Laid under all other options. The defaults are the reference implementation's training; the
# recipe is what benchmarks/recipe.py compares with it.
PRESETS: dict[str, dict[str, Any]] = {
    "reference": {},
    "recipe": {
        "model": {"normalization": "group"},
        "loss": {"name": "ce_dice"},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3, "clipvalue": None, "clipnorm": 1.0},
        "schedule": {
            "reduce_on_plateau": False,
            "early_stopping_patience": 0,
            "warmup_epochs": 1.0,
            "cosine": True,
        },
        "foreground_share": 0.5,
    },
}


def dotted_keys(values: Mapping[str, Any], prefix: str = "") -> set[str]:
    """Returns the dotted keys of nested `values`."""
    found: set[str] = set()
    for key, value in values.items():
        name = f"{prefix}{key}"
        found |= dotted_keys(value, f"{name}.") if isinstance(value, Mapping) else {name}
    return found


PRESET_KEYS = frozenset().union(*map(dotted_keys, PRESETS.values()))


class TrainConfig(Settings):
    """One training run."""

    preset: Literal["reference", "recipe"] = option(
        "reference",
        "Defaults of the other options. recipe: group normalisation, cross-entropy with Dice of "
        "the foreground, AdamW, warm-up and cosine, half of the samples with foreground.",
        free=True,
    )
    data: str | None = option(
        None,
        "Dataset: folder or gs:// URL that prep made. Required, but for a .config file.",
        free=True,
        path=True,
    )
    output: str = option("runs", "Folder or gs:// URL that holds runs.", free=True, path=True)
    name: str | None = option(
        None,
        f"Run name ({RUN_NAME_RULE}); the same name again resumes that run. none: the dataset's "
        "name.",
        free=True,
    )
    epochs: int = option(
        100,
        "Epochs: passes over the training split. More of them train a finished run on, unless it "
        "stopped early; with schedule.cosine its learning rate jumps back up then.",
        free=True,
        ge=1,
    )
    global_batch_size: int = option(2, "Samples per step, over all devices.", ge=1)
    accumulate: int = option(
        1,
        "Micro-batches per step: parts of the batch that go through the network one after the "
        "other, for batches that do not fit into memory; in evaluations too. The result is that of "
        "the whole batch; training with an overlap loss (dice, iou) takes a forward pass more.",
        free=True,
        ge=1,
    )
    folds: int | None = option(
        None,
        "Cross-validation: one run for each of so many folds of train and valid, whole groups "
        "each, at least 3. A fold is evaluated, the next one validates, the others train; the test "
        "split is not touched.",
        le=100,
    )
    fold: int | None = option(None, "Train this fold alone, counted from 0.", ge=0)
    foreground_share: float | None = option(
        None,
        "Share of an epoch's samples that shall show foreground, where the dataset has fewer: some "
        "come twice, and of the others some not at all. none: every sample once.",
        gt=0,
        lt=1,
    )
    seed: int = option(1234, "Seed of weights, order, dropout and augmentation.", ge=0, lt=2**31)
    random_streams: int = option(
        2, "Version of what is drawn from the seed; 1: as version 0.1.0 did.", ge=1, le=2
    )
    precision: Literal["auto", "float32", "mixed_bfloat16", "mixed_float16", "float64"] = option(
        "auto",
        "Arithmetic. auto: mixed_bfloat16 where the hardware computes it; mixed_float16, with a "
        "dynamic loss scale, on GPUs of compute capability 7.0 to 7.5; else float32.",
    )
    deterministic: bool = option(
        False, "Bitwise the same result every time, at some cost in speed."
    )
    init_from: str | None = option(
        None,
        "Weights to start from: an earlier run, or a .h5 file of the reference family. A run that "
        "has seen groups of the evaluated cases is refused; of a file it is not known.",
        path=True,
    )
    metrics: tuple[MetricName, ...] = option(
        ("dice_coef_multiclass",), "Metrics of the reference, in train_metrics.csv."
    )
    prediction_images: int = option(
        6, "Images predicted after every epoch; 0: no predictions.", free=True, ge=0
    )
    prediction_folder: str | None = option(
        None,
        "Folder or gs:// URL of those images; none: the first of the validation split.",
        free=True,
        path=True,
    )
    window_overlap: int | None = option(
        None,
        "Pixels by which windows overlap at least, where pictures larger than the network are "
        "predicted in windows; none: half a window.",
        free=True,
        ge=0,
    )
    checkpoint_every_minutes: float = option(
        10.0, "Minutes between checkpoints inside an epoch; 0: only after epochs.", free=True, ge=0
    )
    keep_checkpoints: int = option(
        2, "Number of the newest checkpoints that are kept, beside the best.", free=True, ge=1
    )
    cache_dir: str | None = option(
        None, "Folder for shards of remote datasets; none: ~/.cache/flexunet.", free=True, path=True
    )
    cache: Literal["full", "ranges"] = option(
        "full",
        "full: copy all shards first; ranges: read single samples over the network.",
        free=True,
    )
    cpu_replicas: int = option(
        1, "Number of mirrored replicas on a machine without a GPU.", free=True, ge=1, le=64
    )
    gradient_exchange: Literal["auto", "all_reduce"] = option(
        "auto",
        "Between replicas. auto: per layer, its gradient or what it is computed from, whichever "
        "takes less time, or about as long and sends less; all_reduce: always the gradient.",
        free=True,
    )
    exchange_flops_per_byte: float | None = option(
        None,
        "FLOPs that a replica does while it sends a byte, for auto; none: measured at the start, "
        "1000 if deterministic.",
        free=True,
        gt=0,
    )
    keep_memory: bool = option(
        False,
        "On CPUs, keep the memory of freed tensors for the next step: less CPU time and more "
        "memory, 70 % more at 512x512. Changes nothing where TensorFlow uses oneDNN.",
        free=True,
    )
    xla: Literal["auto", "on", "off"] = option(
        "off",
        "Compile the network of a training step; gradients are then always all-reduced. auto: on "
        "GPUs, without batch normalization or deterministic. Not yet run on any GPU.",
        free=True,
    )
    threads: int = option(0, "Number of CPU threads; 0: one per core.", free=True, ge=0)
    phase_timeout: float = option(
        600.0,
        "Seconds until all processes must have met, and to the first step of a phase.",
        free=True,
        gt=0,
    )
    step_timeout: float = option(
        0.0,
        "Seconds after which a step counts as hung; 0: ten times the usual, at least 120.",
        free=True,
        ge=0,
    )
    storage_timeout: float = option(
        600.0, "Seconds for which training goes on while storage is out of reach.", free=True, ge=0
    )
    tensorboard: bool = option(True, "Write TensorBoard event files.", free=True)
    progress: bool = option(True, "Show a progress bar on a terminal.", free=True)

    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    augmentation: AugmentationConfig = AugmentationConfig()

    @field_validator("name")
    @classmethod
    def _is_run_name(cls, name: str | None) -> str | None:
        if name is not None and not RUN_NAME.fullmatch(name):
            raise ValueError(f"a run's name is {RUN_NAME_RULE}")
        return name

    @model_validator(mode="before")
    @classmethod
    def _over_preset(cls, values: Any) -> Any:
        """Lays the options that are given over those of the preset."""
        if not isinstance(values, dict):
            return values
        return merged(PRESETS.get(str(values.get("preset")), {}), values)

    @model_validator(mode="after")
    def _micro_batches_are_equal(self) -> "TrainConfig":
        if self.xla == "on" and self.model.normalization == "batch":
            raise ValueError(
                "xla=on does not go together with model.normalization=batch, whose layers talk to "
                "other replicas; choose model.normalization=group, or xla=off"
            )
        if self.accumulate > 1 and self.model.normalization == "batch":
            raise ValueError(
                f"accumulate={self.accumulate} would normalise over parts of the batch; use "
                "model.normalization=group, or accumulate=1 and a smaller global_batch_size"
            )
        if self.global_batch_size % self.accumulate:
            raise ValueError(
                f"accumulate={self.accumulate} does not divide "
                f"global_batch_size={self.global_batch_size}; choose a divisor of the batch"
            )
        return self

    @model_validator(mode="after")
    def _folds_fit(self) -> "TrainConfig":
        if self.folds is not None and self.folds < _MIN_FOLDS:
            raise ValueError(
                f"folds={self.folds} is too few: one fold is evaluated, one validates, the others "
                f"train; give at least {_MIN_FOLDS}"
            )
        if self.fold is None:
            return self
        if self.folds is None:
            raise ValueError("--fold needs --folds: into how many the cases are divided")
        if self.fold >= self.folds:
            raise ValueError(f"fold={self.fold} is none of folds={self.folds}; they count from 0")
        return self


def checked_run_name(name: str) -> str:
    """Returns `name` when a run may have it.

    Raises:
        UsageError: it is not of the form that every storage and cluster takes.
    """
    if not RUN_NAME.fullmatch(name):
        raise UsageError(f"run name {name!r} is not allowed; use {RUN_NAME_RULE}")
    return name
