"""Training, evaluation and prediction steps as free functions under a `tf.distribute` strategy.

Replicas return sums and counts; whoever reads them divides once. The loss is a function of sums
over the global batch, so that its value and gradient do not depend on the number of replicas.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from job.dropout import sample_keys
from job.exchange import Exchange, Plan
from job.losses import replica_sum
from job.metrics import confusion_counts
from job.optimizer import Adam
from job.predict import Flips

# image (B, H, W, C) uint8|uint16, mask (B, H, W) uint8, weight (B,) float32: 0 for padding,
# key (B,) int64: what dropout draws from.
Batch = Mapping[str, tf.Tensor]
Loss = Callable[..., tf.Tensor]
Metrics = Mapping[str, Callable[..., tuple[tf.Tensor, tf.Tensor]]]
Network = Callable[[tf.Tensor], tf.Tensor]  # stored pixels (B, H, W, C) -> logits (B, H, W, K)
Sums = dict[str, tuple[tf.Tensor, tf.Tensor]]  # name -> (sum, count), () float64 each


def make_train_step(
    strategy: tf.distribute.Strategy,
    model: keras.Model,
    optimizer: Adam,
    loss: Loss,
    metrics: Metrics,
    plan: Plan | None = None,
) -> Callable[[Batch, tf.Tensor, tf.Tensor], Sums]:
    """Returns the compiled `train_step(batch, step, learning_rate) -> sums`.

    `sums` has an entry for `loss` and one for every metric.

    Args:
        plan: how gradients are exchanged, the same on all replicas; None: by all-reduce.
    """
    exchange = Exchange(model, plan)

    def replica_step(batch: Batch, step: tf.Tensor, learning_rate: tf.Tensor) -> tf.Tensor:
        labels = tf.cast(batch["mask"], tf.int32)
        keys = sample_keys(batch["key"])
        with keys, exchange.recorded() as factors, tf.GradientTape() as tape:
            logits = model(prepared(model, batch["image"]), training=True)
            value = loss(labels, logits, batch["weight"], replica_sum)
        # `replica_sum` passes gradients through, so each replica's are its part of the global ones.
        gradients = exchange.gradients(tape, value, factors)
        optimizer.apply(gradients, step=step, learning_rate=learning_rate)
        return _sums(value, batch, labels, logits, metrics)

    @tf.function(reduce_retracing=True, autograph=False)
    def train_step(batch: Batch, step: tf.Tensor, learning_rate: tf.Tensor) -> Sums:
        with exchange.tapped():
            sums = strategy.run(replica_step, (batch, step, learning_rate))
        return _reduced(strategy, sums, metrics)

    return train_step


def network_of(models: Sequence[keras.Model], flips: Flips = "none") -> Network:
    """Returns the network that `models` are together, over mirrored pictures where `flips` says so.

    Its probabilities are the mean of theirs; one model without flips is what it always was.
    """
    axes = {"none": [], "horizontal": [2], "vertical": [1], "both": [2, 1]}[flips]
    mirrored: list[list[int]] = [[]]
    for axis in axes:
        mirrored += [[*each, axis] for each in mirrored]

    def logits_of(model: keras.Model, images: tf.Tensor, turned: list[int]) -> tf.Tensor:
        if not turned:
            return model(prepared(model, images), training=False)
        found = model(prepared(model, tf.reverse(images, turned)), training=False)
        return tf.reverse(found, turned)

    def network(images: tf.Tensor) -> tf.Tensor:
        parts = [logits_of(model, images, turned) for model in models for turned in mirrored]
        return parts[0] if len(parts) == 1 else _logits_of_mean(tf.stack(parts))

    return network


def _logits_of_mean(logits: tf.Tensor) -> tf.Tensor:
    """Returns logits (B, H, W, K) of the mean probabilities of (N, B, H, W, K), without overflow.

    Logits of a softmax are logarithms of probabilities; of a sigmoid, of p / (1 - p).
    """
    if logits.shape[-1] == 1:
        log_p, log_not_p = tf.math.log_sigmoid(logits), tf.math.log_sigmoid(-logits)
        return tf.reduce_logsumexp(log_p, axis=0) - tf.reduce_logsumexp(log_not_p, axis=0)
    count = tf.cast(tf.shape(logits)[0], logits.dtype)
    return tf.reduce_logsumexp(tf.nn.log_softmax(logits), axis=0) - tf.math.log(count)


def make_evaluation_step(
    strategy: tf.distribute.Strategy,
    network: Network,
    loss: Loss,
    metrics: Metrics,
    num_classes: int,
    ignore_id: int | None,
) -> Callable[[Batch], tuple[Sums, tf.Tensor]]:
    """Returns the compiled `evaluation_step(batch) -> (sums, counts)`.

    `counts` is (global batch, classes, 4) int64: true and false positives, false and true
    negatives, in the order of the batch, padding included.
    """

    def replica_step(batch: Batch) -> tuple[tf.Tensor, tf.Tensor]:
        labels = tf.cast(batch["mask"], tf.int32)
        logits = network(batch["image"])
        value = loss(labels, logits, batch["weight"], replica_sum)
        counts = confusion_counts(labels, predicted_ids(logits), num_classes, ignore_id)
        return _sums(value, batch, labels, logits, metrics), counts

    @tf.function(reduce_retracing=True, autograph=False)
    def evaluation_step(batch: Batch) -> tuple[Sums, tf.Tensor]:
        sums, counts = strategy.run(replica_step, (batch,))
        return _reduced(strategy, sums, metrics), strategy.gather(counts, axis=0)

    return evaluation_step


def make_probability_step(network: Network) -> Callable[[Any], tf.Tensor]:
    """Returns the compiled `probability_step(images (B, H, W, C)) -> (B, H, W, K)` float32.

    Softmax over K, or the sigmoid where K = 1.
    """

    @tf.function(reduce_retracing=True, autograph=False)
    def probability_step(images: tf.Tensor) -> tf.Tensor:
        logits = network(images)
        is_single = logits.shape[-1] == 1
        probabilities = tf.sigmoid(logits) if is_single else tf.nn.softmax(logits)
        return tf.cast(probabilities, tf.float32)

    return probability_step


def prepared(model: keras.Model, images: tf.Tensor) -> tf.Tensor:
    """Returns stored pixels (B, H, W, C) as the model's input: its channels, floating point."""
    channels = model.input_shape[-1]
    images = tf.cast(images, tf.float64 if model.dtype == "float64" else tf.float32)
    if images.shape[-1] == 1 and channels > 1:
        images = tf.repeat(images, channels, axis=-1)
    return images


