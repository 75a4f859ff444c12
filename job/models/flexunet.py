"""Builds FlexUNet: a U-Net whose kernels and dilations shrink with depth."""

import math
from typing import Any

import keras
import numpy as np

from job.config import ModelConfig
from job.models.compatibility import check_sides
from job.models.dropout import SampleDropout
from job.models.normalization import BatchNormalization, GroupNormalization

_NUM_GROUPS = 8  # groups of channels normalised together; fewer if 8 does not divide the channels


def build_flexunet(
    config: ModelConfig,
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    value_max: float,
    seed: int,
    policy: keras.DTypePolicy,
) -> keras.Model:
    """Returns FlexUNet: a U-Net whose kernels and dilations shrink with depth.

    Creates weights in the order of the reference implementation: encoder from the top, decoder
    from the bottom, head.
    Source: TensorFlow-FlexUNet, sarah-antillia; U-Net, arXiv:1505.04597.
    """
    check_sides(image_shape, config.num_layers)
    block = _BlockFactory(config, seed=seed, policy=policy)
    image = keras.Input(image_shape, name="image")  # (B, H, W, C)
    x = keras.layers.Rescaling(
        1.0 / value_max if config.input_scaling == "unit" else 1.0,
        # Unscaled 16-bit pixels exceed the range of float16.
        dtype="float32" if policy.compute_dtype == "float16" else policy,
        name="input_scaling",
    )(image)
    skips = []
    for level in range(config.num_layers):
        x = block.convolutions(x, level)  # (B, H/2^level, W/2^level, base_filters * 2^level)
        if level < config.num_layers - 1:
            skips.append(x)
            x = keras.layers.MaxPooling2D(dtype=policy)(x)
    for level in reversed(range(config.num_layers - 1)):
        x = block.upsampling(x, level)
        x = keras.layers.Concatenate(dtype=policy)([x, skips[level]])
        x = block.convolutions(x, level)
    logits = keras.layers.Conv2D(
        num_classes,
        1,
        kernel_initializer=block.initializer("glorot_uniform"),
        # Softmax and its gradient need more than the 8 bits of bfloat16.
        dtype="float64" if policy.compute_dtype == "float64" else "float32",
        name="head",
    )(x)
    return keras.Model(image, logits, name="flexunet")


class _BlockFactory:
    """Makes the layers of one FlexUNet; counts them to give each its own seed."""

    def __init__(self, config: ModelConfig, *, seed: int, policy: keras.DTypePolicy) -> None:
        self._config = config
        self._policy = policy
        self._seeds = np.random.SeedSequence(seed)
        self._num_dropouts = 0

    def initializer(self, name: str) -> Any:
        seed = int(self._seeds.spawn(1)[0].generate_state(1)[0] >> 1)
        kinds = {
            "he_normal": keras.initializers.HeNormal,
            "glorot_uniform": keras.initializers.GlorotUniform,
        }
        return kinds[name](seed=seed)

    def convolutions(self, x: Any, level: int) -> Any:
        """Conv → [normalisation] → Dropout(rate × level) → Conv → [normalisation]."""
        x = self._normalized(self._convolution(level)(x))
        rate = self._config.dropout_rate * level
        if rate > 0.0:
            x = SampleDropout(rate, self._num_dropouts, dtype=self._policy)(x)
            self._num_dropouts += 1
        return self._normalized(self._convolution(level)(x))

    def upsampling(self, x: Any, level: int) -> Any:
        return keras.layers.Conv2DTranspose(
            self._config.base_filters * 2**level,
            2,
            strides=2,
            padding="same",
            kernel_initializer=self.initializer("glorot_uniform"),
            dtype=self._policy,
        )(x)

    def _convolution(self, level: int) -> keras.layers.Layer:
        return keras.layers.Conv2D(
            self._config.base_filters * 2**level,
            tuple(max(side - 2 * level, 3) for side in self._config.base_kernels),
            padding="same",
            dilation_rate=tuple(max(step - level, 1) for step in self._config.dilation),
            activation=self._config.activation,
            kernel_initializer=self.initializer("he_normal"),
            dtype=self._policy,
        )

    def _normalized(self, x: Any) -> Any:
        if self._config.normalization == "none":
            return x
        if self._config.normalization == "group":
            # Per image: works for small batches, and replicas need no exchange.
            groups = math.gcd(_NUM_GROUPS, x.shape[-1])
            return GroupNormalization(groups, dtype=self._policy)(x)
        # Statistics over the global batch: replicas compute the same as one device.
        return BatchNormalization(
            momentum=self._config.normalization_momentum, synchronized=True, dtype=self._policy
        )(x)
