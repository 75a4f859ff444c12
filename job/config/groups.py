"""The groups of options inside `TrainConfig`: model, loss, optimizer, schedule, augmentation.

Also the checks of a loss that need the number of outputs or the size of the pictures.
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import field_validator, model_validator

from flexunet.errors import UsageError
from flexunet.settings import Settings, option

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
MODELS = ("flexunet",)


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


def _probability(default: float, what: str) -> float:
    text = f"Probability that a sample is {what}."
    return option(default, text, ge=0, le=1)


class AugmentationConfig(Settings):
    """Random changes of training samples, new in every epoch; lengths are pixels."""

    enabled: bool = option(False, "Augment training samples.")
    hflip_probability: float = _probability(0.5, "mirrored left to right")
    vflip_probability: float = _probability(0.5, "mirrored top to bottom")
    rotation_probability: float = _probability(0.5, "rotated about its centre")
    rotation_angles: tuple[float, ...] = option(
        (90.0, 180.0, 270.0), "Angles to choose from, degrees, anticlockwise."
    )
    shrink_probability: float = _probability(0.25, "shrunk towards its centre")
    shrink_ratios: tuple[float, ...] = option((0.8,), "New side / old side, to choose from.")
    shear_probability: float = _probability(0.0, "sheared sideways")
    shear_factors: tuple[float, ...] = option(
        (-0.1, 0.1), "Sideways shift / distance from the middle row, to choose from."
    )
    deformation_probability: float = _probability(0.0, "deformed elastically")
    deformation_alpha: float = option(
        1300.0, "Strength of the elastic field; 1300 with sigma 8: shifts of 2.3 pixels rms.", ge=0
    )
    deformation_sigmas: tuple[float, ...] = option(
        (8.0,), "Smoothness of the elastic field, pixels, to choose from."
    )
    distortion_probability: float = _probability(0.0, "distorted by a wide smooth field")
    distortion_sigma: float = option(40.0, "Smoothness of that field, pixels.", ge=1)
    distortion_sizes: tuple[float, ...] = option(
        (0.02,), "Largest shift / longer side of the picture, to choose from."
    )
    barrel_probability: float = _probability(0.0, "given a barrel distortion")
    barrel_radius: float = option(0.5, "Radius of the circle / width of the picture.", gt=0)
    barrel_amount: float = option(0.5, "Strength, above 0.", gt=0, le=4)
    barrel_centers: tuple[float, ...] = option(
        (0.5, 0.5), "Centres x,y,x,y... / width and height, to choose from."
    )
    pincushion_probability: float = _probability(0.0, "given a pincushion distortion")
    pincushion_radius: float = option(0.5, "Radius of the circle / width of the picture.", gt=0)
    pincushion_amount: float = option(-0.5, "Strength, between -1 and 0.", gt=-1, lt=0)
    pincushion_centers: tuple[float, ...] = option(
        (0.5, 0.5), "Centres x,y,x,y... / width and height, to choose from."
    )
    sharpening_probability: float = _probability(0.0, "sharpened")
    sharpening_k: float = option(1.0, "Strength: 3x3 kernel of -k around 1 + 8k.", ge=0)
    brightening_probability: float = _probability(0.0, "brightened")
    brightening_alpha: float = option(1.2, "Factor on the pixel values.", gt=0)
    brightening_beta: float = option(10.0, "Added to them, in levels of 255.")

    @model_validator(mode="after")
    def _choices_are_possible(self) -> "AugmentationConfig":
        for name in ("rotation_angles", "shear_factors", "shrink_ratios"):
            if not getattr(self, name):
                raise ValueError(
                    f"{name} is empty; to switch the kind off set its probability to 0"
                )
        for name in ("shrink_ratios", "deformation_sigmas", "distortion_sizes"):
            values = getattr(self, name)
            if not values or min(values) <= 0:
                raise ValueError(f"{name}={values}: give one or more numbers above 0")
        for name in ("barrel_centers", "pincushion_centers"):
            values = getattr(self, name)
            if not values or len(values) % 2:
                raise ValueError(f"{name}={values}: give pairs x,y")
        return self
