"""Evaluates a batch: loss, metrics and the confusion counts of each case, and its probabilities.

`make_evaluation_step` adds up the sums of all replicas, after each batch. `make_local_step` uses no
collectives: each process keeps the sums of its replicas, and `total_sums` adds them at the end.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from job.config import SSIM_SIZE
from job.distributed.replica_sums import (
    Batch,
    Criterion,
    Sums,
    loss_sums,
    metric_sums,
    micro_batches,
    reduced,
    seen_by,
)
from job.losses import part_of, replica_sum
from job.metrics.batch import confusion_counts
from job.models.ensemble import Network, predicted_ids, probabilities_of_logits


@dataclass(frozen=True)
class ReplicaSums:
    """The sums of one replica over its part of a batch.

    Attributes:
        loss: (S,) float32 or float64, from which the loss of the batch is computed.
        count: the sum of the sample weights.
        metrics: (2 metrics,) float64, sum and count of each.
    """

    loss: npt.NDArray[np.floating]
    count: float
    metrics: npt.NDArray[np.float64]


def make_evaluation_step(
    strategy: tf.distribute.Strategy,
    network: Network,
    criterion: Criterion,
    num_classes: int,
    ignore_id: int | None,
    *,
    num_micro_batches: int = 1,
) -> Callable[[Batch], tuple[Sums, tf.Tensor]]:
    """Returns the compiled `evaluation_step(batch) -> (sums, counts)`.

    `counts` is (global batch, classes, 4) int64: true and false positives, false and true
    negatives, in the order of the batch, padding included.

    Args:
        network: of models that were made in the scope of `strategy`.
        num_micro_batches: parts of the batch of a replica that go through the network one after
            another; a divisor of that batch.
    """
    loss = criterion.loss

    def replica_step(batch: Batch) -> tuple[tf.Tensor, tf.Tensor]:
        seen: list[tf.Tensor] = []  # the sums from which the loss is computed
        metrics: list[tf.Tensor] = []
        counts: list[tf.Tensor] = []
        for part in micro_batches(batch, num_micro_batches):
            done = [each[-1] for each in (seen, metrics, counts) if each]
            with tf.control_dependencies(done):
                labels = tf.cast(part["mask"], tf.int32)
                logits = network(part["image"])
                loss(labels, logits, part["weight"], seen_by(tf.identity, seen))
                metrics.append(metric_sums(part, logits, criterion.metrics))
                ids = predicted_ids(logits)
                counts.append(confusion_counts(labels, ids, num_classes, ignore_id))
        # The loss depends only on the sums; the other arguments are of the last part.
        value = loss(labels, logits, part["weight"], part_of(replica_sum(tf.add_n(seen))))
        sums = [loss_sums(value, batch), tf.add_n(metrics)]
        # Gathering pads, and 64-bit integers have no GPU kernel for that. Pixel counts are exact in
        # float64.
        return tf.concat(sums, axis=0), tf.cast(tf.concat(counts, axis=0), tf.float64)

    @tf.function(reduce_retracing=True, autograph=False)
    def evaluation_step(batch: Batch) -> tuple[Sums, tf.Tensor]:
        sums, counts = strategy.run(replica_step, (batch,))
        gathered = tf.cast(strategy.gather(counts, axis=0), tf.int64)
        return reduced(strategy, sums, ["loss", *criterion.metrics]), gathered

    return evaluation_step


def make_local_step(
    strategy: tf.distribute.Strategy,
    network: Network,
    criterion: Criterion,
    num_micro_batches: int = 1,
) -> Callable[[Batch], list[tuple[ReplicaSums, npt.NDArray[np.float32]]]]:
    """Returns `local_step(batch)`: sums and probabilities of each replica of this process.

    The probabilities are (b, H, W, K) float32, with b the batch of a replica. They are of the same
    logits as the sums.

    Args:
        network, num_micro_batches: as for `make_evaluation_step`.
    """

    def replica_step(batch: Batch) -> tuple[tf.Tensor, ...]:
        seen: list[tf.Tensor] = []
        metrics: list[tf.Tensor] = []
        probabilities: list[tf.Tensor] = []
        for part in micro_batches(batch, num_micro_batches):
            done = [each[-1] for each in (seen, metrics, probabilities) if each]
            with tf.control_dependencies(done):
                logits = network(part["image"])
                labels = tf.cast(part["mask"], tf.int32)
                criterion.loss(labels, logits, part["weight"], seen_by(tf.identity, seen))
                metrics.append(metric_sums(part, logits, criterion.metrics))
                probabilities.append(probabilities_of_logits(logits))
        count = tf.reduce_sum(tf.cast(batch["weight"], tf.float64))
        return tf.add_n(seen), count, tf.add_n(metrics), tf.concat(probabilities, axis=0)

    @tf.function(reduce_retracing=True, autograph=False)
    def compiled(batch: Batch) -> tuple[tf.Tensor, ...]:
        found: tuple[tf.Tensor, ...] = strategy.run(replica_step, (batch,))
        return found

    def local_step(batch: Batch) -> list[tuple[ReplicaSums, npt.NDArray[np.float32]]]:
        of_replicas = zip(*map(strategy.experimental_local_results, compiled(batch)), strict=True)
        return [
            (ReplicaSums(loss.numpy(), float(count), metrics.numpy()), probabilities.numpy())
            for loss, count, metrics, probabilities in of_replicas
        ]

    return local_step


def total_sums(
    batches: Iterable[Sequence[ReplicaSums]], criterion: Criterion, num_outputs: int
) -> Iterator[dict[str, tuple[float, float]]]:
    """Yields (sum, count) of the loss and of each metric over all replicas, for each batch.

    Args:
        batches: the sums of the replicas, in the order of their numbers.
        num_outputs: channels of the logits.
    """

    @tf.function(reduce_retracing=True, autograph=False)
    def loss_of(total: tf.Tensor) -> tf.Tensor:
        # The loss depends only on the sums; the other arguments have any values.
        labels = tf.zeros((1, SSIM_SIZE, SSIM_SIZE), tf.int32)
        logits = tf.zeros((1, SSIM_SIZE, SSIM_SIZE, num_outputs), total.dtype)
        return criterion.loss(labels, logits, tf.zeros((1,)), part_of(total))

    for replicas in batches:
        # A few numbers: not every operation on integers has a GPU kernel.
        with tf.device("CPU:0"):
            total = tf.add_n([tf.constant(each.loss) for each in replicas])
            value = float(loss_of(total))
        sums = {"loss": (sum(value * each.count for each in replicas), _total_count(replicas))}
        metrics = np.sum([each.metrics for each in replicas], axis=0)
        for index, name in enumerate(criterion.metrics):
            sums[name] = float(metrics[2 * index]), float(metrics[2 * index + 1])
        yield sums


def _total_count(replicas: Sequence[ReplicaSums]) -> float:
    return sum(each.count for each in replicas)
