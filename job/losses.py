"""Computes the training losses, each as a function of sums over the global batch.

A loss is a weighted sum of terms. A term has two parts: `sums` adds numbers over the pixels of this
replica, and `value` computes a scalar from the same sums over the whole batch. `global_sum`, called
once per loss, connects the two. So every split of a batch over replicas gives the same loss.

Weights. A pixel counts with (weight of its sample) x (weight of its true class), and with 0 if its
label is the ignore id. A padded sample has weight 0. If nothing counts, every loss and its gradient
are 0, never NaN.

Precision. Logits of 16 or 32 bits are computed in float32, logits of 64 bits in float64.
Logarithms of probabilities are computed from the logits. The reference implementation clips
probabilities to [1e-7, 1 - 1e-7] instead. Both agree to 1e-5 inside this range; outside, only this
module has a gradient. `y` is the one-hot label, `p` the probability: softmax over the classes, or
the sigmoid for a single output channel.

Several heads (deep supervision) have one loss, the weighted mean of theirs; all share one
`global_sum`. See `job.deep_supervision`.

Gradients over replicas: see `replica_sum`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import tensorflow as tf

from flexunet.errors import UsageError
from flexunet.settings import suggestion
from job.config import check_class_weights
from job.deep_supervision import at_size_of, head_weights
from job.ssim import structural_similarity

GlobalSum: TypeAlias = Callable[[tf.Tensor], tf.Tensor]
_SMALL = 1e-6  # keeps Dice of one pixel, and of one class of one image, defined
Logits: TypeAlias = tf.Tensor | Sequence[tf.Tensor]
LossFunction: TypeAlias = Callable[[tf.Tensor, Logits, tf.Tensor, GlobalSum], tf.Tensor]


def replica_sum(values: tf.Tensor) -> tf.Tensor:
    """Returns the sum of `values` over all replicas of the current strategy.

    The gradient of the result with respect to `values` is defined as the identity: no collective
    runs in the backward pass. The caller must differentiate the loss on every replica without
    dividing by the number of replicas, and add (SUM) the gradients over the replicas. This is
    exact: the loss is L(S), S = sum_r s_r(weights), with the same value of S on every replica;
    replica r computes L'(S) * ds_r/dweights, and these add up to dL/dweights.
    A loss term that is no function of global sums (such as weight decay) must not be included: it
    would be added once per replica.

    Args:
        values: any shape, float32 or float64, in the replica context of `strategy.run`. Outside of
            any strategy the sum is `values` itself.
    """
    context = tf.distribute.get_replica_context()
    total = context.all_reduce(tf.distribute.ReduceOp.SUM, tf.stop_gradient(values))
    return part_of(total)(values)


def part_of(total: tf.Tensor) -> GlobalSum:
    """Returns a global sum with the known result `total`.

    Its gradient is the identity, as for `replica_sum`.
    """

    @tf.custom_gradient
    def known(values: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        return tf.identity(total), tf.identity

    return known


@dataclass(frozen=True)
class PixelBatch:
    """Holds the batch of one replica.

    Attributes:
        labels: (B, H, W) int32, ignored pixels set to 0.
        logits: (B, H, W, C) float32 or float64.
        is_counted: (B, H, W) with the dtype of the logits, 0 at ignored pixels, else 1.
        pixel_weights: (B, H, W), weight of the true class, 0 at ignored pixels.
        sample_weights: (B,).
    """

    labels: tf.Tensor
    logits: tf.Tensor
    is_counted: tf.Tensor
    pixel_weights: tf.Tensor
    sample_weights: tf.Tensor

    def weights(self) -> tf.Tensor:
        """Returns the weight of each pixel, including sample weights: (B, H, W)."""
        return self.pixel_weights * self.sample_weights[:, tf.newaxis, tf.newaxis]

    def has_one_channel(self) -> bool:
        """Returns whether the output is a single sigmoid channel."""
        return bool(self.logits.shape[-1] == 1)

    def truth(self) -> tf.Tensor:
        """Returns y: (B, H, W, C) one-hot, or the label for a single output channel."""
        if self.has_one_channel():
            return tf.cast(self.labels, self.logits.dtype)[..., tf.newaxis]
        return tf.one_hot(self.labels, self.logits.shape[-1], dtype=self.logits.dtype)

    def probabilities(self) -> tf.Tensor:
        """Returns p: (B, H, W, C) in [0, 1]."""
        return tf.sigmoid(self.logits) if self.has_one_channel() else tf.nn.softmax(self.logits)

    def cross_entropy(self) -> tf.Tensor:
        """Returns -log of the probability of the true class: (B, H, W), at least 0."""
        if self.has_one_channel():
            return tf.nn.sigmoid_cross_entropy_with_logits(
                labels=self.truth()[..., 0], logits=self.logits[..., 0]
            )
        if self.logits.dtype == tf.float64:
            # The operation for integer labels has no GPU kernel for float64.
            return tf.nn.softmax_cross_entropy_with_logits(labels=self.truth(), logits=self.logits)
        return tf.nn.sparse_softmax_cross_entropy_with_logits(
            labels=self.labels, logits=self.logits
        )


@dataclass(frozen=True)
class Term:
    """Defines one term of a loss: its sums over a local batch, and its value from global totals."""

    sums: Callable[[PixelBatch], list[tf.Tensor]]
    value: Callable[[Sequence[tf.Tensor]], tf.Tensor]


def make_loss(
    name: str,
    *,
    num_classes: int,
    class_weights: Sequence[float] | None = None,
    ignore_id: int | None = None,
    focal_gamma: float = 2.0,
) -> LossFunction:
    """Returns the loss `name`: (labels, logits, sample_weights, global_sum) -> scalar.

    The returned function takes labels (B, H, W) integer, logits (B, H, W, C) floating or those of
    several heads, weights (B,) of the samples, and `global_sum`, which adds a vector over all
    replicas (`replica_sum`, or `tf.identity` for one replica). It returns the same scalar on every
    replica: float64 for float64 logits, else float32.

    Args:
        num_classes: C; 1 means one sigmoid channel with labels 0 and 1.
        class_weights: one weight per class id, 0 or more (two if `num_classes` is 1). Pixel means
            are divided by the sum of the weights, so only their ratios matter.
        ignore_id: label of pixels that do not count.
        focal_gamma: exponent of the focal loss, 1 or more.

    Raises:
        UsageError: unknown name, wrong number or sign of the weights, or `focal_gamma` below 1.
    """
    if name not in LOSSES:
        raise UsageError(f"loss={name!r}: unknown loss; {suggestion(name, list(LOSSES))}")
    check_class_weights(class_weights, num_classes)
    if focal_gamma < 1:
        raise UsageError(f"focal_gamma={focal_gamma}: the gradient would be NaN; give 1 or more")
    terms = _focal_terms(focal_gamma) if name == "focal" else LOSSES[name]

    def loss(
        labels: tf.Tensor, logits: Logits, sample_weights: tf.Tensor, global_sum: GlobalSum
    ) -> tf.Tensor:
        heads = logits if isinstance(logits, list | tuple) else [logits]
        same_size = [heads[0], *(at_size_of(labels, each) for each in heads[1:])]
        batches = [
            _pixel_batch(labels, each, sample_weights, class_weights, ignore_id)
            for each in same_size
        ]
        return _evaluate(terms, batches, global_sum)

    return loss


def is_mean(name: str) -> bool:
    """Returns whether the loss is a mean whose denominator depends on labels and weights only.

    Then a part of the batch gives its gradient up to that factor.
    """
    return all(term.value is _mean for _, term in LOSSES[name])


def _pixel_batch(
    labels: tf.Tensor,
    logits: tf.Tensor,
    sample_weights: tf.Tensor,
    class_weights: Sequence[float] | None,
    ignore_id: int | None,
) -> PixelBatch:
    dtype = tf.float64 if logits.dtype == tf.float64 else tf.float32
    labels = tf.cast(labels, tf.int32)
    is_counted = tf.ones_like(labels, dtype)
    if ignore_id is not None:
        is_counted = tf.cast(labels != ignore_id, dtype)
        labels = tf.where(labels != ignore_id, labels, 0)
    sample_weights = tf.cast(sample_weights, dtype)
    pixel_weights = is_counted
    if class_weights is not None:
        pixel_weights = is_counted * tf.gather(tf.constant(class_weights, dtype), labels)
    return PixelBatch(labels, tf.cast(logits, dtype), is_counted, pixel_weights, sample_weights)


def _evaluate(
    terms: Sequence[tuple[float, Term]], batches: Sequence[PixelBatch], global_sum: GlobalSum
) -> tf.Tensor:
    weighted = [
        (head_weight * weight, term, batch)
        for head_weight, batch in zip(head_weights(len(batches)), batches, strict=True)
        for weight, term in terms
    ]
    parts = [term.sums(batch) for _, term, batch in weighted]
    totals = tf.unstack(global_sum(tf.stack([number for part in parts for number in part])))
    loss = tf.zeros((), totals[0].dtype)
    start = 0
    for (weight, term, _), part in zip(weighted, parts, strict=True):
        loss += weight * term.value(totals[start : start + len(part)])
        start += len(part)
    return loss


def _mean(totals: Sequence[tf.Tensor]) -> tf.Tensor:
    """Returns totals[0] / totals[1], or 0 if nothing counts."""
    return tf.math.divide_no_nan(totals[0], totals[1])


def _pixel_sums(batch: PixelBatch, per_pixel: tf.Tensor) -> list[tf.Tensor]:
    weights = batch.weights()
    return [tf.reduce_sum(weights * per_pixel), tf.reduce_sum(weights)]


def _cross_entropy_sums(batch: PixelBatch) -> list[tf.Tensor]:
    return _pixel_sums(batch, batch.cross_entropy())


def _focal_sums(batch: PixelBatch, *, gamma: float) -> list[tf.Tensor]:
    cross_entropy = batch.cross_entropy()
    # 1 - exp(-ce) without cancellation; rounding can make ce slightly negative.
    miss = tf.maximum(-tf.math.expm1(-cross_entropy), 0)
    return _pixel_sums(batch, miss**gamma * cross_entropy)


def _binary_cross_entropy_sums(batch: PixelBatch) -> list[tf.Tensor]:
    log_p, log_not_p = _log_probabilities(batch)
    truth = batch.truth()
    per_channel = -(truth * log_p + (1 - truth) * log_not_p)
    return _pixel_sums(batch, tf.reduce_mean(per_channel, axis=-1))


def _log_probabilities(batch: PixelBatch) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns log p and log(1 - p), (B, H, W, C) each, also exact for p near 0 or 1."""
    if batch.has_one_channel():
        return tf.math.log_sigmoid(batch.logits), tf.math.log_sigmoid(-batch.logits)
    log_p = tf.nn.log_softmax(batch.logits)
    num_classes = batch.logits.shape[-1]
    # 1 - p[c] is the sum of the other classes' probabilities.
    others = [
        tf.reduce_logsumexp(tf.concat([log_p[..., :c], log_p[..., c + 1 :]], axis=-1), axis=-1)
        for c in range(num_classes)
    ]
    return log_p, tf.stack(others, axis=-1)


