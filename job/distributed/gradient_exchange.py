"""Owns how replicas get the gradient of the global batch: by sums, or without sending gradients.

The gradient of a linear layer `y = x * W + b` (convolution, transposed convolution, dense) is
`dW = g(x, dy)` with `g` linear in the samples: samples only add up. So over replicas r

    sum_r g(x_r, dy_r) = g(concat_r x_r, concat_r dy_r)

On the left stands all-reduce: N replicas send `2 (N-1)/N |W|` bytes each, as a ring does. On the
right every replica gathers the inputs and the output gradients of all, `(N-1)(|x| + |dy|)` bytes
each, and computes `g` for the whole batch, `N-1` times more than its share. Both are the same sum
in another order. Deep layers of a U-Net have large kernels and few pixels: there the right side
sends a hundredth. `make_plan` takes for each layer what is sooner done, and where both take about
as long, what sends less.

Known as sufficient factor broadcasting: Xie et al. 2015, arXiv:1511.08486; the choice per layer as
in Poseidon, Zhang et al. 2017, arXiv:1706.03292.

Every replica must have the same plan. It is a pure function of the model, the batch, the number of
replicas and one ratio of rates, so a restart that is given the same ratio computes the same bits.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import prod
from statistics import median
from typing import Any

import keras
import tensorflow as tf

# FLOPs per byte where none are measured: a few cores at 120 GFLOP/s, a network of 1 Gbit/s.
NOMINAL_FLOPS_PER_BYTE = 1000.0

_PLAIN_LAYERS = (keras.layers.Conv2D, keras.layers.Conv2DTranspose, keras.layers.Dense)
# How much longer gathering a layer may take than all-reduce, for fewer bytes on a network that
# others use too.
_PATIENCE = 1.15
_BUCKET_BYTES = 4 << 20  # gathered together: large enough for bandwidth to count, not latency
_PROBE_BYTES = 16 << 20
_PROBE_SIZE = 1024
_PROBE_REPEATS = 5


@dataclass(frozen=True)
class LayerCost:
    """What a layer's gradient costs, for one call of the layer.

    Attributes:
        weight_bytes: of the gradients of its weights.
        factor_bytes: of its input and output gradient, one replica's batch.
        flops: of the gradients of its weights, one replica's batch.
    """

    name: str
    weight_bytes: int
    factor_bytes: int
    flops: int


@dataclass(frozen=True)
class Plan:
    """Which layers' gradients are computed from gathered factors; the others are all-reduced.

    Attributes:
        costs: of every layer that could be gathered.
        other_bytes: of the gradients of all other weights.
    """

    num_replicas: int
    costs: tuple[LayerCost, ...]
    other_bytes: int
    gathered: frozenset[str]

    def sent_bytes(self) -> float:
        """Returns what each replica sends for the gradients of a step."""
        reduced = self.other_bytes + sum(cost.weight_bytes for cost in self._costs(False))
        factors = sum(cost.factor_bytes for cost in self._costs(True))
        return _reduced_bytes(reduced, self.num_replicas) + (self.num_replicas - 1) * factors

    def all_reduce_bytes(self) -> float:
        """Returns what each replica would send if everything was all-reduced."""
        weights = self.other_bytes + sum(cost.weight_bytes for cost in self.costs)
        return _reduced_bytes(weights, self.num_replicas)

    def extra_flops(self) -> int:
        """Returns what each replica computes beside its share, per step."""
        return (self.num_replicas - 1) * sum(cost.flops for cost in self._costs(True))

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Returns what the exchange adds to a step if nothing overlaps."""
        return self.sent_bytes() / bytes_per_s + self.extra_flops() / flops_per_s

    def describe(self) -> str:
        """Returns a line for the log."""
        return (
            f"gradient exchange: {len(self.gathered)} of {len(self.costs)} layers from gathered "
            f"inputs; {self.sent_bytes() / 1e6:.1f} MB per step and replica, all-reduce "
            f"{self.all_reduce_bytes() / 1e6:.1f} MB"
        )

    def _costs(self, is_gathered: bool) -> list[LayerCost]:
        return [cost for cost in self.costs if (cost.name in self.gathered) == is_gathered]


