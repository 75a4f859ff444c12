"""The training configuration: every option of `flexunet train`, its default, unit and meaning.

Fields are either part of a run's identity (data, model, loss, seed, batch, ...) or free to change
between two attempts of one run (epochs, devices, cache, logging). Nothing here imports TensorFlow,
so that `--help` answers at once.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import field_validator, model_validator

from flexunet.errors import ContentError, UsageError
from flexunet.settings import Settings, fields_of, merged, option, validated
from job.data.augment import AugmentationConfig

# A form that every storage and cluster takes.
RUN_NAME = re.compile(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?")
RUN_NAME_RULE = "1 to 47 small letters a-z, digits and hyphens; a letter first, no hyphen last"

LossName = Literal[
    "categorical_crossentropy",
    "dice",
    "bce_dice",
    "iou",
    "bce_iou",
    "basnet_hybrid",
    "dice_multiclass",
    "focal",
    "ce_dice",
]
MetricName = Literal["dice_coef_multiclass", "dice_coef", "iou_coef", "sensitivity", "specificity"]
MODELS = ("flexunet",)
_MIN_FOLDS = 3


class ModelConfig(Settings):
    """The network. The defaults are the reference implementation's INbreast network."""

    name: str = option("flexunet", f"Registered model: {', '.join(MODELS)}.")
    num_layers: int = option(
        8, "Levels; the image sides in pixels must divide by 2**(levels-1).", ge=1, le=12
    )
    base_filters: int = option(16, "Filters of the first level; doubled at each level.", ge=1)
    base_kernels: tuple[int, int] = option(
        (9, 9), "Kernel of the first level, an odd number of pixels; 2 less per level down to 3."
    )
    dilation: tuple[int, int] = option(
        (1, 1), "Dilation of the first level, pixels; 1 less per level down to 1."
    )
    dropout_rate: float = option(
        0.04,
        "Share of values dropped at level 1; at level i it is i times as much.",
        ge=0.0,
        lt=1.0,
    )
    normalization: Literal["none", "batch", "group"] = option(
        "none", "Normalisation after convolutions; group: of 8 groups of channels in each picture."
    )
    normalization_momentum: float = option(
        0.99,
        "Share of the old running statistics that a step keeps; runs of few steps need less.",
        gt=0,
        lt=1,
    )
    activation: Literal["relu", "mish"] = option("relu", "Activation of the convolutions.")
    input_scaling: Literal["none", "unit"] = option(
        "unit", "unit: pixel values divided by the largest possible one; none: as stored."
    )
    image_channels: int | None = option(
        None, "Channels of the network's input; none: those of the dataset.", ge=1
    )
    num_classes: int | None = option(
        None, "Outputs; none: one per class of the dataset; 1: one sigmoid output.", ge=1
    )

    @field_validator("base_kernels")
    @classmethod
    def _odd(cls, kernels: tuple[int, int]) -> tuple[int, int]:
        if any(kernel < 1 or kernel % 2 == 0 for kernel in kernels):
            raise ValueError("a kernel must be odd and positive")
        return kernels

    @field_validator("dilation")
    @classmethod
    def _positive(cls, dilation: tuple[int, int]) -> tuple[int, int]:
        if min(dilation) < 1:
            raise ValueError("a dilation must be 1 or more")
        return dilation

    @model_validator(mode="after")
    def _dropout_below_one(self) -> "ModelConfig":
        deepest = self.dropout_rate * (self.num_layers - 1)
        if deepest >= 1.0:
            raise ValueError(
                f"dropout_rate={self.dropout_rate} gives {deepest:.2f} at level "
                f"{self.num_layers - 1}; it must stay below 1"
            )
        return self


class LossConfig(Settings):
    """What is minimised."""

    name: LossName = option("categorical_crossentropy", "Loss function.")
    class_weights: tuple[float, ...] | None = option(
        None,
        "Weight of a pixel by its true class, a number per class id; only their ratios matter. "
        "They count in every part of a loss but the structural similarity of basnet_hybrid.",
    )


SSIM_SIZE = 11  # pixels, a side of the window of the structural similarity in basnet_hybrid


def check_class_weights(weights: Sequence[float] | None, num_outputs: int) -> None:
    """Refuses weights that are not one per class.

    Raises:
        UsageError: names how many there must be.
    """
    num_labels = max(num_outputs, 2)
    if weights is None:
        return
    if len(weights) != num_labels or min(weights) < 0 or max(weights) == 0:
        found = ",".join(f"{each:g}" for each in weights)
        raise UsageError(
            f"--loss.class-weights={found}: give {num_labels} numbers of 0 or more, one per class"
            " in the order of the ids, not all 0"
        )


