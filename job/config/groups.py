"""The groups of options inside `TrainConfig`: model, loss, optimizer, schedule.

Also checks losses against the number of outputs and the image size.
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
    "categorical_focal_dice",
    "dice_foreground",
]
MODELS = ("flexunet", "residual-unet", "encoder-unet")


_ENCODER_LEVELS = 6  # the encoders halve the sides five times
_ENCODER_DEFAULTS = {
    "encoder": "efficientnet-lite0",
    "encoder_weights": "imagenet",
    "encoder_batch_norm": "auto",
    "encoder_frozen_epochs": 0,
}


class ModelConfig(Settings):
    """The network. The defaults are the reference implementation's INbreast network."""

    name: str = option(
        "flexunet",
        "Network: flexunet; residual-unet, a U-Net with a residual encoder and kernels of 3x3; or "
        "encoder-unet, a U-Net with an encoder that can begin with ImageNet weights.",
    )
    num_layers: int = option(
        8,
        "Number of levels; 2**(levels-1) must divide both image sides. encoder-unet always has 6.",
        ge=1,
        le=12,
    )
    base_filters: int = option(
        16, "Filters of the first level; each further level doubles them.", ge=1
    )
    max_filters: int | None = option(
        None, "Most filters of a level; none: they double at every level.", ge=1
    )
    base_kernels: tuple[int, int] = option(
        (9, 9),
        "flexunet: kernel size of the first level, odd, in pixels; 2 less at each level, at least "
        "3.",
    )
    dilation: tuple[int, int] = option(
        (1, 1), "flexunet: dilation of the first level, pixels; 1 less at each level, at least 1."
    )
    residual_blocks: tuple[int, ...] = option(
        (1, 3, 4, 6),
        "residual-unet: blocks of each encoder level; the last number is that of all deeper "
        "levels.",
    )
    encoder: Literal["efficientnet-lite0", "mobilenet-v2"] = option(
        "efficientnet-lite0", "encoder-unet: the encoder."
    )
    encoder_weights: str = option(
        "imagenet",
        "encoder-unet: initial weights of the encoder: imagenet, from the extra flexunet[encoders] "
        "(efficientnet-lite0 only); none: random ones; or a weight file of Keras (.h5, "
        ".weights.h5, .keras). With init_from they come from there.",
        path=True,
    )
    encoder_batch_norm: Literal["auto", "frozen", "synchronized"] = option(
        "auto",
        "encoder-unet: statistics of the encoder's batch normalisation: frozen, those of its "
        "initial weights; synchronized, those of the batch over all replicas. auto: frozen, but "
        "synchronized with random weights.",
    )
    encoder_frozen_epochs: int = option(
        0, "encoder-unet: epochs at the start in which the encoder's weights stay the same.", ge=0
    )
    deep_supervision: int = option(
        0,
        "Heads at this many coarser levels of the decoder, which count in the training loss: half "
        "as much at each level. Predictions use the main head alone.",
        ge=0,
        le=10,
    )
    dropout_rate: float = option(
        0.04,
        "Dropout rate of the second level; the third drops twice as much, the fourth three times, "
        "the first nothing.",
        ge=0.0,
        lt=1.0,
    )
    normalization: Literal["none", "batch", "group", "instance"] = option(
        "none",
        "Normalisation after convolutions; group: 8 groups of channels in each image; instance: "
        "each channel of each image.",
    )
    normalization_momentum: float = option(
        0.99,
        "Batch normalisation: share of the old running statistics kept at each step; lower it for "
        "runs of few steps.",
        gt=0,
        lt=1,
    )
    activation: Literal["relu", "mish"] = option("relu", "Activation of the convolutions.")
    input_scaling: Literal["none", "unit"] = option(
        "unit", "unit: divide pixel values by the largest possible value; none: use them as stored."
    )
    image_channels: int | None = option(
        None, "Input channels; none: the channels of the dataset.", ge=1
    )
    num_classes: int | None = option(
        None, "Output channels; none: one per class of the dataset; 1: one sigmoid output.", ge=1
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

    @field_validator("residual_blocks")
    @classmethod
    def _has_blocks(cls, blocks: tuple[int, ...]) -> tuple[int, ...]:
        if not blocks or min(blocks) < 1:
            raise ValueError("give one or more numbers, each 1 or more")
        return blocks

    @model_validator(mode="after")
    def _kernels_have_an_effect(self) -> "ModelConfig":
        if self.name == "flexunet" or self.name not in MODELS:
            return self
        if self.base_kernels not in ((9, 9), (3, 3)) or self.dilation != (1, 1):
            raise ValueError(
                f"base_kernels={self.base_kernels} and dilation={self.dilation} have no effect on "
                f"name={self.name}, whose kernels are fixed; leave them out"
            )
        return self

    @model_validator(mode="after")
    def _has_levels_to_supervise(self) -> "ModelConfig":
        most = max(0, self.levels - 2)
        if self.deep_supervision > most:
            raise ValueError(
                f"deep_supervision={self.deep_supervision} is too high: the decoder of a network "
                f"of {self.levels} levels has {most} coarser levels; give {most} or less"
            )
        return self

    @model_validator(mode="after")
    def _encoder_fits(self) -> "ModelConfig":
        if not self.has_encoder:
            changed = [
                name for name, value in _ENCODER_DEFAULTS.items() if getattr(self, name) != value
            ]
            if changed:
                raise ValueError(
                    f"{', '.join(changed)}: have no effect on name={self.name}; leave them out, or "
                    "choose name=encoder-unet"
                )
            return self
        if self.encoder == "mobilenet-v2" and self.encoder_weights == "imagenet":
            raise ValueError(
                "encoder_weights=imagenet: no package has these weights of mobilenet-v2; give the "
                "weight file of keras.applications.MobileNetV2, or none"
            )
        if self.input_scaling != "unit":
            raise ValueError(
                "input_scaling=none: encoder-unet scales pixels as its encoder expects; leave it "
                "out"
            )
        return self

    @property
    def has_encoder(self) -> bool:
        """Whether the network has an encoder that others have designed and trained."""
        return self.name == "encoder-unet"

    @property
    def levels(self) -> int:
        """Number of levels of the network."""
        return _ENCODER_LEVELS if self.has_encoder else self.num_layers

    @property
    def pretrained_encoder(self) -> str | None:
        """The source of the encoder's initial weights; None: random weights, or no encoder."""
        is_pretrained = self.has_encoder and self.encoder_weights != "none"
        return self.encoder_weights if is_pretrained else None

    @property
    def has_fixed_statistics(self) -> bool:
        """Whether the encoder normalises with the statistics of its initial weights."""
        if self.encoder_batch_norm == "auto":
            return self.pretrained_encoder is not None
        return self.encoder_batch_norm == "frozen"

    @property
    def exchanges_statistics(self) -> bool:
        """Whether a layer normalises over the global batch."""
        of_encoder = self.has_encoder and not self.has_fixed_statistics
        return self.normalization == "batch" or of_encoder

    @model_validator(mode="after")
    def _dropout_below_one(self) -> "ModelConfig":
        deepest = self.dropout_rate * (self.levels - 1)
        if deepest >= 1.0:
            raise ValueError(
                f"dropout_rate={self.dropout_rate} gives {deepest:.2f} at level "
                f"{self.levels - 1}; it must stay below 1"
            )
        return self


class LossConfig(Settings):
    """The loss that training minimises."""

    name: LossName = option("categorical_crossentropy", "Loss function.")
    class_weights: tuple[float, ...] | None = option(
        None,
        "Weights of pixels by their true class, one number per class id; only the ratios matter. "
        "They apply to all parts of a loss except the structural similarity in basnet_hybrid.",
    )


SSIM_SIZE = 11  # pixels, side of the structural similarity window in basnet_hybrid


def check_class_weights(weights: Sequence[float] | None, num_outputs: int) -> None:
    """Refuses class weights unless there is one per class.

    Raises:
        UsageError: the number or a value is wrong; the message has the right number.
    """
    num_labels = max(num_outputs, 2)
    if weights is None:
        return
    if len(weights) != num_labels or min(weights) < 0 or max(weights) == 0:
        found = ",".join(f"{each:g}" for each in weights)
        raise UsageError(
            f"--loss.class-weights={found}: give {num_labels} numbers, one per class in the order "
            "of the ids, each 0 or more and not all 0"
        )


def check_ssim_sides(height: int, width: int) -> None:
    """Refuses images smaller than the structural similarity window.

    Raises:
        UsageError: names both sizes.
    """
    if min(height, width) < SSIM_SIZE:
        raise UsageError(
            f"--loss.name basnet_hybrid needs images of at least {SSIM_SIZE}x{SSIM_SIZE} pixels, "
            f"got {height}x{width}; choose another loss or a larger image size"
        )


class OptimizerConfig(Settings):
    """The optimizer: Adam or AdamW."""

    name: Literal["adam", "adamw"] = option("adam", "Optimizer.")
    learning_rate: float = option(1e-4, "Initial learning rate; with warm-up, its peak.", gt=0)
    beta_1: float = option(0.9, "Decay of the first moment.", ge=0, lt=1)
    beta_2: float = option(0.999, "Decay of the second moment.", ge=0, lt=1)
    epsilon: float = option(1e-7, "Added to the square root of the second moment.", gt=0)
    weight_decay: float = option(0.004, "Decoupled weight decay; AdamW only.", ge=0)
    encoder_learning_rate_factor: float = option(
        1.0,
        "encoder-unet: learning rate of the encoder / learning rate of the decoder. 0.1 is usual "
        "for pretrained weights.",
        gt=0,
        le=1,
    )
    clipvalue: float | None = option(
        0.4, "Clip each gradient element to +- this value; 0: no clipping.", ge=0
    )
    clipnorm: float | None = option(
        None, "Clip the gradient of each tensor to this norm; 0 or none: no clipping.", ge=0
    )
    ema_momentum: float | None = option(
        None,
        "Keep an exponential average of the weights, and validate and predict with it: share of "
        "the old average kept at each step, at most (1 + t) / (10 + t) at step t from 0. 0.99 or "
        "0.999 are usual. none: no average.",
        gt=0,
        lt=1,
    )


class ScheduleConfig(Settings):
    """Learning rate and early stopping. Plateaus and stopping follow the validation loss."""

    reduce_on_plateau: bool = option(
        True, "Reduce the learning rate when the validation loss stops improving."
    )
    reducer_factor: float = option(0.4, "Factor of each reduction.", gt=0, lt=1)
    reducer_patience: int = option(4, "Epochs without improvement before a reduction.", ge=0)
    min_learning_rate: float = option(0.0, "Lower limit of the reductions.", ge=0)
    early_stopping_patience: int = option(
        10, "Epochs without improvement before training stops; 0: never stop early.", ge=0
    )
    warmup_epochs: float = option(
        0.0, "Warm-up: epochs in which the learning rate rises linearly from 0.", ge=0
    )
    cosine: bool = option(
        False,
        "Cosine decay: after the warm-up, lower the learning rate to 0 at the end of the last "
        "epoch.",
    )

    @model_validator(mode="after")
    def _one_fall(self) -> "ScheduleConfig":
        if self.cosine and self.reduce_on_plateau:
            raise ValueError(
                "cosine and reduce_on_plateau exclude each other; switch one of them off"
            )
        return self
