"""Calls one model or an ensemble on stored pixels: logits, probabilities, class ids."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from job.models.flips import Flips, mirrored_axes

Network = Callable[[tf.Tensor], tf.Tensor]  # stored pixels (B, H, W, C) -> logits (B, H, W, K)


def network_of(models: Sequence[keras.Model], flips: Flips = "none") -> Network:
    """Returns a network that averages `models` over the mirrored images of `flips`.

    Its probabilities are the mean probabilities. One model without flips gives its own logits.
    """
    mirrored = mirrored_axes(flips)

    def logits_of(model: keras.Model, images: tf.Tensor, turned: list[int]) -> tf.Tensor:
        if not turned:
            return model(prepared(model, images), training=False)
        # Reversed as floating point: there is no GPU kernel for 16-bit pixels.
        found = model(tf.reverse(prepared(model, images), turned), training=False)
        return tf.reverse(found, turned)

    def network(images: tf.Tensor) -> tf.Tensor:
        parts = [logits_of(model, images, turned) for model in models for turned in mirrored]
        if len(parts) == 1:
            return parts[0]
        # The models may have different precisions.
        widest = max((part.dtype for part in parts), key=lambda dtype: dtype.size)
        return _logits_of_mean(tf.stack([tf.cast(part, widest) for part in parts]))

    return network


def _logits_of_mean(logits: tf.Tensor) -> tf.Tensor:
    """Returns logits (B, H, W, K) of the mean probabilities of (N, B, H, W, K), without overflow.

    Softmax logits are logarithms of probabilities; a sigmoid logit is log(p / (1 - p)).
    """
    if logits.shape[-1] == 1:
        log_p, log_not_p = tf.math.log_sigmoid(logits), tf.math.log_sigmoid(-logits)
        return tf.reduce_logsumexp(log_p, axis=0) - tf.reduce_logsumexp(log_not_p, axis=0)
    count = tf.cast(tf.shape(logits)[0], logits.dtype)
    return tf.reduce_logsumexp(tf.nn.log_softmax(logits), axis=0) - tf.math.log(count)


def make_probability_step(network: Network) -> Callable[[Any], tf.Tensor]:
    """Returns the compiled `probability_step(images (B, H, W, C)) -> (B, H, W, K)` float32."""

    @tf.function(reduce_retracing=True, autograph=False)
    def probability_step(images: tf.Tensor) -> tf.Tensor:
        return probabilities_of_logits(network(images))

    return probability_step


def probabilities_of_logits(logits: tf.Tensor) -> tf.Tensor:
    """Returns probabilities (B, H, W, K) float32 of logits (B, H, W, K).

    Softmax over K, or the sigmoid where K = 1.
    """
    is_single = logits.shape[-1] == 1
    return tf.cast(tf.sigmoid(logits) if is_single else tf.nn.softmax(logits), tf.float32)


def probability_model(model: keras.Model, channels: int, bit_depth: int) -> keras.Model:
    """Returns `model` from stored pixels to probabilities, those of `make_probability_step`.

    Args:
        channels: of the stored images.
        bit_depth: likewise, 8 or 16.

    Returns:
        A model (B, H, W, channels) uint8 or uint16 -> (B, H, W, K) float32.
    """
    height, width, wanted = model.input_shape[1:]
    image = keras.Input((height, width, channels), dtype=f"uint{bit_depth}", name="image")
    pixels = keras.ops.cast(image, "float64" if model.dtype == "float64" else "float32")
    if channels == 1 and wanted > 1:
        pixels = keras.ops.repeat(pixels, wanted, axis=-1)
    logits = model(pixels, training=False)
    is_single = logits.shape[-1] == 1
    probabilities = keras.ops.sigmoid(logits) if is_single else keras.ops.softmax(logits)
    return keras.Model(image, keras.ops.cast(probabilities, "float32"), name="probabilities")


def mean_model(models: Sequence[keras.Model]) -> keras.Model:
    """Returns a model of the mean probabilities of models from `probability_model`."""
    first = models[0].inputs[0]
    image = keras.Input(first.shape[1:], dtype=first.dtype, name="image")
    for number, model in enumerate(models):
        model.name = f"run_{number}"  # a model takes each name once
    mean = keras.layers.Average()([model(image) for model in models])
    return keras.Model(image, mean, name="probabilities")


def prepared(model: keras.Model, images: tf.Tensor) -> tf.Tensor:
    """Returns stored pixels (B, H, W, C) as model input: floating point, channels of the model."""
    channels = model.input_shape[-1]
    images = tf.cast(images, tf.float64 if model.dtype == "float64" else tf.float32)
    if images.shape[-1] == 1 and channels > 1:
        images = tf.repeat(images, channels, axis=-1)
    return images


def predicted_ids(logits: tf.Tensor) -> tf.Tensor:
    """Returns the most probable class of each pixel, (B, H, W) int32, for (B, H, W, K) logits.

    K = 1 is a sigmoid output: class 1 if its probability is above one half.
    """
    if logits.shape[-1] == 1:
        return tf.cast(logits[..., 0] > 0, tf.int32)
    return tf.argmax(logits, axis=-1, output_type=tf.int32)