def check_ssim_sides(height: int, width: int) -> None:
    """Refuses pictures that are smaller than the window of the structural similarity.

    Raises:
        UsageError: names both sizes.
    """
    if min(height, width) < SSIM_SIZE:
        raise UsageError(
            f"basnet_hybrid_loss needs pictures of at least {SSIM_SIZE}x{SSIM_SIZE} pixels,"
            f" got {height}x{width}; take another loss or a larger image size"
        )


class OptimizerConfig(Settings):
    """Adam or AdamW."""

    name: Literal["adam", "adamw"] = option("adam", "Optimizer.")
    learning_rate: float = option(1e-4, "Learning rate at the start.", gt=0)
    beta_1: float = option(0.9, "Decay of the first moment.", ge=0, lt=1)
    beta_2: float = option(0.999, "Decay of the second moment.", ge=0, lt=1)
    epsilon: float = option(1e-7, "Added to the root of the second moment.", gt=0)
    weight_decay: float = option(0.004, "Decoupled weight decay; AdamW only.", ge=0)
    clipvalue: float | None = option(
        0.4, "Each element of a gradient is clipped to +-this; 0: not clipped.", ge=0
    )
    clipnorm: float | None = option(
        None, "The gradient of each tensor is clipped to this norm; 0 or none: not clipped.", ge=0
    )


class ScheduleConfig(Settings):
    """Learning rate and early stopping. What watches anything watches the validation loss."""

    reduce_on_plateau: bool = option(True, "Reduce the learning rate on a plateau.")
    reducer_factor: float = option(0.4, "The learning rate is multiplied by this.", gt=0, lt=1)
    reducer_patience: int = option(4, "Epochs without improvement before that.", ge=0)
    min_learning_rate: float = option(0.0, "The learning rate is never reduced below this.", ge=0)
    early_stopping_patience: int = option(
        10, "Epochs without improvement before training stops; 0: it never does.", ge=0
    )
    warmup_epochs: float = option(
        0.0, "Epochs over which the learning rate grows from 0, step by step.", ge=0
    )
    cosine: bool = option(
        False,
        "After that let the learning rate fall along half a cosine, to 0 after the last epoch.",
    )

    @model_validator(mode="after")
    def _one_fall(self) -> "ScheduleConfig":
        if self.cosine and self.reduce_on_plateau:
            raise ValueError("cosine and reduce_on_plateau exclude each other; switch one off")
        return self


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


def identity_of(config: TrainConfig, *, is_whole: bool = False) -> dict[str, Any]:
    """Returns the values that identify a run, by dotted path; JSON types only.

    A later field is left out where it says what runs did that were begun before it: they go on.

    Args:
        is_whole: leave nothing out.
    """
    values = json.loads(config.model_dump_json())
    identity = {}
    for path, field in fields_of(TrainConfig):
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("free"):
            continue
        value = values
        for part in path:
            value = value[part]
        name = ".".join(path)
        if is_whole or name not in _LATER or value != _LATER[name]:
            identity[name] = value
    return identity


def values_of_identity(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested values of the config that has this identity, see `identity_of`."""
    return _nested({**_LATER, **identity})


def preset_values(config: TrainConfig) -> dict[str, Any]:
    """Returns the nested values that `config` has wherever some preset sets one."""
    whole = identity_of(config, is_whole=True)
    return _nested({name: whole[name] for name in PRESET_KEYS})


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values by dotted path as groups of values."""
    values: dict[str, Any] = {}
    for name, value in flat.items():
        *groups, last = name.split(".")
        group = values
        for each in groups:
            group = group.setdefault(each, {})
        group[last] = value
    return values


def stored_options(identity: Any, values: Mapping[str, Any], run_url: str) -> dict[str, Any]:
    """Returns the options of a run that exists, as nested values.

    Args:
        identity: of the run, by dotted path; it wins over `values`.
        values: of its `config.yaml`; empty where it has none yet.
        run_url: named in the error.

    Raises:
        ContentError: they are no config, as they are damaged, or of a later version.
    """
    try:
        found = merged(merged(values_of_identity({}), values), values_of_identity(identity))
        validated(TrainConfig, found, run_url)
    except (UsageError, AttributeError, TypeError) as error:
        raise ContentError(
            f"{run_url}: its identity.json and config.yaml are no settings of this version "
            f"({error}); restore the files, or train with the version that wrote them"
        ) from error
    return found


def stored_config(values: Mapping[str, Any], where: str) -> TrainConfig:
    """Returns the config that a run has stored, all of its options written out.

    Args:
        values: of its `config.yaml`; one of an earlier version lacks options that came later.
        where: named in the error.

    Raises:
        UsageError: it is not a config.
    """
    return validated(TrainConfig, merged(values_of_identity({}), values), where)


# Identity fields that came later, and what runs did that do not name them. The values are frozen: a
# new default changes none of them.
_LATER: dict[str, Any] = {
    "folds": None,
    "fold": None,
    "foreground_share": None,
    "schedule.warmup_epochs": 0.0,
    "schedule.cosine": False,
    "random_streams": 1,
}
