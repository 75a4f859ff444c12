"""Makes the layers that the networks share: convolutions, normalisation, dropout, upsampling."""

import math
from typing import Any

import keras
import numpy as np

from job.config import ModelConfig
from job.models.dropout import SampleDropout
from job.models.normalization import BatchNormalization, GroupNormalization

_NUM_GROUPS = 8  # groups of channels normalised together; fewer if 8 does not divide the channels


class BlockFactory:
    """Makes the layers of one network; counts them to give each its own seed."""

    def __init__(self, config: ModelConfig, *, seed: int, policy: keras.DTypePolicy) -> None:
        """Starts with the first seed and the first dropout layer."""
        self.config = config
        self.policy = policy
        self._seeds = np.random.SeedSequence(seed)
        self._num_dropouts = 0

    def filters(self, level: int) -> int:
        """Returns the filters of `level`, counted from 0 at full size."""
        doubled: int = self.config.base_filters * 2**level
        return doubled if self.config.max_filters is None else min(doubled, self.config.max_filters)

    def initializer(self, name: str) -> Any:
        """Returns a Keras initializer, he_normal or glorot_uniform, with the next seed."""
        kinds = {
            "he_normal": keras.initializers.HeNormal,
            "glorot_uniform": keras.initializers.GlorotUniform,
        }
        return kinds[name](seed=self.next_seed())

    def next_seed(self) -> int:
        """Returns the seed of the next layer's weights."""
        return int(self._seeds.spawn(1)[0].generate_state(1)[0] >> 1)

    def scaled(self, image: Any, value_max: float) -> Any:
        """Returns the input (B, H, W, C) scaled as `config.input_scaling` says."""
        return self.rescaled(image, 1.0 / value_max if self.config.input_scaling == "unit" else 1.0)

    def rescaled(self, image: Any, scale: float, offset: float = 0.0) -> Any:
        """Returns the input (B, H, W, C) times `scale` plus `offset`."""
        return keras.layers.Rescaling(
            scale,
            offset,
            # Unscaled 16-bit pixels exceed the range of float16.
            dtype="float32" if self.policy.compute_dtype == "float16" else self.policy,
            name="input_scaling",
        )(image)

    def convolution(
        self, x: Any, filters: int, side: int = 3, *, strides: int = 1, activation: Any = None
    ) -> Any:
        """Returns `x` (B, H, W, C) after a convolution with a kernel of `side` x `side` pixels."""
        return keras.layers.Conv2D(
            filters,
            side,
            strides=strides,
            padding="same",
            activation=activation,
            kernel_initializer=self.initializer("he_normal"),
            dtype=self.policy,
        )(x)

    def upsampling(self, x: Any, level: int) -> Any:
        """Returns `x` (B, H, W, C) with twice the sides and the filters of `level`."""
        return keras.layers.Conv2DTranspose(
            self.filters(level),
            2,
            strides=2,
            padding="same",
            kernel_initializer=self.initializer("glorot_uniform"),
            dtype=self.policy,
        )(x)

    def dropout(self, x: Any, level: int) -> Any:
        """Returns `x` (B, H, W, C) after the dropout of `level`, which is none at level 0."""
        rate = self.config.dropout_rate * level
        if rate > 0.0:
            x = SampleDropout(rate, self._num_dropouts, dtype=self.policy)(x)
            self._num_dropouts += 1
        return x

    def normalized(self, x: Any) -> Any:
        """Returns `x` (B, H, W, C) normalised as `config.normalization` says."""
        kind = self.config.normalization
        if kind == "none":
            return x
        if kind == "batch":
            # Statistics over the global batch: replicas compute the same as one device.
            return BatchNormalization(
                momentum=self.config.normalization_momentum, synchronized=True, dtype=self.policy
            )(x)
        # Per image: works for small batches, and replicas need no exchange.
        channels = x.shape[-1]
        groups = channels if kind == "instance" else math.gcd(_NUM_GROUPS, channels)
        return GroupNormalization(groups, dtype=self.policy)(x)

    def activated(self, x: Any) -> Any:
        """Returns `x` (B, H, W, C) after the activation of the config."""
        return keras.layers.Activation(self.config.activation, dtype=self.policy)(x)