def predicted_ids(logits: tf.Tensor) -> tf.Tensor:
    """Returns the most probable class of each pixel, (B, H, W) int32, for (B, H, W, K) logits.

    K = 1 is a sigmoid output: class 1 where its probability is above one half.
    """
    if logits.shape[-1] == 1:
        return tf.cast(logits[..., 0] > 0, tf.int32)
    return tf.argmax(logits, axis=-1, output_type=tf.int32)


def _sums(
    loss: tf.Tensor, batch: Batch, labels: tf.Tensor, logits: tf.Tensor, metrics: Metrics
) -> tf.Tensor:
    """Returns the sum and the count of the loss and of each metric, (2 + 2 metrics,) float64."""
    count = tf.reduce_sum(tf.cast(batch["weight"], tf.float64))
    pairs = [(tf.cast(loss, tf.float64) * count, count)]
    pairs += [metric(labels, logits, batch["weight"]) for metric in metrics.values()]
    return tf.stack([tf.cast(value, tf.float64) for pair in pairs for value in pair])


def _reduced(strategy: tf.distribute.Strategy, sums: Any, metrics: Metrics) -> Sums:
    """Returns the sums over all replicas by name; one exchange for all of them."""
    total = tf.unstack(strategy.reduce(tf.distribute.ReduceOp.SUM, sums, axis=None))
    names = ["loss", *metrics]
    return {name: (total[2 * i], total[2 * i + 1]) for i, name in enumerate(names)}
