"""The losses against the reference implementation's numbers, by hand, and over two replicas."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from flexunet.errors import UsageError
from job.losses import LOSSES, is_mean, make_loss, replica_sum
from job.ssim import structural_similarity
from tests.job.by_hand import cross_entropy, foreground_dice, pixel_dice

PARITY = Path(__file__).parent / "parity"
ENDINGS = ("loss", "entropy", "multiclass", "focal", "loss_foreground")
LONG_NAMES = [name for name in LOSSES if name.endswith(ENDINGS)]


def batch(*, num_classes: int, dtype: Any = np.float64, seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, max(num_classes, 2), (4, 13, 16))
    return labels, rng.normal(0, 3, (4, 13, 16, num_classes)).astype(dtype)


def value_and_gradient(
    function: Any,
    labels: Any,
    logits: Any,
    weights: Any,
    global_sum: Callable[[tf.Tensor], tf.Tensor] = tf.identity,
) -> tuple[float, Any]:
    logits = tf.constant(logits)
    with tf.GradientTape() as tape:
        tape.watch(logits)
        loss = function(tf.constant(labels), logits, tf.constant(weights), global_sum)
    return float(loss), tape.gradient(loss, logits).numpy()


@pytest.mark.parametrize(
    "name",
    [
        "categorical_crossentropy",
        "dice_loss",
        "bce_dice_loss",
        "iou_loss",
        "bce_iou_loss",
        "basnet_hybrid_loss",
    ],
)
def test_make_loss_agrees_with_the_reference(name: str) -> None:
    with np.load(PARITY / "losses_metrics.npz", allow_pickle=False) as numbers:
        expected = json.loads(str(numbers["expected"]))
        labels, logits = numbers["labels"], numbers["logits"]
    loss = make_loss(name, num_classes=2)(labels, tf.constant(logits), np.ones(3), tf.identity)
    assert loss.dtype == tf.float32
    assert float(loss) == pytest.approx(expected[name], abs=1e-5)


def test_dice_loss_multiclass_agrees_with_the_reference_metric() -> None:
    with np.load(PARITY / "losses_metrics.npz", allow_pickle=False) as numbers:
        expected = json.loads(str(numbers["expected"]))
        labels, logits = numbers["labels"], numbers["logits"]
    function = make_loss("dice_loss_multiclass", num_classes=2)
    loss = function(labels, tf.constant(logits), np.ones(3), tf.identity)
    assert float(loss) == pytest.approx(1 - expected["dice_coef_multiclass"], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # One pixel, true class 1, p = (1/4, 3/4).
        ("categorical_crossentropy", math.log(4 / 3)),
        ("dice_loss", 1 - (2 * 0.75 + 1) / (2 + 1)),
        ("iou_loss", 1 - 0.75 / (2 - 0.75)),
        ("bce_dice_loss", (math.log(4 / 3) + 1 - 2.5 / 3) / 2),
        ("bce_iou_loss", (math.log(4 / 3) + 0.4) / 2),
        ("dice_loss_multiclass", 1 - 2.5 / 3),
        ("focal", 0.25**2 * math.log(4 / 3)),
        ("ce_dice", (math.log(4 / 3) + 1 - (2 * 0.75 + 1) / (1 + 0.75 + 1)) / 2),
        ("categorical_focal_dice_loss", math.log(4 / 3) + 1 - (1.5 + 1e-6) / (2 + 1e-6)),
        ("dice_loss_foreground", 1 - (1.5 + 1e-6) / (1.75 + 1e-6)),
    ],
)
def test_make_loss_of_one_pixel_is_as_by_hand(name: str, expected: float) -> None:
    logits = np.log([[[[1.0, 3.0]]]])
    loss = make_loss(name, num_classes=2)(np.array([[[1]]]), logits, np.ones(1), tf.identity)
    assert float(loss) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("class_weights", [None, (1.0, 4.0, 0.5)])
def test_losses_of_newer_projects_are_as_by_hand(class_weights: Any) -> None:
    labels, logits = batch(num_classes=3, dtype=np.float32)
    labels[0][labels[0] == 2] = 0  # a class that an image lacks
    labels[1, :3] = 255
    samples = np.array([1.0, 0.5, 2, 0])
    weights = np.array(class_weights or (1.0, 1, 1))[np.where(labels == 255, 0, labels)]
    weights[labels == 255] = 0
    whole = weights * samples[:, np.newaxis, np.newaxis]
    expected = {
        "categorical_focal_dice_loss": np.average(
            cross_entropy(labels, logits) + 1 - pixel_dice(labels, logits), weights=whole
        ),
        "dice_loss_foreground": np.average(
            1 - foreground_dice(labels, logits, weights).mean(axis=1), weights=samples
        ),
    }
    for name, by_hand in expected.items():
        function = make_loss(name, num_classes=3, class_weights=class_weights, ignore_id=255)
        loss, gradient = value_and_gradient(function, labels, logits, samples)
        assert loss == pytest.approx(by_hand, abs=1e-6), name
        assert np.isfinite(gradient).all()
        assert gradient[0].any()


@pytest.mark.parametrize("name", [name for name in LONG_NAMES if is_mean(name)])
def test_a_part_of_the_batch_gives_the_gradient_of_a_mean_up_to_a_factor(name: str) -> None:
    labels, logits = batch(num_classes=3)
    function = make_loss(name, num_classes=3, class_weights=(1, 4, 2))
    _, whole = value_and_gradient(function, labels, logits, np.ones(4))
    _, part = value_and_gradient(function, labels[:2], logits[:2], np.ones(2))
    factor = (whole[:2] * part).sum() / (part * part).sum()
    # Micro-batches of a mean need no sums of the whole batch.
    assert np.abs(whole[:2] - factor * part).max() < 1e-12 * np.abs(whole).max()


@pytest.mark.parametrize("name", ["categorical_focal_dice_loss", "dice_loss_foreground"])
@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16])
def test_losses_of_newer_projects_take_logits_of_mixed_precision(name: str, dtype: Any) -> None:
    labels, logits = batch(num_classes=3, dtype=np.float32)
    half = tf.cast(logits, dtype)
    function = make_loss(name, num_classes=3)
    wide, _ = value_and_gradient(function, labels, tf.cast(half, tf.float32), np.ones(4))
    loss, gradient = value_and_gradient(function, labels, half, np.ones(4))
    assert loss == wide
    assert gradient.dtype == dtype.as_numpy_dtype
    assert np.isfinite(gradient.astype(np.float32)).all()


def test_make_loss_of_one_channel_is_the_sigmoid() -> None:
    logits = np.log([[[[3.0], [1 / 3]]]])  # p = 3/4, 1/4; truth 1, 0
    function = make_loss("bce_dice", num_classes=1)
    loss = function(np.array([[[1, 0]]]), logits, np.ones(1), tf.identity)
    dice = 1 - (2 * 0.75 + 1) / (1 + 1 + 1)
    assert float(loss) == pytest.approx((math.log(4 / 3) + dice) / 2, abs=1e-12)


def test_binary_cross_entropy_of_three_classes_is_the_mean_over_channels() -> None:
    # p = (1/2, 1/4, 1/4), true class 0: -(log 1/2 + log 3/4 + log 3/4) / 3; dice = 1 - 2 / 3.
    logits = np.log([[[[2.0, 1.0, 1.0]]]])
    function = make_loss("bce_dice", num_classes=3)
    loss = function(np.array([[[0]]]), logits, np.ones(1), tf.identity)
    entropy = (math.log(2) + 2 * math.log(4 / 3)) / 3
    assert float(loss) == pytest.approx((entropy + 1 / 3) / 2, abs=1e-12)


def test_class_weights_give_the_weighted_mean_of_pixels() -> None:
    logits = np.log([[[[1.0, 3.0], [1.0, 3.0]]]])  # p(1) = 3/4; labels 1 and 0, weights 3 and 1
    function = make_loss("categorical_crossentropy", num_classes=2, class_weights=(1, 3))
    loss = function(np.array([[[1, 0]]]), logits, np.ones(1), tf.identity)
    assert float(loss) == pytest.approx((3 * math.log(4 / 3) + math.log(4)) / 4, abs=1e-12)


@pytest.mark.parametrize("num_classes", [1, 2, 3])
@pytest.mark.parametrize("name", LONG_NAMES)
def test_padded_samples_and_ignored_pixels_count_nowhere(name: str, num_classes: int) -> None:
    labels, logits = batch(num_classes=num_classes)
    function = make_loss(name, num_classes=num_classes, ignore_id=255)
    labels[:, 0, :5] = 255
    other = logits.copy()
    other[:, 0, :5] += 7.0
    expected, _ = value_and_gradient(function, labels[:3], logits[:3], np.ones(3))
    found, gradient = value_and_gradient(function, labels, other, np.array([1.0, 1, 1, 0]))
    assert found == pytest.approx(expected, abs=1e-14)
    assert not gradient[3].any()
    assert not gradient[:, 0, :5].any()
    assert gradient[:3, 1:].any()


@pytest.mark.parametrize("num_classes", [1, 2])
@pytest.mark.parametrize("name", LONG_NAMES)
def test_a_batch_where_nothing_counts_gives_zero(name: str, num_classes: int) -> None:
    labels, logits = batch(num_classes=num_classes, dtype=np.float32)
    function = make_loss(name, num_classes=num_classes, ignore_id=9)
    for ids, weights in ((np.full_like(labels, 9), np.ones(4)), (labels, np.zeros(4))):
        loss, gradient = value_and_gradient(function, ids, logits, weights)
        assert loss == 0
        assert not gradient.any()


@pytest.mark.parametrize("num_classes", [1, 2])
@pytest.mark.parametrize("name", LONG_NAMES)
def test_confident_logits_keep_loss_and_gradient_finite(name: str, num_classes: int) -> None:
    labels, logits = batch(num_classes=num_classes, dtype=np.float32)
    function = make_loss(name, num_classes=num_classes)
    loss, gradient = value_and_gradient(function, labels, logits * 1000, np.ones(4))
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()


def test_bfloat16_logits_are_computed_in_float32() -> None:
    labels, logits = batch(num_classes=2, dtype=np.float32)
    function = make_loss("bce_dice", num_classes=2)
    half = tf.cast(logits, tf.bfloat16)
    loss = function(labels, half, np.ones(4), tf.identity)
    assert loss.dtype == tf.float32
    expected = function(labels, tf.cast(half, tf.float32), np.ones(4), tf.identity)
    assert float(loss) == float(expected)


def on_two_replicas(strategy: Any, function: Any, *arrays: Any) -> tuple[list[float], Any]:
    @tf.function  # type: ignore[untyped-decorator]
    def run() -> Any:
        def step() -> tuple[tf.Tensor, tf.Tensor]:
            i = tf.distribute.get_replica_context().replica_id_in_sync_group * 2
            labels, logits, weights = (tf.constant(array)[i : i + 2] for array in arrays)
            with tf.GradientTape() as tape:
                tape.watch(logits)
                loss = function(labels, logits, weights, replica_sum)
            return loss, tape.gradient(loss, logits)

        return [strategy.experimental_local_results(result) for result in strategy.run(step)]

    losses, gradients = run()
    return [float(loss) for loss in losses], np.concatenate([part.numpy() for part in gradients])


@pytest.mark.parametrize(
    ("name", "num_classes"), [(name, 2) for name in LONG_NAMES] + [("basnet_hybrid_loss", 1)]
)
def test_two_replicas_give_the_loss_and_gradient_of_one(
    two_cpus: Any, name: str, num_classes: int
) -> None:
    labels, logits = batch(num_classes=num_classes)
    labels[1, :4] = 255
    weights = np.array([1.0, 1, 0.5, 0])
    function = make_loss(name, num_classes=num_classes, class_weights=(1, 4), ignore_id=255)
    expected, expected_gradient = value_and_gradient(function, labels, logits, weights)
    # The whole batch on one replica through the same sum.
    single, _ = value_and_gradient(function, labels, logits, weights, replica_sum)
    assert single == expected
    losses, gradient = on_two_replicas(two_cpus, function, labels, logits, weights)
    assert losses[0] == losses[1] == pytest.approx(expected, abs=1e-12)
    # A gradient of d(loss)/d(logits of a sample) exists on the sample's replica alone, so that the
    # sum over replicas is their concatenation.
    assert np.abs(gradient - expected_gradient).max() < 1e-12 * np.abs(expected_gradient).max()


def test_summed_gradients_of_a_shared_weight_are_those_of_one_replica(two_cpus: Any) -> None:
    labels, features = batch(num_classes=2)
    function = make_loss("bce_iou", num_classes=2)
    with two_cpus.scope():
        scale = tf.Variable(np.array([0.7, -0.2]))

    @tf.function  # type: ignore[untyped-decorator]
    def gradients() -> Any:
        def step() -> tf.Tensor:
            i = tf.distribute.get_replica_context().replica_id_in_sync_group * 2
            inputs, ids = tf.constant(features)[i : i + 2], tf.constant(labels)[i : i + 2]
            with tf.GradientTape() as tape:
                loss = function(ids, inputs * scale, tf.ones(2, tf.float64), replica_sum)
            return tape.gradient(loss, scale)

        return two_cpus.experimental_local_results(two_cpus.run(step))

    weights = tf.constant([0.7, -0.2], tf.float64)
    with tf.GradientTape() as tape:
        tape.watch(weights)
        loss = function(labels, tf.constant(features) * weights, np.ones(4), tf.identity)
    expected = tape.gradient(loss, weights).numpy()
    assert sum(part.numpy() for part in gradients()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["ce_dice", "dice_multiclass", "basnet_hybrid"])
def test_coarser_heads_count_half_as_much_at_each_level_for_every_pixel_alike(name: str) -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, (2, 16, 24))
    heads = [random.normal(size=(2, 16 // step, 24 // step, 3)) for step in (1, 2, 8)]
    loss = make_loss(name, num_classes=3, class_weights=(1.0, 4.0, 0.5), ignore_id=3)
    weights, calls = tf.constant([1.0, 0.5]), []

    def counting_sum(values: tf.Tensor) -> tf.Tensor:
        calls.append(values)
        return values

    repeated = [
        each.repeat(16 // each.shape[1], 1).repeat(16 // each.shape[1], 2) for each in heads
    ]
    alone = [float(loss(labels, tf.constant(each), weights, tf.identity)) for each in repeated]
    found = loss(labels, [tf.constant(each) for each in heads], weights, counting_sum)
    assert float(found) == pytest.approx((4 * alone[0] + 2 * alone[1] + alone[2]) / 7, rel=1e-12)
    assert len(calls) == 1  # one exchange between replicas
    main = float(loss(labels, [tf.constant(heads[0])], weights, tf.identity))
    assert main == alone[0]


def test_structural_similarity_is_tensorflows() -> None:
    rng = np.random.default_rng(3)
    first, second = rng.random((2, 2, 15, 20, 3)).astype(np.float32)
    expected = tf.image.ssim(first, second, max_val=1.0).numpy()
    assert structural_similarity(tf.constant(first), tf.constant(second)).numpy() == pytest.approx(
        expected, abs=1e-6
    )


def test_basnet_hybrid_refuses_images_smaller_than_its_window() -> None:
    function = make_loss("basnet_hybrid_loss", num_classes=2)
    with pytest.raises(UsageError, match="at least 11x11 pixels, got 8x20"):
        function(np.zeros((1, 8, 20), int), np.zeros((1, 8, 20, 2)), np.ones(1), tf.identity)


def test_make_loss_names_the_nearest_known_loss() -> None:
    with pytest.raises(UsageError, match="did you mean 'dice_loss'"):
        make_loss("dice_los", num_classes=2)


@pytest.mark.parametrize("weights", [(1.0,), (1.0, -1.0), (0.0, 0.0), (1.0, 1.0, 1.0)])
def test_make_loss_refuses_wrong_class_weights(weights: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match=r"--loss\.class-weights=.*give 2 numbers"):
        make_loss("dice", num_classes=2, class_weights=weights)


def test_make_loss_refuses_a_focal_gamma_below_one() -> None:
    with pytest.raises(UsageError, match=r"focal_gamma=0\.5"):
        make_loss("focal", num_classes=2, focal_gamma=0.5)
