"""Builds a U-Net whose encoder can begin with weights that others have trained."""

from typing import Any

import keras

from job.config import ModelConfig
from job.models.blocks import BlockFactory
from job.models.compatibility import check_sides
from job.models.encoders.mobile import encoder_features
from job.models.encoders.stages import ENCODERS
from job.models.heads import segmentation_heads


def build_encoder_unet(
    config: ModelConfig,
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    value_max: float,
    seed: int,
    policy: keras.DTypePolicy,
) -> keras.Model:
    """Returns a U-Net of 6 levels with the encoder that `config` names, with random weights.

    `job.models.encoders.pretrained` sets the encoder's weights. The decoder has two convolutions of
    3 x 3 pixels per level; at full size its skip connection is the scaled image.
    """
    check_sides(image_shape, config)
    block = BlockFactory(config, seed=seed, policy=policy)
    encoder = ENCODERS[config.encoder]
    image = keras.Input(image_shape, name="image")  # (B, H, W, C)
    scale = 255.0 / value_max / encoder.scale
    x = block.rescaled(image, scale, -encoder.offset / encoder.scale)
    skips = [x, *encoder_features(block, encoder, x)]
    decoder = [skips.pop()]
    for level in reversed(range(len(skips))):
        x = block.upsampling(decoder[0], level)
        x = keras.layers.Concatenate(dtype=policy)([x, skips[level]])
        decoder.insert(0, _convolutions(block, x, level))
    return keras.Model(image, segmentation_heads(block, decoder, num_classes), name="encoder_unet")


def _convolutions(block: BlockFactory, x: Any, level: int) -> Any:
    """(Conv → [normalisation] → activation) twice, with the dropout of the level between."""
    filters = block.filters(level)
    x = block.activated(block.normalized(block.convolution(x, filters)))
    x = block.dropout(x, level)
    return block.activated(block.normalized(block.convolution(x, filters)))
