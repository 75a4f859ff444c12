"""Evaluates a batch on all replicas: loss, metrics and the confusion counts of each case."""

from collections.abc import Callable

import tensorflow as tf

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
from job.models.ensemble import Network, predicted_ids


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