def _overlap_sums(batch: PixelBatch, *, foreground_alone: bool = False) -> list[tf.Tensor]:
    """Returns I and S, see `LOSSES`.

    Args:
        foreground_alone: leave out class 0, whose many pixels hide the part of the lesions.
    """
    truth, probabilities = batch.truth(), batch.probabilities()
    if foreground_alone and not batch.has_one_channel():
        truth, probabilities = truth[..., 1:], probabilities[..., 1:]
    weights = batch.weights()[..., tf.newaxis]
    return [
        tf.reduce_sum(weights * truth * probabilities),
        tf.reduce_sum(weights * (truth + probabilities)),
    ]


def _dice_value(totals: Sequence[tf.Tensor]) -> tf.Tensor:
    return 1 - (2 * totals[0] + 1) / (totals[1] + 1)


def _iou_value(totals: Sequence[tf.Tensor]) -> tf.Tensor:
    intersection, both = totals
    union = both - intersection
    # As (union - intersection) / union, so that a batch in which nothing counts gives 0.
    return tf.math.divide_no_nan(union - intersection, union)


def _image_dice_sums(batch: PixelBatch) -> list[tf.Tensor]:
    truth, probabilities = batch.truth(), batch.probabilities()
    weights = batch.pixel_weights[..., tf.newaxis]
    intersection = tf.reduce_sum(weights * truth * probabilities, axis=(1, 2, 3))
    both = tf.reduce_sum(weights * (truth + probabilities), axis=(1, 2, 3))
    loss = _dice_value([intersection, both])
    return [tf.reduce_sum(batch.sample_weights * loss), tf.reduce_sum(batch.sample_weights)]


