"""Makes the output layers of a network, weighs them in the loss, and selects the one that predicts.

Deep supervision (arXiv:1409.5185): besides the main head, coarser levels of the decoder have heads
of their own. They count in the training loss alone. Predictions, evaluations and exports use the
main head.

Coarse logits are repeated to the size of the labels. So ignored pixels and class weights count
exactly as for the main head, a cell of several classes learns their shares, and no small region is
lost, as it would be in labels of that size. This costs the memory of one more set of logits per
head, which is little beside the activations of a level.
"""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from job.models.blocks import BlockFactory


def segmentation_heads(block: BlockFactory, decoder: Sequence[Any], num_classes: int) -> Any:
    """Returns the logits of the main head, or those of all heads as a list with the main one first.

    Args:
        decoder: outputs of the decoder by level, (B, H / 2^level, W / 2^level, C) each.
        num_classes: logits per pixel.

    Returns:
        (B, H, W, num_classes), or also (B, H / 2^level, W / 2^level, num_classes) for each of the
        levels 1 to `deep_supervision`.
    """
    main = _head(block, decoder[0], num_classes, "head")
    # After the main head, which keeps its seed.
    coarser = [
        _head(block, decoder[level], num_classes, f"head_level_{level}")
        for level in range(1, 1 + block.config.deep_supervision)
    ]
    return [main, *coarser] if coarser else main


def _head(block: BlockFactory, x: Any, num_classes: int, name: str) -> Any:
    return keras.layers.Conv2D(
        num_classes,
        1,
        kernel_initializer=block.initializer("glorot_uniform"),
        # Softmax and its gradient need more than the 8 bits of bfloat16.
        dtype="float64" if block.policy.compute_dtype == "float64" else "float32",
        name=name,
    )(x)


def main_model(model: keras.Model) -> keras.Model:
    """Returns the part of `model` that predicts: (B, H, W, C) -> logits (B, H, W, K).

    It shares the weights of `model`, and is `model` itself if that has no other heads.
    """
    if len(model.outputs) == 1:
        return model
    return keras.Model(model.inputs[0], model.outputs[0], name=model.name)


def outputs_of(found: Any) -> list[Any]:
    """Returns the outputs of a call of a model as a list, the main head's first."""
    return list(found) if isinstance(found, list | tuple) else [found]


def head_weights(number: int) -> list[float]:
    """Returns the weights of `number` heads, the main one first; they add up to 1."""
    halves = [0.5**level for level in range(number)]
    return [each / sum(halves) for each in halves]


def at_size_of(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Returns logits (B, h, w, C), each repeated to fill the (B, H, W) of the labels."""
    (_, height, width, channels), sides = logits.shape, labels.shape[1:]
    steps = (sides[0] // height, sides[1] // width)
    # By broadcasting: its gradient is a sum, with the same bits on every run.
    cells = logits[:, :, tf.newaxis, :, tf.newaxis, :]
    shape = (tf.shape(logits)[0], height, steps[0], width, steps[1], channels)
    return tf.reshape(tf.broadcast_to(cells, shape), (-1, *sides, channels))
