"""Chooses for each layer how replicas get its gradient: by all-reduce, or by exchanging factors.

A plan chooses for each layer the faster way or, if both take about as long, the one that sends
less. `job.distributed.gradient_exchange` describes both ways.

Every replica must have the same plan. It is a pure function of the model, the batch, the number of
replicas and one ratio of rates. So a restart with the same ratio computes the same bits.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from statistics import median
from typing import Any

import keras
import tensorflow as tf

from job.config import TrainConfig
from job.distributed.process_group import ProcessGroup

logger = logging.getLogger(__name__)

# FLOPs per byte if not measured: a few cores at 120 GFLOP/s, a network of 1 Gbit/s.
NOMINAL_FLOPS_PER_BYTE = 1000.0

_PLAIN_LAYERS = (keras.layers.Conv2D, keras.layers.Conv2DTranspose, keras.layers.Dense)
# How much longer gathering a layer may take than all-reduce, to send fewer bytes on a shared
# network.
_PATIENCE = 1.15
_PROBE_SIZE = 1024
_LESS = 0.9  # the log names an option if the exchange would take at most this share of the time


@dataclass(frozen=True)
class _Probe:
    """Sets how precisely the rates of the replicas are measured."""

    num_bytes: int
    repeats: int


_TO_PLAN = _Probe(16 << 20, 5)
_TO_LOG = _Probe(4 << 20, 2)  # takes an eighth of the time


@dataclass(frozen=True)
class Rates:
    """Holds what a replica does per second while all others do the same."""

    flops_per_s: float
    bytes_per_s: float

    @property
    def flops_per_byte(self) -> float:
        """The operations in the time of sending a byte."""
        return self.flops_per_s / self.bytes_per_s


@dataclass(frozen=True)
class LayerCost:
    """Holds the costs of a layer's gradient, for one call of the layer.

    Attributes:
        weight_bytes: size of the gradients of its weights, as they are sent.
        factor_bytes: size of its input and output gradient for the batch of one replica.
        flops: operations to compute the gradients of its weights for the batch of one replica.
    """

    name: str
    weight_bytes: int
    factor_bytes: int
    flops: int


@dataclass(frozen=True)
class Plan:
    """Selects the layers whose gradients use gathered factors; all others are all-reduced.

    Attributes:
        costs: costs of every layer that could be gathered.
        other_bytes: size of the gradients of all other weights, as they are sent.
        gathered: names of the selected layers.
    """

    num_replicas: int
    costs: tuple[LayerCost, ...]
    other_bytes: int
    gathered: frozenset[str]

    def sent_bytes(self) -> float:
        """Returns the bytes that each replica sends for the gradients of a step."""
        reduced = self.other_bytes + sum(cost.weight_bytes for cost in self._costs(False))
        factors = sum(cost.factor_bytes for cost in self._costs(True))
        return _reduced_bytes(reduced, self.num_replicas) + (self.num_replicas - 1) * factors

    def all_reduce_bytes(self) -> float:
        """Returns the bytes that each replica would send with all-reduce for all layers."""
        weights = self.other_bytes + sum(cost.weight_bytes for cost in self.costs)
        return _reduced_bytes(weights, self.num_replicas)

    def extra_flops(self) -> int:
        """Returns the operations per step that each replica computes beyond its share."""
        return (self.num_replicas - 1) * sum(cost.flops for cost in self._costs(True))

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Returns the seconds that the exchange adds to a step if nothing overlaps."""
        return self.sent_bytes() / bytes_per_s + self.extra_flops() / flops_per_s

    def all_reduce_only(self) -> "Plan":
        """Returns the plan that all-reduces the gradients of all layers."""
        return replace(self, gathered=frozenset())

    def describe(self) -> str:
        """Returns the plan as the start of a log line."""
        return (
            f"gradient exchange: {len(self.gathered)} of {len(self.costs)} layers from gathered "
            f"inputs; {self.sent_bytes() / 1e6:.1f} MB per step and replica, all-reduce "
            f"{self.all_reduce_bytes() / 1e6:.1f} MB"
        )

    def describe_cost(self, rates: Rates, others: Mapping[str, "Plan"]) -> str:
        """Returns the expected cost per step, for the log.

        Args:
            others: plans that other options would select, by these options.
        """
        seconds = self.seconds(rates.flops_per_s, rates.bytes_per_s)
        # Forward, gradients of inputs and gradients of weights take about as long.
        computed = 3 * sum(cost.flops for cost in self.costs) / rates.flops_per_s
        words = (
            f"expected per step: {_duration(seconds)} to exchange, {_duration(computed)} or more "
            f"to compute (measured: {rates.bytes_per_s / 1e6:.4g} MB/s and "
            f"{rates.flops_per_s / 1e9:.4g} GFLOP/s per replica)"
        )
        for options, other in others.items():
            changed = other.seconds(rates.flops_per_s, rates.bytes_per_s)
            words += f"; with {options} {_duration(changed)} to exchange"
        return words

    def _costs(self, is_gathered: bool) -> list[LayerCost]:
        return [cost for cost in self.costs if (cost.name in self.gathered) == is_gathered]


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1e3 * seconds:.2g} ms"