def _dice_loss_along(batch: PixelBatch, axis: int | tuple[int, int], first: int = 0) -> tf.Tensor:
    """Returns 1 - (2 I + e) / (S + e), I and S summed along `axis` of (B, H, W, C).

    Class weights count in sums over pixels; at one pixel they cancel.

    Args:
        first: the first class that counts; a single output channel always does.
    """
    truth, probabilities = batch.truth(), batch.probabilities()
    if not batch.has_one_channel():
        truth, probabilities = truth[..., first:], probabilities[..., first:]
    weights = batch.is_counted if axis == -1 else batch.pixel_weights
    weights = weights[..., tf.newaxis]
    intersection = tf.reduce_sum(weights * truth * probabilities, axis=axis)
    both = tf.reduce_sum(weights * (truth + probabilities), axis=axis)
    # As one quotient, so that where nothing counts it is 0 and not 1 - 1.
    return (both - 2 * intersection) / (both + _SMALL)


def _pixel_dice_sums(batch: PixelBatch) -> list[tf.Tensor]:
    return _pixel_sums(batch, _dice_loss_along(batch, -1))


def _class_dice_sums(batch: PixelBatch) -> list[tf.Tensor]:
    loss = tf.reduce_mean(_dice_loss_along(batch, (1, 2), first=1), axis=-1)
    return [tf.reduce_sum(batch.sample_weights * loss), tf.reduce_sum(batch.sample_weights)]


