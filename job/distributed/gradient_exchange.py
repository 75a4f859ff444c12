"""Computes the gradient of the global batch from gathered inputs, without sending gradients.

The gradient of a linear layer `y = x * W + b` (convolution, transposed convolution, dense) is
`dW = g(x, dy)`, where `g` is a sum over samples. So over replicas r

    sum_r g(x_r, dy_r) = g(concat_r x_r, concat_r dy_r)

The left side is all-reduce: each of N replicas sends `2 (N-1)/N |W|` bytes in a ring. On the right
side every replica gathers the inputs and output gradients of all replicas, `(N-1)(|x| + |dy|)`
bytes each, and computes `g` for the whole batch, `N-1` times more than its share. Both are the same
sum in another order. Deep layers of a U-Net have large kernels and few pixels: there the right side
sends a hundredth of the bytes. `job.distributed.exchange_plan` chooses the way for each layer.

The method is sufficient factor broadcasting: Xie et al. 2015, arXiv:1511.08486. The choice per
layer is that of Poseidon: Zhang et al. 2017, arXiv:1706.03292.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from job.distributed.all_reduce import sum_over_replicas
from job.distributed.exchange_plan import Plan

_BUCKET_BYTES = 4 << 20  # gathered together: large enough that bandwidth dominates, not latency


@dataclass(frozen=True)
class LayerFactors:
    """Records one call of a layer on a replica: its input, and its output before activation."""

    layer: Any
    inputs: tf.Tensor
    output: tf.Tensor


@dataclass(frozen=True)
class LocalGradient:
    """Holds the part of a replica in the gradient, from one or more backward passes.

    Attributes:
        factors: every call of a gathered layer, with the gradient of its output.
        others: gradients of all other weights.
    """

    factors: list[tuple[LayerFactors, tf.Tensor]]
    others: list[tf.Tensor]

    def __add__(self, other: "LocalGradient") -> "LocalGradient":
        """Returns the sum of two parts."""
        others = [a + b for a, b in zip(self.others, other.others, strict=True)]
        return LocalGradient(self.factors + other.factors, others)

    def tensors(self) -> list[tf.Tensor]:
        """Returns all tensors of the backward pass."""
        return [*(gradient for _, gradient in self.factors), *self.others]


_factors: ContextVar[list[LayerFactors] | None] = ContextVar("factors", default=None)


class Exchange:
    """Computes the gradient of the global batch on each replica, as planned."""

    def __init__(self, model: keras.Model, plan: Plan, dtype: str) -> None:
        """Prepares the exchange for the layers of `model` that `plan` gathers.

        Args:
            dtype: in which all other gradients are sent, see `sum_over_replicas`.
        """
        self._dtype = dtype
        self._weights = list(model.trainable_variables)
        self._layers = [layer for layer in model.layers if layer.name in plan.gathered]

    @contextmanager
    def record_layers(self) -> Iterator[None]:
        """Makes `recorded` record the layers; must enclose everything that the replicas trace."""
        with ExitStack() as stack:
            for layer in self._layers:
                layer.call = _tap(layer)
                stack.callback(delattr, layer, "call")
            yield

    @contextmanager
    def recorded(self) -> Iterator[list[LayerFactors]]:
        """Yields a list that collects the layer calls of this replica."""
        factors: list[LayerFactors] = []
        token = _factors.set(factors)
        try:
            yield factors
        finally:
            _factors.reset(token)

    def local_gradient(
        self, tape: tf.GradientTape, loss: tf.Tensor, factors: Sequence[LayerFactors]
    ) -> LocalGradient:
        """Returns the part of this replica in the gradient, before any exchange.

        Args:
            loss: its gradient is the part of this replica (see `job.losses.replica_sum`).
            factors: the list of `recorded` after computing `loss`.
        """
        found = tape.gradient(
            loss,
            [*(factor.output for factor in factors), *(w.value for w in self._other_weights())],
        )
        # In reverse: the first gradients that are known are sent first.
        pairs = list(zip(factors, found[: len(factors)], strict=True))[::-1]
        return LocalGradient(pairs, found[len(factors) :])

    def gradients(self, local_gradient: LocalGradient) -> list[tf.Tensor]:
        """Returns the global gradient of each weight, in the order of the model's weights.

        All replicas must call it in replica context, once per update.
        """
        gradients: dict[int, tf.Tensor] = {}
        gathered = _gathered(local_gradient.factors)
        for (factor, _), (inputs, output) in zip(local_gradient.factors, gathered, strict=True):
            totals = _global_weight_gradients(factor.layer, inputs, output)
            for weight, total in zip(factor.layer.trainable_weights, totals, strict=True):
                called_before = gradients.get(id(weight))
                gradients[id(weight)] = total if called_before is None else called_before + total
        if local_gradient.others:
            sums = sum_over_replicas(local_gradient.others, self._dtype)
            others = self._other_weights()
            gradients |= {id(w): total for w, total in zip(others, sums, strict=True)}
        return [gradients[id(weight)] for weight in self._weights]

    def _other_weights(self) -> list[Any]:
        gathered = {id(w) for layer in self._layers for w in layer.trainable_weights}
        return [weight for weight in self._weights if id(weight) not in gathered]


def _tap(layer: Any) -> Callable[..., tf.Tensor]:
    call = layer.call

    def record_layers(inputs: tf.Tensor, **options: Any) -> tf.Tensor:
        factors = _factors.get()
        if factors is None:
            return call(inputs, **options)
        activation = layer.activation
        with _linear(layer):
            output = call(inputs, **options)
        factors.append(LayerFactors(layer, inputs, output))
        return output if activation is None else activation(output)

    return record_layers


@contextmanager
def _linear(layer: Any) -> Iterator[None]:
    """Removes the activation of the layer inside the block."""
    activation = layer.activation
    layer.activation = None
    try:
        yield
    finally:
        layer.activation = activation


def _global_weight_gradients(layer: Any, inputs: tf.Tensor, output: tf.Tensor) -> list[tf.Tensor]:
    """Returns the gradients of the layer's weights for the whole batch, from its output gradient.

    In 16 bits, sums the gradients per replica: each result is rounded to 16 bits, and a sum of
    rounded parts, as all-reduce computes it, is more exact than the rounded whole.
    """
    if inputs.dtype.size != 2:
        return _weight_gradients(layer, inputs, output)
    num_replicas = tf.distribute.get_replica_context().num_replicas_in_sync
    parts = zip(tf.split(inputs, num_replicas), tf.split(output, num_replicas), strict=True)
    gradients = [_weight_gradients(layer, *part) for part in parts]
    return [tf.add_n(list(each)) for each in zip(*gradients, strict=True)]


def _weight_gradients(layer: Any, inputs: tf.Tensor, output: tf.Tensor) -> list[tf.Tensor]:
    """Returns the gradients of the layer's weights from its output gradient."""
    token = _factors.set(None)
    try:
        # The layer is linear in its weights: the gradient needs no output, and TensorFlow prunes
        # this forward pass.
        with tf.GradientTape() as tape, _linear(layer):
            outputs = layer(inputs)
    finally:
        _factors.reset(token)
    weights = [weight.value for weight in layer.trainable_weights]
    gradients: list[tf.Tensor] = tape.gradient(outputs, weights, output_gradients=output)
    return gradients