def _reduced_bytes(num_bytes: int, num_replicas: int) -> float:
    return 2 * (num_replicas - 1) / num_replicas * num_bytes


def make_plan(
    model: keras.Model, *, batch_size: int, num_replicas: int, flops_per_byte: float
) -> Plan:
    """Returns the plan that takes the least time; of two that take about as long, what sends less.

    Args:
        batch_size: samples of one replica.
        flops_per_byte: what a replica computes while it sends a byte; 0: all-reduce everything.
    """
    costs = tuple(_cost(layer, batch_size) for layer in _plain_layers(model))
    total = sum(_num_bytes(weight) for weight in model.trainable_weights)

    def is_gathered(cost: LayerCost) -> bool:
        computed = cost.flops / flops_per_byte if flops_per_byte else float("inf")
        gathered = (num_replicas - 1) * (cost.factor_bytes + computed)
        reduced = _reduced_bytes(cost.weight_bytes, num_replicas)
        sends_less = (num_replicas - 1) * cost.factor_bytes < reduced
        return sends_less and gathered < _PATIENCE * reduced

    return Plan(
        num_replicas,
        costs,
        total - sum(cost.weight_bytes for cost in costs),
        frozenset(cost.name for cost in costs if is_gathered(cost)),
    )


def _plain_layers(model: keras.Model) -> list[Any]:
    return [layer for layer in model.layers if _is_plain(layer)]


def _is_plain(layer: Any) -> bool:
    """Returns whether the layer is linear but for its activation, and has no other weights."""
    if type(layer) not in _PLAIN_LAYERS or isinstance(layer.activation, keras.layers.Layer):
        return False
    weights = [layer.kernel] if layer.bias is None else [layer.kernel, layer.bias]
    if [id(weight) for weight in layer.trainable_weights] != [id(weight) for weight in weights]:
        return False
    try:
        shapes = (layer.input.shape, layer.output.shape)
    except (AttributeError, ValueError):  # never called
        return False
    channels_last = getattr(layer, "data_format", "channels_last") == "channels_last"
    return channels_last and all(None not in shape[1:] for shape in shapes)


def _cost(layer: Any, batch_size: int) -> LayerCost:
    inputs, outputs = (layer.input.shape[1:], layer.output.shape[1:])
    # A transposed convolution applies its kernel once per input pixel, the others per output.
    is_transposed = isinstance(layer, keras.layers.Conv2DTranspose)
    places = prod((inputs if is_transposed else outputs)[:-1])
    width: int = tf.as_dtype(layer.compute_dtype).size
    return LayerCost(
        layer.name,
        sum(_num_bytes(weight) for weight in layer.trainable_weights),
        batch_size * (prod(inputs) + prod(outputs)) * width,
        2 * batch_size * places * prod(layer.kernel.shape),
    )


def _num_bytes(weight: Any) -> int:
    return int(prod(weight.shape) * tf.as_dtype(weight.dtype).size)


@dataclass(frozen=True)
class Factor:
    """One call of a layer on a replica: its input and its output before the activation."""

    layer: Any
    inputs: tf.Tensor
    output: tf.Tensor


@dataclass(frozen=True)
class Share:
    """What a replica has found of the gradient, after one backward pass or several.

    Attributes:
        factors: every call of a gathered layer, with the gradient of its output.
        others: of every other weight, the gradient.
    """

    factors: list[tuple[Factor, tf.Tensor]]
    others: list[tf.Tensor]

    def __add__(self, other: "Share") -> "Share":
        """Returns the share of both backward passes together."""
        others = [a + b for a, b in zip(self.others, other.others, strict=True)]
        return Share(self.factors + other.factors, others)

    def tensors(self) -> list[tf.Tensor]:
        """Returns all that was computed backwards."""
        return [*(gradient for _, gradient in self.factors), *self.others]