def _reduced_bytes(num_bytes: int, num_replicas: int) -> float:
    return 2 * (num_replicas - 1) / num_replicas * num_bytes


def agreed_plan(
    config: TrainConfig,
    strategy: tf.distribute.Strategy,
    process_group: ProcessGroup,
    model: Any,
    *,
    uses_xla: bool = False,
) -> Plan | None:
    """Returns the plan that all processes use; None: all-reduce all gradients.

    Gathered gradients must have the same bits on every replica. Gradients of convolutions on GPUs
    have them only with deterministic operations. A step that XLA compiles cannot gather.

    Several processes log what the exchange is expected to cost per step.
    """
    num_replicas = strategy.num_replicas_in_sync
    options = _options_to_gather(config, uses_xla=uses_xla)
    if num_replicas == 1 or (options and process_group.size == 1):
        return None
    is_logged = process_group.size > 1
    ratio, rates = _ratio_and_rates(
        config, strategy, model, is_free=not options, is_logged=is_logged
    )
    # If one process chose another plan, all would wait for ever.
    agreed: float = process_group.run_on_primary(lambda: ratio)

    def planned(dtype: str, *, is_free: bool) -> Plan:
        plan = make_plan(
            model,
            batch_size=config.global_batch_size // num_replicas,
            num_replicas=num_replicas,
            flops_per_byte=agreed,
            gradient_dtype=dtype,
        )
        return plan if is_free else plan.all_reduce_only()

    plan = planned(config.gradient_dtype, is_free=not options)
    if process_group.is_primary:
        words = [plan.describe() + ("" if options else f" ({agreed:.0f} FLOPs per byte)")]
        if rates is not None and is_logged:
            others = _worth_naming(
                plan, planned(config.gradient_dtype, is_free=bool(options)), options
            )
            others |= _worth_sending(plan, planned("bfloat16", is_free=not options), rates)
            words.append(plan.describe_cost(rates, others))
        logger.info("%s", "; ".join(words))
    return None if options else plan


def _worth_naming(plan: Plan, other: Plan, options: Sequence[str]) -> dict[str, Plan]:
    """Returns the plan without or with gathered layers by its options, if it is another one."""
    if other.gathered == plan.gathered:
        return {}
    return {" ".join(options) or "--gradient-exchange all_reduce": other}


def _worth_sending(plan: Plan, narrow: Plan, rates: Rates) -> dict[str, Plan]:
    """Returns the plan that sends bfloat16 by its option, if it takes clearly less time."""
    seconds, others = (
        each.seconds(rates.flops_per_s, rates.bytes_per_s) for each in (plan, narrow)
    )
    return {"--gradient-dtype bfloat16 in a new run": narrow} if others < _LESS * seconds else {}


def _ratio_and_rates(
    config: TrainConfig,
    strategy: tf.distribute.Strategy,
    model: Any,
    *,
    is_free: bool,
    is_logged: bool,
) -> tuple[float, Rates | None]:
    """Returns the FLOPs per byte to plan with, and the rates where they are measured.

    Args:
        is_free: the plan may gather.
        is_logged: measure the rates for the log, if the plan does not need them.
    """
    ratio = config.exchange_flops_per_byte
    if ratio is None and config.deterministic:
        # A measured ratio differs between starts, and with it the order of the sums.
        ratio = NOMINAL_FLOPS_PER_BYTE
    is_needed = is_free and ratio is None
    # On a GPU, a gather that only the log needs could end training: it is not yet tested there.
    if not is_needed and (not is_logged or tf.config.list_logical_devices("GPU")):
        return ratio or 0.0, None
    rates = measured_rates(strategy, model.compute_dtype, _TO_PLAN if is_needed else _TO_LOG)
    return rates.flops_per_byte if ratio is None else ratio, rates


