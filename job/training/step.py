"""Training, evaluation and prediction steps as free functions under a `tf.distribute` strategy.

Replicas return sums and counts; whoever reads them divides once. The loss is a function of sums
over the global batch, so that its value and gradient do not depend on the number of replicas.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from job.distributed.gradient_exchange import Exchange, Plan, Share
from job.inference.predict import Flips
from job.losses import GlobalSum, part_of, replica_sum
from job.metrics.batch import confusion_counts
from job.models.dropout import draw_kept, kept_values, sample_keys
from job.models.normalization import counted_samples
from job.training.optimizer import Adam

# image (B, H, W, C) uint8|uint16, mask (B, H, W) uint8, weight (B,) float32: 0 for padding,
# key (B,) int64: what dropout draws from.
Batch = Mapping[str, tf.Tensor]
Loss = Callable[..., tf.Tensor]
Metrics = Mapping[str, Callable[..., tuple[tf.Tensor, tf.Tensor]]]
Network = Callable[[tf.Tensor], tf.Tensor]  # stored pixels (B, H, W, C) -> logits (B, H, W, K)
Sums = dict[str, tuple[tf.Tensor, tf.Tensor]]  # name -> (sum, count), () float64 each

SKIPPED = "skipped_in_row"  # among the sums of a training step with a loss scale


@dataclass(frozen=True)
class _Backward:
    """What one backward pass of a replica has found, or several together."""

    share: Share
    metric_sums: tf.Tensor

    def __add__(self, other: "_Backward") -> "_Backward":
        return _Backward(self.share + other.share, self.metric_sums + other.metric_sums)


def make_train_step(
    strategy: tf.distribute.Strategy,
    model: keras.Model,
    optimizer: Adam,
    loss: Loss,
    metrics: Metrics,
    plan: Plan | None = None,
    *,
    num_micro_batches: int = 1,
    loss_is_mean: bool = False,
    uses_xla: bool = False,
) -> Callable[[Batch, tf.Tensor, tf.Tensor], Sums]:
    """Returns the compiled `train_step(batch, step, learning_rate) -> sums`.

    `sums` has an entry for `loss` and one for every metric. Where `optimizer` has a loss scale it
    has one for `SKIPPED`, too: how many steps in a row were skipped until now, 0 after an update.

    Args:
        plan: how gradients are exchanged, the same on all replicas; None: by all-reduce.
        num_micro_batches: parts of a replica's batch that go through the network one after the
            other, for one exchange and one update; a divisor of that batch.
        loss_is_mean: `job.losses.is_mean`; else several micro-batches cost a forward pass more.
        uses_xla: the network is compiled, forward and backward; it must hold no collective, so no
            batch normalization and a plan that gathers nothing.
    """
    exchange = Exchange(model, plan)
    compiled = _compiled(model)
    scale = optimizer.loss_scale
    names = ["loss", *metrics, *([SKIPPED] if scale else [])]

    def forward(part: Batch) -> tf.Tensor:
        if uses_xla:
            return compiled(part["image"], draw_kept(model, part["key"]))
        with sample_keys(part["key"]), counted_samples(part["weight"]):
            return model(prepared(model, part["image"]), training=True)

    def loss_of(part: Batch, logits: tf.Tensor, global_sum: GlobalSum) -> tf.Tensor:
        return loss(tf.cast(part["mask"], tf.int32), logits, part["weight"], global_sum)

    def local_sums(part: Batch) -> tf.Tensor:
        """Returns the sums of which the loss is a function; if it is a mean, true counts alone."""
        seen: list[tf.Tensor] = []
        logits = no_logits(part) if loss_is_mean else forward(part)
        loss_of(part, logits, _seen_by(tf.identity, seen))
        return seen[0]

    def no_logits(part: Batch) -> tf.Tensor:
        return tf.zeros((*part["mask"].shape, model.output_shape[-1]), model.outputs[0].dtype)

    def backward(part: Batch, global_sum: GlobalSum) -> tuple[_Backward, tf.Tensor]:
        """Returns what was found, of the scaled loss, and the loss."""
        with exchange.recorded() as factors, tf.GradientTape() as tape:
            logits = forward(part)
            value = loss_of(part, logits, global_sum)
            scaled = scale.scaled(value) if scale else value
        share = exchange.share(tape, scaled, factors)
        return _Backward(share, _metric_sums(part, logits, metrics)), value

    def accumulated(batch: Batch) -> tuple[_Backward, tf.Tensor]:
        """Returns what `backward` of the whole batch would, with the memory of a part of it."""
        parts = _micro_batches(batch, num_micro_batches)
        # The gradient of a function of sums needs those of the whole batch.
        sums: list[tf.Tensor] = []
        for part in parts:
            with tf.control_dependencies(sums[-1:]):
                sums.append(local_sums(part))
        seen: list[tf.Tensor] = []
        global_sum = _seen_by(part_of(replica_sum(tf.add_n(sums))), seen)
        done, _ = backward(parts[0], global_sum)
        for part in parts[1:]:
            # One after the other: together they would need the memory of the whole batch.
            with tf.control_dependencies(done.share.tensors()):
                done += backward(part, global_sum)[0]
        true_sums = part_of(replica_sum(tf.add_n(seen)))
        return done, loss_of(parts[0], no_logits(parts[0]), true_sums)

    def update(
        gradients: list[tf.Tensor], step: tf.Tensor, learning_rate: tf.Tensor
    ) -> list[tf.Tensor]:
        """Updates the weights; returns the sums of `SKIPPED`, (2,) float64, where there are any."""
        if scale is None:
            optimizer.apply(gradients, step=step, learning_rate=learning_rate)
            return []
        skipped = scale.apply(
            gradients,
            lambda found: optimizer.apply(found, step=step, learning_rate=learning_rate),
        )
        return [tf.stack([tf.cast(skipped, tf.float64), tf.constant(1.0, tf.float64)])]

    def replica_step(batch: Batch, step: tf.Tensor, learning_rate: tf.Tensor) -> tf.Tensor:
        # `replica_sum` passes gradients through, so each replica's are its part of the global ones.
        is_whole = num_micro_batches == 1
        done, value = backward(batch, replica_sum) if is_whole else accumulated(batch)
        skipped = update(exchange.gradients(done.share), step, learning_rate)
        return tf.concat([_loss_sums(value, batch), done.metric_sums, *skipped], axis=0)

    @tf.function(reduce_retracing=True, autograph=False)
    def train_step(batch: Batch, step: tf.Tensor, learning_rate: tf.Tensor) -> Sums:
        with exchange.tapped():
            sums = strategy.run(replica_step, (batch, step, learning_rate))
        return _reduced(strategy, sums, names)

    return train_step


def _compiled(model: keras.Model) -> Callable[[tf.Tensor, Mapping[str, tf.Tensor]], tf.Tensor]:
    """Returns the network in training as one program of XLA, and so its gradient.

    It is given what dropout keeps: XLA's generator draws other numbers from the same keys. Hoped
    for on GPUs, where it has not run yet: what stands between convolutions is fused, and their
    channels are padded for tensor cores.
    """

    @tf.function(jit_compile=True, reduce_retracing=True, autograph=False)
    def network(images: tf.Tensor, kept: Mapping[str, tf.Tensor]) -> tf.Tensor:
        with kept_values(kept):
            return model(prepared(model, images), training=True)

    return network


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
        # Turned when they are floating point: 16-bit pixels have no GPU kernel for it.
        found = model(tf.reverse(prepared(model, images), turned), training=False)
        return tf.reverse(found, turned)

    def network(images: tf.Tensor) -> tf.Tensor:
        parts = [logits_of(model, images, turned) for model in models for turned in mirrored]
        if len(parts) == 1:
            return parts[0]
        # Models may compute in several precisions.
        widest = max((part.dtype for part in parts), key=lambda dtype: dtype.size)
        return _logits_of_mean(tf.stack([tf.cast(part, widest) for part in parts]))

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
    *,
    num_micro_batches: int = 1,
) -> Callable[[Batch], tuple[Sums, tf.Tensor]]:
    """Returns the compiled `evaluation_step(batch) -> (sums, counts)`.

    `counts` is (global batch, classes, 4) int64: true and false positives, false and true
    negatives, in the order of the batch, padding included.

    Args:
        num_micro_batches: parts of a replica's batch that go through the network one after the
            other; a divisor of that batch.
    """

    def replica_step(batch: Batch) -> tuple[tf.Tensor, tf.Tensor]:
        seen: list[tf.Tensor] = []  # the sums of which the loss is a function
        metric_sums: list[tf.Tensor] = []
        counts: list[tf.Tensor] = []
        for part in _micro_batches(batch, num_micro_batches):
            done = [each[-1] for each in (seen, metric_sums, counts) if each]
            with tf.control_dependencies(done):
                labels = tf.cast(part["mask"], tf.int32)
                logits = network(part["image"])
                loss(labels, logits, part["weight"], _seen_by(tf.identity, seen))
                metric_sums.append(_metric_sums(part, logits, metrics))
                ids = predicted_ids(logits)
                counts.append(confusion_counts(labels, ids, num_classes, ignore_id))
        # Of its arguments only the sums count, and these are given.
        value = loss(labels, logits, part["weight"], part_of(replica_sum(tf.add_n(seen))))
        sums = [_loss_sums(value, batch), tf.add_n(metric_sums)]
        # Gathering pads, for which whole numbers of 64 bits have no GPU kernel; pixels that are
        # counted are exact in float64.
        return tf.concat(sums, axis=0), tf.cast(tf.concat(counts, axis=0), tf.float64)

    @tf.function(reduce_retracing=True, autograph=False)
    def evaluation_step(batch: Batch) -> tuple[Sums, tf.Tensor]:
        sums, counts = strategy.run(replica_step, (batch,))
        gathered = tf.cast(strategy.gather(counts, axis=0), tf.int64)
        return _reduced(strategy, sums, ["loss", *metrics]), gathered

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


def _micro_batches(batch: Batch, number: int) -> list[Batch]:
    if number == 1:
        return [batch]
    # Not `tf.split`, which has no GPU kernel for whole numbers.
    size = batch["weight"].shape[0] // number
    return [
        {name: value[i * size : (i + 1) * size] for name, value in batch.items()}
        for i in range(number)
    ]


def _seen_by(global_sum: GlobalSum, seen: list[tf.Tensor]) -> GlobalSum:
    """Returns `global_sum`, which adds what it is given to `seen`."""

    def watched(values: tf.Tensor) -> tf.Tensor:
        seen.append(values)
        return global_sum(values)

    return watched


def _loss_sums(loss: tf.Tensor, batch: Batch) -> tf.Tensor:
    """Returns the sum and the count of the loss, (2,) float64."""
    count = tf.reduce_sum(tf.cast(batch["weight"], tf.float64))
    return tf.stack([tf.cast(loss, tf.float64) * count, count])


def _metric_sums(batch: Batch, logits: tf.Tensor, metrics: Metrics) -> tf.Tensor:
    """Returns the sum and the count of each metric, (2 metrics,) float64."""
    labels = tf.cast(batch["mask"], tf.int32)
    pairs = [metric(labels, logits, batch["weight"]) for metric in metrics.values()]
    values = [tf.cast(value, tf.float64) for pair in pairs for value in pair]
    return tf.stack(values) if values else tf.zeros((0,), tf.float64)


def _reduced(strategy: tf.distribute.Strategy, sums: Any, names: Sequence[str]) -> Sums:
    """Returns the sums over all replicas by name; one exchange for all of them."""
    total = tf.unstack(strategy.reduce(tf.distribute.ReduceOp.SUM, sums, axis=None))
    return {name: (total[2 * i], total[2 * i + 1]) for i, name in enumerate(names)}
