"""Weighs several heads in one loss, and brings their logits to the size of the labels.

Coarse logits are repeated to the size of the labels. So ignored pixels and class weights count
exactly as for the main head, a cell of several classes learns their shares, and no small region is
lost, as it would be in labels of that size. This costs the memory of one more set of logits per
head, which is little beside the activations of a level.
"""

import tensorflow as tf


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
