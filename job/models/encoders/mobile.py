"""Builds encoders of inverted residual blocks.

The layers, and the order of their weights, are those of the published networks without their
classifier. Padding is TensorFlow's "same", which for strides of 2 pads more at the end; with
symmetric padding the published weights give other features.
"""

import math
from typing import Any

import keras

from job.models.blocks import BlockFactory
from job.models.encoders.stages import Encoder, Stage
from job.models.normalization import BatchNormalization, FixedBatchNormalization

PREFIX = "encoder_"  # begins the names of all layers of an encoder
_EPSILON = 1e-3  # of the batch normalisation of both networks


def encoder_features(block: BlockFactory, encoder: Encoder, x: Any) -> list[Any]:
    """Returns the features of levels 1 to 5, (B, H / 2^level, W / 2^level, C) each.

    The features of a level are the last ones before the sides are halved again.

    Args:
        block: its config says how batch normalisation works.
        x: (B, H, W, C) scaled for `encoder`.
    """
    layers = _Layers(block)
    x = layers.convolution(x, encoder.stem, 3, "stem", strides=2)
    levels, number = [], 0
    for stage in encoder.stages:
        if stage.strides > 1:
            levels.append(x)
        for index in range(stage.repeats):
            name = f"block_{number}"
            x = layers.inverted_residual(x, stage, name, strides=1 if index else stage.strides)
            number += 1
    return [*levels, x]


def is_encoder_weight(variable: Any) -> bool:
    """Returns whether a Keras variable is part of an encoder."""
    return bool(variable.path.startswith(PREFIX))


def encoder_layers(model: keras.Model) -> list[Any]:
    """Returns the layers of the encoder that have weights, from the stem on."""
    return [each for each in model.layers if each.name.startswith(PREFIX) and each.weights]


class _Layers:
    """Makes the layers of one encoder."""

    def __init__(self, block: BlockFactory) -> None:
        self._block = block
        self._policy = block.policy

    def inverted_residual(self, x: Any, stage: Stage, name: str, *, strides: int) -> Any:
        """Returns `x` (B, H, W, C) expanded, filtered by channel, and projected."""
        channels, found = x.shape[-1], x
        if stage.expansion > 1:
            found = self.convolution(found, channels * stage.expansion, 1, f"{name}_expand")
        found = self._depthwise(found, stage.side, f"{name}_depthwise", strides)
        found = self.convolution(found, stage.filters, 1, f"{name}_project", is_linear=True)
        if strides > 1 or channels != stage.filters:
            return found
        return keras.layers.Add(dtype=self._policy)([x, found])

    def convolution(
        self,
        x: Any,
        filters: int,
        side: int,
        name: str,
        *,
        strides: int = 1,
        is_linear: bool = False,
    ) -> Any:
        """Returns `x` after convolution, batch normalisation and, if not linear, ReLU6."""
        x = keras.layers.Conv2D(
            filters,
            side,
            strides=strides,
            padding="same",
            use_bias=False,
            kernel_initializer=self._block.initializer("he_normal"),
            dtype=self._policy,
            name=f"{PREFIX}{name}_conv",
        )(x)
        x = self._normalized(x, name)
        return x if is_linear else self._activated(x)

    def _depthwise(self, x: Any, side: int, name: str, strides: int) -> Any:
        x = keras.layers.DepthwiseConv2D(
            side,
            strides=strides,
            padding="same",
            use_bias=False,
            # He's, of one input channel; that of Keras counts all of them.
            depthwise_initializer=keras.initializers.RandomNormal(
                stddev=math.sqrt(2.0) / side, seed=self._block.next_seed()
            ),
            dtype=self._policy,
            name=f"{PREFIX}{name}_conv",
        )(x)
        return self._activated(self._normalized(x, name))

    def _normalized(self, x: Any, name: str) -> Any:
        config = self._block.config
        options = {"epsilon": _EPSILON, "dtype": self._policy, "name": f"{PREFIX}{name}_norm"}
        if config.has_fixed_statistics:
            return FixedBatchNormalization(**options)(x)
        momentum = config.normalization_momentum
        return BatchNormalization(momentum=momentum, synchronized=True, **options)(x)

    def _activated(self, x: Any) -> Any:
        return keras.layers.Activation("relu6", dtype=self._policy)(x)