def _ssim_sums(batch: PixelBatch) -> list[tf.Tensor]:
    # Ignored pixels are 0 in both images: equal, so they do not add to the loss.
    shown = batch.is_counted[..., tf.newaxis]
    similarity = structural_similarity(batch.truth() * shown, batch.probabilities() * shown)
    weights = batch.sample_weights
    return [tf.reduce_sum(weights * (1 - similarity)), tf.reduce_sum(weights)]


def _focal_terms(gamma: float) -> tuple[tuple[float, Term], ...]:
    return ((1.0, Term(partial(_focal_sums, gamma=gamma), _mean)),)


_CROSS_ENTROPY = Term(_cross_entropy_sums, _mean)
_BINARY_CROSS_ENTROPY = Term(_binary_cross_entropy_sums, _mean)
_DICE = Term(_overlap_sums, _dice_value)
_FOREGROUND_DICE = Term(partial(_overlap_sums, foreground_alone=True), _dice_value)
_IOU = Term(_overlap_sums, _iou_value)
_IMAGE_DICE = Term(_image_dice_sums, _mean)
_SSIM = Term(_ssim_sums, _mean)
_CE_PIXEL_DICE = ((1.0, _CROSS_ENTROPY), (1.0, Term(_pixel_dice_sums, _mean)))
_CLASS_DICE = ((1.0, Term(_class_dice_sums, _mean)),)
_BCE_DICE = ((0.5, _BINARY_CROSS_ENTROPY), (0.5, _DICE))
_BCE_IOU = ((0.5, _BINARY_CROSS_ENTROPY), (0.5, _IOU))
_BASNET = ((1 / 3, _BINARY_CROSS_ENTROPY), (1 / 3, _SSIM), (1 / 3, _IOU))

LOSSES: dict[str, tuple[tuple[float, Term], ...]] = {
    "categorical_crossentropy": ((1.0, _CROSS_ENTROPY),),
    "dice_loss": ((1.0, _DICE),),
    "bce_dice_loss": _BCE_DICE,
    "iou_loss": ((1.0, _IOU),),
    "bce_iou_loss": _BCE_IOU,
    "basnet_hybrid_loss": _BASNET,
    "dice_loss_multiclass": ((1.0, _IMAGE_DICE),),
    "categorical_focal_dice_loss": _CE_PIXEL_DICE,
    "dice_loss_foreground": _CLASS_DICE,
    "focal": _focal_terms(2.0),
    "ce_dice": ((0.5, _CROSS_ENTROPY), (0.5, _FOREGROUND_DICE)),
    "dice": ((1.0, _DICE),),
    "dice_multiclass": ((1.0, _IMAGE_DICE),),
    "bce_dice": _BCE_DICE,
    "iou": ((1.0, _IOU),),
    "bce_iou": _BCE_IOU,
    "basnet_hybrid": _BASNET,
    "categorical_focal_dice": _CE_PIXEL_DICE,
    "dice_foreground": _CLASS_DICE,
}
"""The terms of each loss and their weights, by name. w is the weight of a pixel. Sums run over all
pixels and channels of the whole batch:

categorical_crossentropy  sum(w * -log p[true]) / sum(w)
binary cross-entropy      sum(w * mean_c -(y log p + (1 - y) log(1 - p))) / sum(w), in some of these
dice_loss                 1 - (2 I + 1) / (S + 1),  I = sum(w y p),  S = sum(w (y + p))
iou_loss                  1 - I / (S - I)
bce_dice_loss             (binary cross-entropy + dice_loss) / 2
bce_iou_loss              (binary cross-entropy + iou_loss) / 2
basnet_hybrid_loss        (binary cross-entropy + mean over images of (1 - SSIM) + iou_loss) / 3
dice_loss_multiclass      mean over images of 1 - (2 I + 1) / (S + 1), I and S of that image
categorical_focal_dice_loss
                          categorical_crossentropy + weighted mean over pixels of
                          1 - (2 I + e) / (S + e), I and S of the classes at one pixel, e = 1e-6.
                          It has no focal term; the name is the reference's
dice_loss_foreground      mean over images and classes but 0 of 1 - (2 I + e) / (S + e),
                          I and S of that image and class, e = 1e-6
focal                     sum(w * (1 - p[true])**gamma * -log p[true]) / sum(w), arXiv:1708.02002
ce_dice                   (categorical_crossentropy + dice_loss of all classes but 0) / 2

The short names are the same losses. Class weights do not enter SSIM.
"""
