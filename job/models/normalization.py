"""Computes group and batch normalisation exactly for large images, ignoring padding.

Weights, options and file entries are those of the Keras layers of the same names. The computation
differs for two reasons.

Sums. TensorFlow sums a middle axis as one chain of float32 additions. Over a whole image this loses
up to three digits: the group normalisation of Keras is off by 1e-3 for a batch of 1 at 512 x 512,
and an image alone gives another result than the same image in a batch. Here a mean over pixels is
taken along W, then along H, so that no chain is longer than one side. The variance is the mean of
centred squares. The gradients of the weights are summed in the same way.

Padding. Batch normalisation uses all samples of the global batch except those of weight 0.
`counted_samples` passes the weights to the layers, because a layer of a functional model gets only
its own input.

Precision. 16-bit inputs are computed in float32.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import keras
import tensorflow as tf

Gradients: TypeAlias = Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor, tf.Tensor]]

_sample_weights: ContextVar[tf.Tensor | None] = ContextVar("sample_weights", default=None)


@contextmanager
def counted_samples(weights: tf.Tensor) -> Iterator[None]:
    """Passes `weights`, (B,), to the batch normalisation layers called inside the block.

    A sample of weight 0 changes neither statistics nor gradients. Outside the block, all samples
    count.
    """
    token = _sample_weights.set(weights)
    try:
        yield
    finally:
        _sample_weights.reset(token)


@keras.saving.register_keras_serializable("flexunet")
class GroupNormalization(keras.layers.GroupNormalization):
    """Normalises each group of channels of each image, as Wu and He 2018, arXiv:1803.08494."""

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Creates gamma and beta, (C,) each, for inputs (B, H, W, C).

        Raises:
            ValueError: other inputs, or the channels do not divide into the groups.
        """
        _check_axes(self, input_shape)
        super().build(input_shape)

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Returns `inputs` (B, H, W, C) normalised, in the layer's compute dtype."""
        outputs, _, _ = _normalized(self, inputs, _Groups(inputs.shape[-1] // self.groups))
        return tf.cast(outputs, self.compute_dtype)


@keras.saving.register_keras_serializable("flexunet")
class BatchNormalization(keras.layers.BatchNormalization):
    """Normalises each channel over the samples that count, as arXiv:1502.03167.

    With `synchronized`, these are the samples of all replicas, and all replicas must call it.
    """

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Creates gamma, beta and the moving mean and variance, (C,) each.

        Raises:
            ValueError: inputs other than (B, H, W, C), or `renorm`.
        """
        _check_axes(self, input_shape)
        if self.renorm:
            raise ValueError(f"{self.name}: renorm=True is not supported; leave it out")
        super().build(input_shape)

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        """Returns `inputs` (B, H, W, C) normalised, in the layer's compute dtype.

        Training uses the batch statistics and updates the moving statistics with them. Otherwise
        uses the moving statistics.
        """
        if not (training and self.trainable):
            return super().call(inputs, training=False)
        samples = _Samples(_sample_counts(inputs), is_global=self.synchronized)
        outputs, mean, variance = _normalized(self, inputs, samples)
        for moving, value in ((self.moving_mean, mean), (self.moving_variance, variance)):
            change = tf.cast(value[0], moving.dtype) * (1 - self.momentum)
            moving.assign(moving * self.momentum + change)
        return tf.cast(outputs, self.compute_dtype)


@keras.saving.register_keras_serializable("flexunet")
class FixedBatchNormalization(BatchNormalization):
    """Normalises each channel with the moving statistics, also in training; they never change.

    Gamma and beta are trained. For an encoder with pretrained weights: its statistics come from
    many more images than a batch has, and replicas need no exchange.
    """

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        """Returns `inputs` (B, H, W, C) normalised, in the layer's compute dtype."""
        inputs = tf.cast(inputs, tf.float64 if inputs.dtype == tf.float64 else tf.float32)
        mean, variance, gamma, beta = (
            tf.cast(each, inputs.dtype)
            for each in (self.moving_mean, self.moving_variance, self.gamma, self.beta)
        )
        scale = gamma * tf.math.rsqrt(variance + self.epsilon)
        return tf.cast(_scaled(inputs, mean, scale, beta), self.compute_dtype)


def _scaled(inputs: tf.Tensor, mean: tf.Tensor, scale: tf.Tensor, beta: tf.Tensor) -> tf.Tensor:
    """Returns (inputs - mean) * scale + beta, for inputs (B, H, W, C) and (C,) each.

    The gradient is explicit, because an automatic one would have inexact sums.
    """

    @tf.custom_gradient
    def scaled(inputs: tf.Tensor, scale: tf.Tensor, beta: tf.Tensor) -> tuple[tf.Tensor, Gradients]:
        def gradients(output: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            num_pixels = tf.cast(tf.reduce_prod(tf.shape(inputs)[1:3]), inputs.dtype)
            plain, along = _pixel_mean(output), _pixel_mean(output * (inputs - mean))
            sums = (num_pixels * tf.reduce_sum(each, axis=0) for each in (along, plain))
            return (output * scale, *sums)

        return inputs * scale + (beta - mean * scale), gradients

    return scaled(inputs, scale, beta)


def _check_axes(layer: keras.layers.Layer, input_shape: tuple[int | None, ...]) -> None:
    if len(input_shape) != 4 or layer.axis not in (-1, 3):
        raise ValueError(
            f"{layer.name}: axis={layer.axis} of inputs {input_shape}; "
            "only the channels of (B, H, W, C) can be normalised"
        )


def _sample_counts(inputs: tf.Tensor) -> tf.Tensor:
    """Returns (B, 1) float32: 1 for each sample of `inputs` that counts, else 0."""
    weights = _sample_weights.get()
    if weights is None:
        return tf.ones((tf.shape(inputs)[0], 1))
    return tf.cast(weights > 0, tf.float32)[:, tf.newaxis]


class _Together(Protocol):
    """Averages over everything that shares a mean and a variance, besides the pixels."""

    def average(self, values: tf.Tensor) -> tf.Tensor:
        """Returns the mean, broadcastable to (B, C), of per-image `values` (B, C)."""

    def spread(self, gradient: tf.Tensor) -> tf.Tensor:
        """Returns the gradient of the values, (B, C), from the gradient of their mean, (B, C)."""


@dataclass(frozen=True)
class _Groups:
    """Averages over the channels of a group."""

    num_channels: int  # of one group

    def average(self, values: tf.Tensor) -> tf.Tensor:
        num_groups = values.shape[-1] // self.num_channels
        grouped = tf.reshape(values, (-1, num_groups, self.num_channels))
        means = tf.reduce_mean(grouped, axis=2, keepdims=True)
        return tf.reshape(tf.broadcast_to(means, tf.shape(grouped)), tf.shape(values))

    def spread(self, gradient: tf.Tensor) -> tf.Tensor:
        return self.average(gradient)  # the averaging matrix is symmetric


@dataclass(frozen=True)
class _Samples:
    """Averages over the samples of a batch that count; of all replicas if global."""

    counted: tf.Tensor  # (B, 1) float32, 0 or 1
    is_global: bool

    def average(self, values: tf.Tensor) -> tf.Tensor:
        return self._mean_of_sum(values * tf.cast(self.counted, values.dtype))

    def spread(self, gradient: tf.Tensor) -> tf.Tensor:
        # Padding is normalised with the statistics but does not contribute to them.
        return self._mean_of_sum(gradient) * tf.cast(self.counted, gradient.dtype)

    def _mean_of_sum(self, values: tf.Tensor) -> tf.Tensor:
        """Returns the sum of `values` (B, C) by the number of samples that count, (1, C)."""
        number = tf.cast(tf.reduce_sum(self.counted), values.dtype)
        sums = tf.concat([tf.reduce_sum(values, axis=0), [number]], axis=0)
        # None inside a strategy's scope but outside its `run`, as when a model is built.
        context = tf.distribute.get_replica_context()
        if self.is_global and context is not None:
            sums = context.all_reduce(tf.distribute.ReduceOp.SUM, sums)
        return tf.math.divide_no_nan(sums[:-1], sums[-1])[tf.newaxis]


def _normalized(
    layer: Any, inputs: tf.Tensor, together: _Together
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns the outputs, and mean and variance, broadcastable to (B, C), without gradient.

    The gradient is explicit: an automatic one would have inexact sums and read the inputs more
    often. With x the centred inputs, s = 1 / sqrt(variance + epsilon), y = gamma s x + beta and g
    the gradient of y, the gradient of the inputs is

        gamma s g - M(gamma s g) - s^2 x M(gamma s g x)

    where M is the mean over all values that are normalised together.
    """
    # As in Keras, only float64 inputs are computed in more than float32.
    inputs = tf.cast(inputs, tf.float64 if inputs.dtype == tf.float64 else tf.float32)
    fixed = tf.stop_gradient(inputs)
    mean = together.average(_pixel_mean(fixed))
    squares = tf.math.squared_difference(fixed, _per_pixel(mean))
    variance = together.average(_pixel_mean(squares))
    inverse = tf.math.rsqrt(variance + layer.epsilon)

    @tf.custom_gradient
    def normalized(
        inputs: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor
    ) -> tuple[tf.Tensor, Gradients]:
        scale = gamma * inverse

        def gradients(output: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            # Wait for the gradient: otherwise TensorFlow centres early and keeps the result long.
            with tf.control_dependencies([output]):
                centred = inputs - _per_pixel(mean)
            plain, along = _pixel_mean(output), _pixel_mean(output * centred)
            # Both in one call: the latency of a collective costs more than its data.
            both = together.spread(tf.concat([scale * plain, scale * along], axis=1))
            offset, slope = tf.split(both, 2, axis=1)
            found = output * _per_pixel(scale) - centred * _per_pixel(slope * inverse**2)
            num_pixels = tf.cast(tf.reduce_prod(tf.shape(inputs)[1:3]), inputs.dtype)
            return (
                found - _per_pixel(offset),
                num_pixels * tf.reduce_sum(along * inverse, axis=0),
                num_pixels * tf.reduce_sum(plain, axis=0),
            )

        # Centring the inputs first would be one more pass over them.
        return inputs * _per_pixel(scale) + _per_pixel(beta - mean * scale), gradients

    channels = inputs.shape[-1]
    gamma = tf.cast(layer.gamma, inputs.dtype) if layer.scale else tf.ones(channels, inputs.dtype)
    beta = tf.cast(layer.beta, inputs.dtype) if layer.center else tf.zeros(channels, inputs.dtype)
    return normalized(inputs, gamma, beta), mean, variance


def _pixel_mean(values: tf.Tensor) -> tf.Tensor:
    """Returns the mean over the pixels of each image, (B, C), of `values` (B, H, W, C)."""
    return tf.reduce_mean(tf.reduce_mean(values, axis=2), axis=1)


def _per_pixel(values: tf.Tensor) -> tf.Tensor:
    """Returns `values` (B, C) as (B, 1, 1, C)."""
    return values[:, tf.newaxis, tf.newaxis, :]
