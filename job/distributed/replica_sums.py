"""Computes sums over a global batch: per micro-batch, per replica and over all replicas.

Replicas return sums and counts; the reader divides once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from job.losses import GlobalSum

# image (B, H, W, C) uint8|uint16, mask (B, H, W) uint8, weight (B,) float32: 0 for padding,
# key (B,) int64: random keys of dropout.
Batch = Mapping[str, tf.Tensor]
Loss = Callable[..., tf.Tensor]
Metrics = Mapping[str, Callable[..., tuple[tf.Tensor, tf.Tensor]]]
Sums = dict[str, tuple[tf.Tensor, tf.Tensor]]  # name -> (sum, count), () float64 each
FetchedSums = dict[str, tuple[float, float]]  # the same as numbers of Python


@dataclass(frozen=True)
class Criterion:
    """Holds the loss and, by name, the metrics to compute on every batch."""

    loss: Loss
    metrics: Metrics


def micro_batches(batch: Batch, number: int) -> list[Batch]:
    """Returns `batch` in `number` equal parts; `number` divides it."""
    if number == 1:
        return [batch]
    # `tf.split` has no GPU kernel for integers.
    size = batch["weight"].shape[0] // number
    return [
        {name: value[i * size : (i + 1) * size] for name, value in batch.items()}
        for i in range(number)
    ]


def seen_by(global_sum: GlobalSum, seen: list[tf.Tensor]) -> GlobalSum:
    """Returns a `global_sum` that also appends its arguments to `seen`."""

    def watched(values: tf.Tensor) -> tf.Tensor:
        seen.append(values)
        return global_sum(values)

    return watched


def loss_sums(loss: tf.Tensor, batch: Batch) -> tf.Tensor:
    """Returns the sum and the count of the loss, (2,) float64."""
    count = tf.reduce_sum(tf.cast(batch["weight"], tf.float64))
    return tf.stack([tf.cast(loss, tf.float64) * count, count])


def metric_sums(batch: Batch, logits: tf.Tensor, metrics: Metrics) -> tf.Tensor:
    """Returns the sum and the count of each metric, (2 metrics,) float64."""
    labels = tf.cast(batch["mask"], tf.int32)
    pairs = [metric(labels, logits, batch["weight"]) for metric in metrics.values()]
    values = [tf.cast(value, tf.float64) for pair in pairs for value in pair]
    return tf.stack(values) if values else tf.zeros((0,), tf.float64)


def reduced(strategy: tf.distribute.Strategy, sums: Any, names: Sequence[str]) -> Sums:
    """Returns the sums over all replicas by name, in one exchange."""
    total = tf.unstack(strategy.reduce(tf.distribute.ReduceOp.SUM, sums, axis=None))
    return {name: (total[2 * i], total[2 * i + 1]) for i, name in enumerate(names)}