_factors: ContextVar[list[Factor] | None] = ContextVar("factors", default=None)


class Exchange:
    """Computes on each replica the gradient of the global batch, as its plan says."""

    def __init__(self, model: keras.Model, plan: Plan | None = None) -> None:
        """Makes the exchange for `model`; all-reduces everything where there is no plan."""
        gathered = plan.gathered if plan else frozenset()
        self._weights = list(model.trainable_variables)
        self._layers = [layer for layer in model.layers if layer.name in gathered]

    @contextmanager
    def tapped(self) -> Iterator[None]:
        """Lets `recorded` see the layers; around everything that the replicas trace."""
        with ExitStack() as stack:
            for layer in self._layers:
                layer.call = _tap(layer)
                stack.callback(delattr, layer, "call")
            yield

    @contextmanager
    def recorded(self) -> Iterator[list[Factor]]:
        """Yields the list to which this replica's calls of the model's layers are added."""
        factors: list[Factor] = []
        token = _factors.set(factors)
        try:
            yield factors
        finally:
            _factors.reset(token)

    def share(self, tape: tf.GradientTape, loss: tf.Tensor, factors: Sequence[Factor]) -> Share:
        """Returns what this replica knows of the gradient before any exchange.

        Args:
            loss: has as gradient this replica's share (`job.losses.replica_sum`).
            factors: what `recorded` has collected on the way to it.
        """
        found = tape.gradient(
            loss,
            [*(factor.output for factor in factors), *(w.value for w in self._other_weights())],
        )
        # Backwards: the first that are known are the first that travel.
        pairs = list(zip(factors, found[: len(factors)], strict=True))[::-1]
        return Share(pairs, found[len(factors) :])

    def gradients(self, share: Share) -> list[tf.Tensor]:
        """Returns the global gradient of each weight, in the order of the model's weights.

        Called in replica context by all replicas, once per update.
        """
        gradients: dict[int, tf.Tensor] = {}
        gathered = _gathered(share.factors)
        for (factor, _), (inputs, output) in zip(share.factors, gathered, strict=True):
            totals = _global_weight_gradients(factor.layer, inputs, output)
            for weight, total in zip(factor.layer.trainable_weights, totals, strict=True):
                called_before = gradients.get(id(weight))
                gradients[id(weight)] = total if called_before is None else called_before + total
        if share.others:
            context = tf.distribute.get_replica_context()
            sums = context.all_reduce(tf.distribute.ReduceOp.SUM, share.others)
            others = self._other_weights()
            gradients |= {id(w): total for w, total in zip(others, sums, strict=True)}
        return [gradients[id(weight)] for weight in self._weights]

    def _other_weights(self) -> list[Any]:
        gathered = {id(w) for layer in self._layers for w in layer.trainable_weights}
        return [weight for weight in self._weights if id(weight) not in gathered]


def _tap(layer: Any) -> Callable[..., tf.Tensor]:
    call = layer.call

    def tapped(inputs: tf.Tensor, **options: Any) -> tf.Tensor:
        factors = _factors.get()
        if factors is None:
            return call(inputs, **options)
        activation = layer.activation
        with _linear(layer):
            output = call(inputs, **options)
        factors.append(Factor(layer, inputs, output))
        return output if activation is None else activation(output)

    return tapped


@contextmanager
def _linear(layer: Any) -> Iterator[None]:
    """Takes the layer's activation away inside the block."""
    activation = layer.activation
    layer.activation = None
    try:
        yield
    finally:
        layer.activation = activation


