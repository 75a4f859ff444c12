"""Makes the training step: forward and backward pass, gradient exchange and update.

The loss is a function of sums over the global batch, so that its value and gradient do not depend
on the number of replicas.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from job.distributed.all_reduce import AllReduce
from job.distributed.exchange_plan import Plan
from job.distributed.process_group import ProcessGroup
from job.distributed.replica_sums import (
    Batch,
    Criterion,
    FetchedSums,
    loss_sums,
    metric_sums,
    micro_batches,
    seen_by,
)
from job.losses import GlobalSum, part_of, replica_sum
from job.models.dropout import draw_kept, dropout, kept_values
from job.models.ensemble import prepared
from job.models.heads import outputs_of
from job.models.normalization import counted_samples
from job.optimization.optimizer import Adam

# Entries among the sums of a training step: with a loss scale, and in a team of processes.
SKIPPED = "skipped_in_row"
MESSAGES = "messages"  # see `StepMessages`
CLOCK = "clock"  # training time used, s: of the primary alone, with a time budget

# After steps of this length a stop request is exchanged at once, else with the next step.
_LONG_STEP_S = 0.25


@dataclass(frozen=True)
class StepOptions:
    """Holds the options of a training step.

    Attributes:
        plan: how gradients are exchanged, the same on all replicas; None: by all-reduce.
        num_micro_batches: parts of a replica's batch, computed one after the other for one exchange
            and one update; a divisor of that batch.
        loss_is_mean: `job.losses.is_mean`; else several micro-batches need one more forward pass.
        uses_xla: compile the network, forward and backward. It must have no collective: no batch
            normalisation, and a plan that gathers nothing.
        has_messages: the step adds up a message of each process, too.
        has_clock: the messages hold the training time.
        random_streams: version of the random streams, for dropout.
        gradient_dtype: in which replicas send gradients, `TrainConfig.gradient_dtype`.
    """

    plan: Plan | None = None
    num_micro_batches: int = 1
    loss_is_mean: bool = False
    uses_xla: bool = False
    has_messages: bool = False
    has_clock: bool = False
    random_streams: int = 3
    gradient_dtype: str = "float32"


@dataclass(frozen=True)
class TrainStep:
    """Runs a compiled training step, and fetches its sums all at once.

    Each fetch of a tensor releases the interpreter's lock, which another thread may then hold for
    milliseconds.

    Attributes:
        compiled: `compiled(batch, step, learning_rate) -> (2 names,) float64`.
        names: those of the sums, in order.
    """

    compiled: Any
    names: tuple[str, ...]

    def __call__(
        self, batch: Batch, step: tf.Tensor, learning_rate: tf.Tensor, *message: tf.Tensor
    ) -> FetchedSums:
        """Updates the weights, and returns the sums of the global batch.

        `sums` has entries for `loss` and every metric. With a loss scale it has one for `SKIPPED`:
        the number of steps skipped in a row, 0 after an update.

        Args:
            step: () int64, number of earlier updates.
            learning_rate: () float64.
            message: only with `StepOptions.has_messages`: (2,) float64, which all replicas of this
                process send. The sums have an entry for `MESSAGES`. With `has_clock`: (4,), and
                an entry for `CLOCK`.
        """
        values = self.compiled(batch, step, learning_rate, *message).numpy().tolist()
        pairs = zip(values[::2], values[1::2], strict=True)
        return dict(zip(self.names, pairs, strict=True))

    def get_concrete_function(self, *arguments: Any) -> Any:
        """Returns the traced step for `arguments` without running it."""
        return self.compiled.get_concrete_function(*arguments)


def make_train_step(
    strategy: tf.distribute.Strategy,
    model: keras.Model,
    optimizer: Adam,
    criterion: Criterion,
    options: StepOptions | None = None,
) -> TrainStep:
    """Returns the compiled training step."""
    options = options or StepOptions()
    exchange = _exchange_of(model, options.plan, options.gradient_dtype)
    replica = _ReplicaStep(model, optimizer, criterion, options, exchange, _compiled(model))
    names = ["loss", *criterion.metrics, *([SKIPPED] if optimizer.loss_scale else [])]
    # Last, so that the other names keep their places in the vector.
    names += [MESSAGES] if options.has_messages else []
    names += [CLOCK] if options.has_messages and options.has_clock else []

    @tf.function(reduce_retracing=True, autograph=False)
    def train_step(
        batch: Batch, step: tf.Tensor, learning_rate: tf.Tensor, *message: tf.Tensor
    ) -> tf.Tensor:
        with exchange.record_layers():
            sums = strategy.run(replica.run, (batch, step, learning_rate, *message))
        return strategy.reduce(tf.distribute.ReduceOp.SUM, sums, axis=None)

    return TrainStep(train_step, tuple(names))


def _exchange_of(model: keras.Model, plan: Plan | None, dtype: str) -> Any:
    """Returns the exchange that computes the gradients of the global batch."""
    if plan is None or not plan.gathered:
        return AllReduce(model, dtype)
    from job.distributed.gradient_exchange import Exchange

    return Exchange(model, plan, dtype)


@dataclass(frozen=True)
class _Backward:
    """Holds the results of one or more backward passes of a replica."""

    local_gradient: Any  # of `_ReplicaStep.exchange`
    metric_sums: tf.Tensor

    def __add__(self, other: "_Backward") -> "_Backward":
        return _Backward(
            self.local_gradient + other.local_gradient, self.metric_sums + other.metric_sums
        )


@dataclass(frozen=True)
class _ReplicaStep:
    """Runs a training step on one replica."""

    model: keras.Model
    optimizer: Adam
    criterion: Criterion
    options: StepOptions
    exchange: Any  # `AllReduce` or `Exchange`
    compiled: Callable[..., Any]  # see `_compiled`

    def run(
        self, batch: Batch, step: tf.Tensor, learning_rate: tf.Tensor, *message: tf.Tensor
    ) -> tf.Tensor:
        """Updates the weights; returns (sum, count) of each name, see `TrainStep`."""
        # `replica_sum` does not change gradients: each replica has its part of the global gradient.
        is_whole = self.options.num_micro_batches == 1
        done, value = self._backward(batch, replica_sum) if is_whole else self._accumulated(batch)
        skipped = self._update(self.exchange.gradients(done.local_gradient), step, learning_rate)
        return tf.concat([loss_sums(value, batch), done.metric_sums, *skipped, *message], axis=0)

    def _backward(self, part: Batch, global_sum: GlobalSum) -> tuple[_Backward, tf.Tensor]:
        """Returns the results for the scaled loss, and the unscaled loss."""
        scale = self.optimizer.loss_scale
        with self.exchange.recorded() as factors, tf.GradientTape() as tape:
            heads = self._forward(part)
            value = self._loss(part, heads, global_sum)
            scaled = scale.scaled(value) if scale else value
        local_gradient = self.exchange.local_gradient(tape, scaled, factors)
        return _Backward(local_gradient, metric_sums(part, heads[0], self.criterion.metrics)), value

    def _accumulated(self, batch: Batch) -> tuple[_Backward, tf.Tensor]:
        """Returns the result of `_backward` for the whole batch, with the memory of a part."""
        parts = micro_batches(batch, self.options.num_micro_batches)
        # The gradient of a function of sums needs the sums of the whole batch.
        sums: list[tf.Tensor] = []
        for part in parts:
            with tf.control_dependencies(sums[-1:]):
                sums.append(self._local_sums(part))
        seen: list[tf.Tensor] = []
        global_sum = seen_by(part_of(replica_sum(tf.add_n(sums))), seen)
        done, _ = self._backward(parts[0], global_sum)
        for part in parts[1:]:
            # One after the other: in parallel they would need the memory of the whole batch.
            with tf.control_dependencies(done.local_gradient.tensors()):
                done += self._backward(part, global_sum)[0]
        true_sums = part_of(replica_sum(tf.add_n(seen)))
        return done, self._loss(parts[0], self._no_logits(parts[0]), true_sums)

    def _forward(self, part: Batch) -> list[tf.Tensor]:
        """Returns the logits of each head, the main one first."""
        layers, version = self.model.layers, self.options.random_streams
        if self.options.uses_xla:
            kept = draw_kept(layers, part["key"], version)
            return outputs_of(self.compiled(part["image"], kept))
        with dropout(layers, part["key"], version), counted_samples(part["weight"]):
            return outputs_of(self.model(prepared(self.model, part["image"]), training=True))

    def _loss(self, part: Batch, heads: list[tf.Tensor], global_sum: GlobalSum) -> tf.Tensor:
        labels = tf.cast(part["mask"], tf.int32)
        return self.criterion.loss(labels, heads, part["weight"], global_sum)

    def _local_sums(self, part: Batch) -> tf.Tensor:
        """Returns the sums for the loss; if the loss is a mean, only its counts are correct."""
        seen: list[tf.Tensor] = []
        heads = self._no_logits(part) if self.options.loss_is_mean else self._forward(part)
        self._loss(part, heads, seen_by(tf.identity, seen))
        return seen[0]

    def _no_logits(self, part: Batch) -> list[tf.Tensor]:
        number = part["mask"].shape[0]
        return [tf.zeros((number, *each.shape[1:]), each.dtype) for each in self.model.outputs]

    def _update(
        self, gradients: list[tf.Tensor], step: tf.Tensor, learning_rate: tf.Tensor
    ) -> list[tf.Tensor]:
        """Updates the weights; with a loss scale returns [sums of `SKIPPED`], (2,) float64."""
        optimizer, scale = self.optimizer, self.optimizer.loss_scale
        if scale is None:
            optimizer.apply(gradients, step=step, learning_rate=learning_rate)
            return []
        skipped = scale.apply(
            gradients,
            lambda found: optimizer.apply(found, step=step, learning_rate=learning_rate),
        )
        return [tf.stack([tf.cast(skipped, tf.float64), tf.constant(1.0, tf.float64)])]


def _compiled(model: keras.Model) -> Callable[[tf.Tensor, Mapping[str, tf.Tensor]], Any]:
    """Returns the network in training, and its gradient, as one XLA program.

    The caller passes the kept values of dropout, because in versions 1 and 2 of the random streams
    the generator of XLA would draw other numbers from the same keys.

    Expected on GPUs, but not tested yet: XLA fuses the operations between convolutions and pads
    channels for tensor cores.
    """

    @tf.function(jit_compile=True, reduce_retracing=True, autograph=False)
    def network(images: tf.Tensor, kept: Mapping[str, tf.Tensor]) -> Any:
        with kept_values(kept):
            return model(prepared(model, images), training=True)

    return network


class StepMessages:
    """Exchanges stop requests with each training step, without an exchange of their own.

    The sums of the step carry them. A request that is made after a step is known to all processes
    after the next one at the latest: if the steps before took 0.25 s or longer, `ProcessGroup.any`
    asks at once, since its exchange costs little then. All processes choose the same way, because
    the sums hold the durations too.
    """

    def __init__(self, process_group: ProcessGroup) -> None:
        """Starts without a request; all processes of `process_group` must make one object."""
        self._process_group = process_group
        self._asks_here = False
        self._asks_anywhere = False
        self._mean_step_s = math.inf
        self._last_sent: float | None = None

    @property
    def is_used(self) -> bool:
        """Whether there are other processes to ask."""
        return self._process_group.size > 1

    def run_step(
        self, train_step: Any, arguments: tuple[Any, ...], used_s: float | None
    ) -> tuple[FetchedSums, float | None]:
        """Trains a step; returns its sums without those of the messages, and the common time.

        Args:
            train_step: a `TrainStep`.
            arguments: of the step.
            used_s: training time by the clock of this process; None: the step sends no time. All
                processes get that of the primary.
        """
        if not self.is_used:
            return train_step(*arguments), used_s
        group = self._process_group
        message = [*self.outgoing()]
        if used_s is not None:
            message += [used_s / group.num_local_replicas if group.is_primary else 0.0, 0.0]
        sums: FetchedSums = train_step(*arguments, tf.constant(message, tf.float64))
        self.receive(*sums.pop(MESSAGES), group.size * group.num_local_replicas)
        return sums, None if used_s is None else sums.pop(CLOCK)[0]

    def outgoing(self) -> tuple[float, float]:
        """Returns the message for the next step: 1.0 for a request, seconds of the step before."""
        now, before = time.monotonic(), self._last_sent
        self._last_sent = now
        return float(self._asks_here), math.inf if before is None else now - before

    def receive(self, num_requests: float, seconds: float, num_replicas: int) -> None:
        """Takes the sums of the messages over `num_replicas` replicas."""
        self._asks_anywhere = num_requests > 0
        self._mean_step_s = seconds / num_replicas

    def any(self, flag: bool) -> bool:
        """Returns whether any process called this with a true `flag`, after this step or the last.

        All processes must call it after each step, and get the same answer.
        """
        self._asks_here = flag
        if not self.is_used:
            return flag
        if self._asks_anywhere or self._mean_step_s < _LONG_STEP_S:
            return self._asks_anywhere
        return self._process_group.any(flag)
