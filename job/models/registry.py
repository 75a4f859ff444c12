"""Builds the model that a config names.

A model maps stored pixel values, (B, H, W, C), to logits, (B, H, W, K); with deep supervision it
has more outputs, see `job.models.heads`. To add a model, write a
builder function, and add its name to `BUILDERS` and `job.config.MODELS`.
"""

from collections.abc import Callable

import keras

from flexunet.errors import UsageError
from flexunet.settings import suggestion
from job.config import ModelConfig
from job.models.encoder_unet import build_encoder_unet
from job.models.flexunet import build_flexunet
from job.models.residual_unet import build_residual_unet

# (config, image shape (H, W, C), num_classes, largest pixel value, seed, dtype policy) -> model
Builder = Callable[..., keras.Model]

BUILDERS: dict[str, Builder] = {
    "flexunet": build_flexunet,
    "residual-unet": build_residual_unet,
    "encoder-unet": build_encoder_unet,
}


def build_model(
    config: ModelConfig,
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    value_max: float = 255.0,
    seed: int = 0,
    precision: str = "float32",
) -> keras.Model:
    """Returns the model that `config` names, with weights drawn from `seed`.

    Args:
        image_shape: (H, W, C) of the input, pixels.
        num_classes: logits per pixel; 1 for a single sigmoid output.
        value_max: largest possible pixel value, for input scaling.
        precision: a Keras dtype policy; logits are never narrower than float32.

    Raises:
        UsageError: unknown model, or image sides that do not fit the levels.
    """
    builder = BUILDERS.get(config.name)
    if builder is None:
        raise UsageError(f"model.name={config.name!r}: {suggestion(config.name, list(BUILDERS))}")
    return builder(
        config,
        image_shape=image_shape,
        num_classes=num_classes,
        value_max=value_max,
        seed=seed,
        policy=keras.DTypePolicy(precision),
    )