def _global_weight_gradients(layer: Any, inputs: tf.Tensor, output: tf.Tensor) -> list[tf.Tensor]:
    """Returns the gradients of the layer's weights, given that of its output, of the whole batch.

    In 16 bits as a sum of those of each replica: a result is rounded to 16 bits, and the sum of
    rounded parts, which all-reduce makes too, is nearer to the truth than the rounded whole.
    """
    if inputs.dtype.size != 2:
        return _weight_gradients(layer, inputs, output)
    num_replicas = tf.distribute.get_replica_context().num_replicas_in_sync
    parts = zip(tf.split(inputs, num_replicas), tf.split(output, num_replicas), strict=True)
    gradients = [_weight_gradients(layer, *part) for part in parts]
    return [tf.add_n(list(each)) for each in zip(*gradients, strict=True)]


def _weight_gradients(layer: Any, inputs: tf.Tensor, output: tf.Tensor) -> list[tf.Tensor]:
    """Returns the gradients of the layer's weights, given that of its output."""
    token = _factors.set(None)
    try:
        # Linear in its weights: the gradient needs no output, and this forward pass is pruned.
        with tf.GradientTape() as tape, _linear(layer):
            outputs = layer(inputs)
    finally:
        _factors.reset(token)
    weights = [weight.value for weight in layer.trainable_weights]
    gradients: list[tf.Tensor] = tape.gradient(outputs, weights, output_gradients=output)
    return gradients


def _gathered(pairs: Sequence[tuple[Factor, tf.Tensor]]) -> Iterator[tuple[tf.Tensor, tf.Tensor]]:
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
    """Returns the bits of `tensor` as (words,) float32, which every collective can carry."""
    flat = tf.reshape(tensor, (-1,))
    if flat.dtype.size == 2:
        flat = tf.pad(flat, [[0, flat.shape[0] % 2]])
        flat = tf.reshape(flat, (-1, 2))
    return tf.reshape(tf.bitcast(flat, tf.float32), (-1,))


def _from_words(rows: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """Returns what `_as_words` made of tensors `like` on each replica, concatenated.

    Args:
        rows: (replicas, words) float32.
    """
    num_replicas = rows.shape[0]
    if like.dtype.size == 8:
        rows = tf.reshape(rows, (num_replicas, -1, 2))
    values = tf.reshape(tf.bitcast(rows, like.dtype), (num_replicas, -1))
    values = values[:, : like.shape.num_elements()]
    return tf.reshape(values, (num_replicas * like.shape[0], *like.shape[1:]))


def measured_flops_per_byte(strategy: tf.distribute.Strategy, dtype: str) -> float:
    """Returns what a replica computes while it sends a byte; all replicas must call it.

    A multiplication of matrices against an all-gather, each by all replicas at the same time.

    Args:
        dtype: of the model's computations.
    """

    def multiply(seed: tf.Tensor) -> tf.Tensor:
        values = tf.random.stateless_uniform((_PROBE_SIZE, _PROBE_SIZE), seed)
        values = tf.cast(values, dtype)
        return tf.reduce_max(tf.matmul(values, values))

    def gather(seed: tf.Tensor) -> tf.Tensor:
        context = tf.distribute.get_replica_context()
        words = tf.random.stateless_uniform((_PROBE_BYTES // 4,), seed)
        return tf.reduce_max(context.all_gather(words, axis=0))

    num_bytes = (strategy.num_replicas_in_sync - 1) * _PROBE_BYTES
    return (2 * _PROBE_SIZE**3 / _seconds(strategy, multiply)) / (
        num_bytes / _seconds(strategy, gather)
    )


def _seconds(strategy: tf.distribute.Strategy, work: Callable[[tf.Tensor], tf.Tensor]) -> float:
    # The seed is an argument: work on constants would be done once, while compiling.
    function = tf.function(lambda seed: strategy.run(work, (seed,)), autograph=False)
    times = []
    for count in range(1 + _PROBE_REPEATS):
        seed = tf.constant([1, count], tf.int32)
        started = time.perf_counter()
        for result in strategy.experimental_local_results(function(seed)):
            result.numpy()
        times.append(time.perf_counter() - started)
    return median(times[1:])  # the first one compiles
