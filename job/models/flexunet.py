"""Builds FlexUNet: a U-Net whose kernels and dilations shrink with depth."""

from typing import Any

import keras

from job.config import ModelConfig
from job.models.blocks import BlockFactory
from job.models.compatibility import check_sides
from job.models.heads import segmentation_heads


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
    check_sides(image_shape, config)
    block = BlockFactory(config, seed=seed, policy=policy)
    image = keras.Input(image_shape, name="image")  # (B, H, W, C)
    x = block.scaled(image, value_max)
    skips = []
    for level in range(config.num_layers):
        x = _convolutions(block, x, level)  # (B, H/2^level, W/2^level, filters of the level)
        if level < config.num_layers - 1:
            skips.append(x)
            x = keras.layers.MaxPooling2D(dtype=policy)(x)
    decoder = [x]
    for level in reversed(range(config.num_layers - 1)):
        x = block.upsampling(x, level)
        x = keras.layers.Concatenate(dtype=policy)([x, skips[level]])
        x = _convolutions(block, x, level)
        decoder.insert(0, x)
    return keras.Model(image, segmentation_heads(block, decoder, num_classes), name="flexunet")


def _convolutions(block: BlockFactory, x: Any, level: int) -> Any:
    """Conv → [normalisation] → Dropout(rate × level) → Conv → [normalisation]."""
    x = block.normalized(_convolution(block, level)(x))
    x = block.dropout(x, level)
    return block.normalized(_convolution(block, level)(x))


def _convolution(block: BlockFactory, level: int) -> keras.layers.Layer:
    config = block.config
    return keras.layers.Conv2D(
        block.filters(level),
        tuple(max(side - 2 * level, 3) for side in config.base_kernels),
        padding="same",
        dilation_rate=tuple(max(step - level, 1) for step in config.dilation),
        activation=config.activation,
        kernel_initializer=block.initializer("he_normal"),
        dtype=block.policy,
    )
