"""Rebuilds networks from layers of Keras alone, in float32 and for images of any size.

A file of such a network loads where this package is not installed, because it names no class of
this package. Dropout becomes the identity. Batch normalisation becomes that of Keras, which
computes the same outside of training. Group normalisation becomes plain operations, because that of
Keras is inexact for large images (see `job.models.normalization`).
"""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from job.exporting.parity import CLASS_IDS, INPUT, PROBABILITIES
from job.models.dropout import SampleDropout
from job.models.ensemble import mean_model, probability_model
from job.models.normalization import BatchNormalization, GroupNormalization
from job.postprocessing.masks import DEFAULT_THRESHOLD, class_weights, has_default_thresholds


def serving_model(
    networks: Sequence[keras.Model], *, channels: int, bit_depth: int, thresholds: Sequence[float]
) -> keras.Model:
    """Returns one model of the mean probabilities of `networks`, made of layers of Keras alone.

    Args:
        networks: (B, H, W, C) -> logits (B, H, W, K) each.
        channels: of the images, as the dataset stores them.
        bit_depth: likewise, 8 or 16.
        thresholds: of each class but 0; empty: the most probable class is predicted.

    Returns:
        A model (B, H, W, channels) uint8 or uint16 -> a dictionary: "probabilities" (B, H, W, K)
        float32, and "class_ids" (B, H, W) uint8.
    """
    models = [probability_model(portable(each), channels, bit_depth) for each in networks]
    whole = models[0] if len(models) == 1 else mean_model(models)
    probabilities = whole.outputs[0]
    outputs = {PROBABILITIES: probabilities, CLASS_IDS: _class_ids(probabilities, thresholds)}
    return keras.Model(whole.inputs[0], outputs, name="segmentation")


def portable(network: keras.Model) -> keras.Model:
    """Returns a float32 copy of `network` made of layers of Keras alone, for any image size."""
    copies: dict[str, keras.layers.Layer] = {}

    def copied(layer: keras.layers.Layer) -> keras.layers.Layer:
        copies[layer.name] = _copied(layer)
        return copies[layer.name]

    image = keras.Input((None, None, network.input_shape[-1]), dtype="float32", name=INPUT)
    found = keras.models.clone_model(network, input_tensors=image, clone_function=copied)
    for layer in network.layers:
        if layer.weights:
            copies[layer.name].set_weights(_weights_of(layer))
    return found


def _copied(layer: keras.layers.Layer) -> keras.layers.Layer:
    """Returns a layer of Keras that computes the same as `layer` outside of training."""
    if isinstance(layer, SampleDropout):
        return keras.layers.Identity(dtype="float32", name=layer.name)
    if isinstance(layer, GroupNormalization):
        return _group_normalization(layer)
    config = layer.get_config() | {"dtype": "float32"}
    if isinstance(layer, BatchNormalization):
        return keras.layers.BatchNormalization.from_config(config | {"synchronized": False})
    return layer.__class__.from_config(config)


def _weights_of(layer: keras.layers.Layer) -> list[np.ndarray]:
    """Returns the weights of the copy of `layer`."""
    if isinstance(layer, GroupNormalization):
        return [layer.gamma.numpy().reshape(1, 1, -1, 1), layer.beta.numpy()]
    weights: list[np.ndarray] = layer.get_weights()
    return weights


def _group_normalization(layer: GroupNormalization) -> keras.Model:
    """Returns group normalisation as operations of Keras: (B, H, W, C) -> (B, H, W, C)."""
    channels = layer.input.shape[-1]
    ops, x = keras.ops, keras.Input((None, None, channels), dtype="float32", name="x")
    centred = ops.subtract(x, _group_mean(x, layer.groups))
    variance = _group_mean(ops.square(centred), layer.groups)
    normalized = ops.multiply(centred, ops.rsqrt(ops.add(variance, layer.epsilon)))
    # A factor and an offset for each channel.
    scaled = keras.layers.DepthwiseConv2D(1, name="gamma_and_beta")(normalized)
    return keras.Model(x, scaled, name=layer.name)


def _group_mean(values: Any, num_groups: int) -> Any:
    """Returns the mean over the pixels and channels of a group, (B, 1, 1, C), for (B, H, W, C).

    A mean is taken along W, then along H: one chain of additions over a whole image is inexact.
    """
    ops, channels = keras.ops, values.shape[-1]
    means = ops.mean(ops.mean(values, axis=2), axis=1)  # (B, C)
    size = channels // num_groups
    if size > 1:
        grouped = ops.reshape(means, (-1, num_groups, size))
        means = ops.tile(ops.mean(grouped, axis=2, keepdims=True), (1, 1, size))
    return ops.reshape(means, (-1, 1, 1, channels))


def _class_ids(probabilities: Any, thresholds: Sequence[float]) -> Any:
    """Returns the class (B, H, W) uint8 of (B, H, W, K), as `masks.class_ids` does."""
    ops, num_outputs = keras.ops, probabilities.shape[-1]
    is_default = has_default_thresholds(thresholds)
    if num_outputs == 1 and is_default:
        return ops.cast(ops.greater(ops.squeeze(probabilities, -1), DEFAULT_THRESHOLD), "uint8")
    if num_outputs <= 2 and not is_default:
        last = ops.take(probabilities, num_outputs - 1, axis=-1)
        return ops.cast(ops.greater_equal(last, float(np.float32(thresholds[0]))), "uint8")
    if not is_default:
        weights = class_weights(thresholds).tolist()
        probabilities = keras.layers.Rescaling(weights, name="threshold_weights")(probabilities)
    # As argmax, which in Keras takes many more operations for floating point.
    is_best = ops.equal(probabilities, ops.max(probabilities, axis=-1, keepdims=True))
    ids = np.arange(num_outputs, dtype=np.float32)
    return ops.cast(ops.min(ops.where(is_best, ids, float(num_outputs)), axis=-1), "uint8")