def _gathered(
    pairs: Sequence[tuple[LayerFactors, tf.Tensor]],
) -> Iterator[tuple[tf.Tensor, tf.Tensor]]:
    """Yields the input and the output gradient of each layer, concatenated over all replicas."""
    tensors = [tensor for factor, gradient in pairs for tensor in (factor.inputs, gradient)]
    whole: list[tf.Tensor] = []
    for bucket in _buckets(tensors):
        whole.extend(_all_gathered(bucket))
    yield from zip(whole[::2], whole[1::2], strict=True)


def _buckets(tensors: Sequence[tf.Tensor]) -> Iterator[list[tf.Tensor]]:
    bucket: list[tf.Tensor] = []
    size = 0
    for tensor in tensors:
        bucket.append(tensor)
        size += tensor.shape.num_elements() * tensor.dtype.size
        if size >= _BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def _all_gathered(tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Returns each of `tensors`, concatenated over all replicas along its first axis."""
    words = [_as_words(tensor) for tensor in tensors]
    context = tf.distribute.get_replica_context()
    flat = context.all_gather(tf.concat(words, axis=0), axis=0)
    rows = tf.reshape(flat, (context.num_replicas_in_sync, -1))
    parts = tf.split(rows, [part.shape[0] for part in words], axis=1)
    return [_from_words(part, tensor) for part, tensor in zip(parts, tensors, strict=True)]


def _as_words(tensor: tf.Tensor) -> tf.Tensor:
    """Returns the bits of `tensor` as (words,) float32, which every collective supports."""
    flat = tf.reshape(tensor, (-1,))
    if flat.dtype.size == 2:
        flat = tf.pad(flat, [[0, flat.shape[0] % 2]])
        flat = tf.reshape(flat, (-1, 2))
    return tf.reshape(tf.bitcast(flat, tf.float32), (-1,))


def _from_words(rows: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """Reverses `_as_words` for tensors `like` of all replicas; returns them concatenated.

    Args:
        rows: (replicas, words) float32.
    """
    num_replicas = rows.shape[0]
    if like.dtype.size == 8:
        rows = tf.reshape(rows, (num_replicas, -1, 2))
    values = tf.reshape(tf.bitcast(rows, like.dtype), (num_replicas, -1))
    values = values[:, : like.shape.num_elements()]
    return tf.reshape(values, (num_replicas * like.shape[0], *like.shape[1:]))
