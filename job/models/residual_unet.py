"""Builds a U-Net with a residual encoder."""

from typing import Any

import keras

from job.config import ModelConfig
from job.models.blocks import BlockFactory
from job.models.compatibility import check_sides
from job.models.heads import segmentation_heads


def build_residual_unet(
    config: ModelConfig,
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    value_max: float,
    seed: int,
    policy: keras.DTypePolicy,
) -> keras.Model:
    """Returns a U-Net whose encoder has residual blocks, with one convolution per decoder level.

    All kernels have 3 x 3 pixels. Strided convolutions halve the sides. A block computes
    activation(x + norm(conv(activation(norm(conv(x)))))). Where the shape changes, x is averaged
    over 2 x 2 pixels and projected.
    Source: ResNet, arXiv:1512.03385; residual encoders of nnU-Net, arXiv:2404.09556.
    """
    check_sides(image_shape, config)
    block = BlockFactory(config, seed=seed, policy=policy)
    image = keras.Input(image_shape, name="image")  # (B, H, W, C)
    x = _convolution(block, block.scaled(image, value_max), 0)
    levels = []  # (B, H/2^level, W/2^level, filters of the level)
    for level in range(config.num_layers):
        for index in range(_num_blocks(config, level)):
            x = _residual_block(block, x, level, strides=2 if level and not index else 1)
        levels.append(x)
    decoder = [x]
    for level in reversed(range(config.num_layers - 1)):
        x = block.upsampling(x, level)
        x = _convolution(block, keras.layers.Concatenate(dtype=policy)([x, levels[level]]), level)
        decoder.insert(0, x)
    return keras.Model(image, segmentation_heads(block, decoder, num_classes), name="residual_unet")


def _num_blocks(config: ModelConfig, level: int) -> int:
    blocks = config.residual_blocks
    return int(blocks[min(level, len(blocks) - 1)])


def _residual_block(block: BlockFactory, x: Any, level: int, *, strides: int) -> Any:
    """Returns `x` (B, H, W, C) after a residual block with the filters of `level`."""
    filters = block.filters(level)
    found = block.normalized(block.convolution(x, filters, strides=strides))
    found = block.dropout(block.activated(found), level)
    found = block.normalized(block.convolution(found, filters))
    if strides > 1:
        # An average keeps what a strided projection of single pixels would skip.
        x = keras.layers.AveragePooling2D(strides, dtype=block.policy)(x)
    if x.shape[-1] != filters:
        x = block.normalized(block.convolution(x, filters, 1))
    return block.activated(keras.layers.Add(dtype=block.policy)([x, found]))


def _convolution(block: BlockFactory, x: Any, level: int) -> Any:
    """Conv → [normalisation] → activation."""
    return block.activated(block.normalized(block.convolution(x, block.filters(level))))