def _options_to_gather(config: TrainConfig, *, uses_xla: bool) -> list[str]:
    """Returns the options without which all gradients are all-reduced; empty: they can be."""
    options = []
    if config.gradient_exchange == "all_reduce":
        options.append("--gradient-exchange auto")
    if uses_xla:
        options.append("--xla off")
    if tf.config.list_logical_devices("GPU") and not config.deterministic:
        options.append("--deterministic")
    return options


def make_plan(
    model: keras.Model,
    *,
    batch_size: int,
    num_replicas: int,
    flops_per_byte: float,
    gradient_dtype: str = "float32",
) -> Plan:
    """Returns the plan that takes the least time; if times are about equal, that sends less.

    Args:
        batch_size: samples of one replica.
        flops_per_byte: operations in the time of sending one byte; 0: all-reduce everything.
        gradient_dtype: in which all-reduce sends, `TrainConfig.gradient_dtype`.
    """
    sent = 2 if gradient_dtype == "bfloat16" else None
    costs = tuple(_cost(layer, batch_size, sent) for layer in _plain_layers(model))
    total = sum(_num_bytes(weight, sent) for weight in model.trainable_weights)

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
    """Returns whether the layer is linear except for its activation, with no other weights."""
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


def _cost(layer: Any, batch_size: int, sent: int | None) -> LayerCost:
    inputs, outputs = (layer.input.shape[1:], layer.output.shape[1:])
    # A transposed convolution applies its kernel per input pixel, other layers per output pixel.
    is_transposed = isinstance(layer, keras.layers.Conv2DTranspose)
    places = prod((inputs if is_transposed else outputs)[:-1])
    width: int = tf.as_dtype(layer.compute_dtype).size
    return LayerCost(
        layer.name,
        sum(_num_bytes(weight, sent) for weight in layer.trainable_weights),
        batch_size * (prod(inputs) + prod(outputs)) * width,
        2 * batch_size * places * prod(layer.kernel.shape),
    )


def _num_bytes(weight: Any, sent: int | None) -> int:
    """Returns the size of a gradient; `sent`: bytes of a number; None: as the weight has."""
    return int(prod(weight.shape) * (sent or tf.as_dtype(weight.dtype).size))


def measured_rates(strategy: tf.distribute.Strategy, dtype: str, probe: _Probe = _TO_PLAN) -> Rates:
    """Measures what each replica computes and sends per second; all replicas must call it.

    Measures a matrix multiplication and an all-gather, each on all replicas at the same time.

    Args:
        dtype: of the computations of the model.
    """

    def multiply(seed: tf.Tensor) -> tf.Tensor:
        values = tf.random.stateless_uniform((_PROBE_SIZE, _PROBE_SIZE), seed)
        values = tf.cast(values, dtype)
        return tf.reduce_max(tf.matmul(values, values))

    def gather(seed: tf.Tensor) -> tf.Tensor:
        context = tf.distribute.get_replica_context()
        words = tf.random.stateless_uniform((probe.num_bytes // 4,), seed)
        return tf.reduce_max(context.all_gather(words, axis=0))

    num_bytes = (strategy.num_replicas_in_sync - 1) * probe.num_bytes
    return Rates(
        2 * _PROBE_SIZE**3 / _seconds(strategy, multiply, probe.repeats),
        num_bytes / _seconds(strategy, gather, probe.repeats),
    )


def _seconds(
    strategy: tf.distribute.Strategy, work: Callable[[tf.Tensor], tf.Tensor], repeats: int
) -> float:
    # The seed is an argument: TensorFlow would compute work on constants once, while compiling.
    function = tf.function(lambda seed: strategy.run(work, (seed,)), autograph=False)
    times = []
    for count in range(1 + repeats):
        seed = tf.constant([1, count], tf.int32)
        started = time.perf_counter()
        for result in strategy.experimental_local_results(function(seed)):
            result.numpy()
        times.append(time.perf_counter() - started)
    return median(times[1:])  # the first one compiles
