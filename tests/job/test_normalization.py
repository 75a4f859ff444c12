"""Normalisation: exact over large images, blind to padding, and at home in older files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import job.models.blocks
from job.config import ModelConfig, OptimizerConfig
from job.distributed.replica_sums import Criterion
from job.evaluation.steps import make_evaluation_step
from job.losses import make_loss
from job.models.ensemble import network_of
from job.models.normalization import (
    BatchNormalization,
    FixedBatchNormalization,
    GroupNormalization,
    counted_samples,
)
from job.models.registry import build_model
from job.optimization.optimizer import Adam
from job.runs.serialization import read_weights
from job.training.step import make_train_step

# What is normalised together, of values (B, H, W, groups, channels of a group).
LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "group": (lambda: GroupNormalization(2), (1, 2, 4)),
    "instance": (lambda: GroupNormalization(4), (1, 2)),
    "batch": (lambda: BatchNormalization(synchronized=True), (0, 1, 2)),
}


def activations(shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns values as after a ReLU, and a gradient that has to do with them; float32."""
    random = np.random.default_rng(seed)
    values = np.maximum(random.normal(0.5, 1 + np.arange(shape[-1]) / 4, shape), 0)
    gradient = random.normal(0.1, 1, shape) + 0.1 * values
    return values.astype(np.float32), gradient.astype(np.float32)


def expected(
    values: np.ndarray, gradient: np.ndarray, gamma: np.ndarray, axes: tuple[int, ...]
) -> list[np.ndarray]:
    """Returns outputs without beta, and the gradients of inputs, gamma and beta, in float64."""
    shape = (*values.shape[:3], 2, values.shape[3] // 2)
    x, g = (each.astype(np.float64).reshape(shape) for each in (values, gradient))
    gamma = gamma.astype(np.float64).reshape(shape[3:])
    centred = x - x.mean(axes, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axes, keepdims=True) + 1e-3)
    inverse = 1 / np.sqrt((centred**2).mean(axes, keepdims=True) + 1e-3)
    by_scaled = gamma * g
    along = (by_scaled * scaled).mean(axes, keepdims=True)
    inputs = inverse * (by_scaled - by_scaled.mean(axes, keepdims=True) - scaled * along)
    found = [gamma * scaled, inputs, (g * scaled).sum((0, 1, 2)), g.sum((0, 1, 2))]
    return [each.reshape(values.shape if each.ndim == 5 else -1) for each in found]


def relative_error(found: Any, exact: np.ndarray) -> float:
    return float(np.abs(np.asarray(found, np.float64) - exact).max() / np.abs(exact).max())


@pytest.mark.parametrize(("batch", "side"), [(1, 1024), (2, 512)])
@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients_are_those_of_float64(name: str, batch: int, side: int) -> None:
    values, gradient = activations((batch, side, side, 4))
    make, axes = LAYERS[name]
    layer = make()
    layer.build(values.shape)
    gamma = np.array([0.8, 1.1, 0.9, 1.3], np.float32)
    layer.gamma.assign(gamma)

    def run(inputs: tf.Tensor, output_gradient: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = layer(inputs, training=True) if name == "batch" else layer(inputs)
        weights = [layer.gamma.value, layer.beta.value]
        return [outputs, *tape.gradient(outputs, [inputs, *weights], output_gradient)]

    right = expected(values, gradient, gamma, axes)
    for is_compiled in (False, True):
        # XLA keeps no collective, so batch normalisation is called outside of a strategy.
        function = tf.function(run, jit_compile=is_compiled, autograph=False)
        found = function(tf.constant(values), tf.constant(gradient))
        for each, exact in zip(found, right, strict=True):
            assert relative_error(each, exact) < 1e-5, is_compiled


def test_fixed_statistics_give_values_and_gradients_of_float64_and_never_change() -> None:
    values, gradient = activations((1, 512, 512, 4))
    layer = FixedBatchNormalization()
    layer.build(values.shape)
    gamma, beta, mean, variance = (np.array(each, np.float32) for each in (
        [0.8, 1.1, 0.9, 1.3], [0.1, -0.2, 0, 3], [0.5, 0.9, 1.5, 2], [0.3, 1, 2, 4],
    ))  # fmt: skip
    layer.set_weights([gamma, beta, mean, variance])
    with tf.GradientTape() as tape:
        inputs = tf.constant(values)
        tape.watch(inputs)
        outputs = layer(inputs, training=True)
    found = tape.gradient(outputs, [inputs, layer.gamma.value, layer.beta.value], gradient)
    x, g, wide = values.astype(np.float64), gradient.astype(np.float64), gamma.astype(np.float64)
    scaled = (x - mean) / np.sqrt(variance.astype(np.float64) + 1e-3)
    sums = [(g * scaled).sum((0, 1, 2)), g.sum((0, 1, 2))]
    inverse = wide / np.sqrt(variance.astype(np.float64) + 1e-3)
    exact = [wide * scaled + beta, g * inverse, *sums]
    for each, right in zip([outputs, *found], exact, strict=True):
        assert relative_error(each, right) < 1e-5
    assert np.array_equal(layer.get_weights()[2], mean)
    assert np.array_equal(layer(values), outputs)


def test_the_gradients_of_16_bits_are_computed_in_32() -> None:
    values, gradient = activations((2, 32, 32, 4))
    values, gradient = (
        np.asarray(tf.cast(tf.cast(each, tf.bfloat16), tf.float32)) for each in (values, gradient)
    )
    layer = GroupNormalization(2, dtype="mixed_bfloat16")
    inputs = tf.cast(values, tf.bfloat16)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = layer(inputs)
    weights = [inputs, layer.gamma.value, layer.beta.value]
    found = tape.gradient(outputs, weights, tf.cast(gradient, tf.bfloat16))
    exact = expected(values, gradient, np.ones(4, np.float32), (1, 2, 4))
    assert outputs.dtype == found[0].dtype == tf.bfloat16
    for each, right in zip([outputs, found[0]], exact[:2], strict=True):
        rounded = np.asarray(tf.cast(tf.cast(right, tf.bfloat16), tf.float64))
        # Half a unit in the last place, where float32 falls on the other side of the middle.
        assert np.mean(np.asarray(tf.cast(each, tf.float64)) != rounded) < 1e-3
    for each, right in zip(found[1:], exact[2:], strict=True):
        assert relative_error(each, right) < 1e-5


def test_a_variance_beside_a_large_mean_is_exact() -> None:
    values = np.random.default_rng(0).normal(1000, 1, (2, 64, 64, 4)).astype(np.float32)
    layer = BatchNormalization(synchronized=True, momentum=0.0)
    layer(values, training=True)
    exact = values.astype(np.float64).var(axis=(0, 1, 2))
    assert relative_error(layer.moving_variance.value, exact) < 1e-5


@pytest.mark.parametrize(
    ("precision", "max_difference", "max_share"),
    [("float32", 1e-5, 1e-5), ("mixed_bfloat16", 5e-3, 5e-4)],  # Keras: 2e-3, 8e-5; 2e-2, 1e-3
)
def test_an_image_alone_is_segmented_as_in_a_batch(
    precision: str, max_difference: float, max_share: float
) -> None:
    config = ModelConfig(
        num_layers=2, base_filters=8, base_kernels=(3, 3), dropout_rate=0, normalization="group"
    )
    model = build_model(
        config, image_shape=(512, 512, 1), num_classes=2, seed=3, precision=precision
    )
    images = np.random.default_rng(0).integers(0, 256, (2, 512, 512, 1)).astype(np.float32)
    logits = model(images, training=False)[:1], model(images[:1], training=False)
    together, alone = (tf.nn.softmax(each).numpy() for each in logits)
    assert np.abs(together - alone).max() <= max_difference
    assert np.mean(together.argmax(-1) != alone.argmax(-1)) <= max_share


SIDE = 16
BATCH_NORM = ModelConfig(
    num_layers=2, base_filters=4, base_kernels=(3, 3), normalization="batch", dropout_rate=0.1
)


# Places of two samples in a batch of four, of which the others are padding.
FIRST, APART = (0, 1), (0, 2)


def two_samples(filler: int | None, places: tuple[int, int] = FIRST) -> dict[str, np.ndarray]:
    """Returns a batch of two samples; of four with padding that is all `filler`, if any."""
    images = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 1), dtype=np.uint8)
    masks = (images[..., 0] > 150).astype(np.uint8)
    samples = {
        "image": images,
        "mask": masks,
        "weight": np.ones(2, np.float32),
        "key": np.array([3, 4], np.int64),
    }
    if filler is None:
        return samples
    padding = {"image": filler, "mask": 1, "weight": 0, "key": 5}
    batch = {}
    for name, values in samples.items():
        batch[name] = np.full((4, *values.shape[1:]), padding[name], values.dtype)
        batch[name][list(places)] = values
    return batch


class Network:
    """A small network, whose steps are compiled once for all batches of one shape."""

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy
        with strategy.scope():
            self.model = build_model(
                BATCH_NORM, image_shape=(SIDE, SIDE, 1), num_classes=2, seed=5, precision="float64"
            )
            self.adam = Adam(OptimizerConfig(learning_rate=1e-2), self.model.trainable_variables)
        criterion = Criterion(make_loss("ce_dice", num_classes=2), {})
        self.step = make_train_step(strategy, self.model, self.adam, criterion)
        network = network_of([self.model])
        self.evaluation = make_evaluation_step(strategy, network, criterion, 2, None)
        self.variables = [*self.adam.named_variables().values(), *self.model.weights]
        self.untrained = [np.array(each.numpy()) for each in self.variables]

    def trained_and_evaluated(self, batch: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Trains two steps from the start.

        Returns:
            Losses with that of an evaluation, moments of the optimizer, and weights.
        """
        for variable, value in zip(self.variables, self.untrained, strict=True):
            variable.assign(value)
        size = len(batch["weight"]) // self.strategy.num_replicas_in_sync

        def part(context: Any) -> dict[str, tf.Tensor]:
            start = context.replica_id_in_sync_group * size
            return {name: tf.constant(each[start : start + size]) for name, each in batch.items()}

        given = self.strategy.experimental_distribute_values_from_function(part)
        rate = tf.constant(1e-2, tf.float64)
        sums = [self.step(given, tf.constant(i, tf.int64), rate)["loss"] for i in range(2)]
        sums.append(self.evaluation(given)[0]["loss"])
        return [np.array(sums), *(variable.numpy() for variable in self.variables)]


@pytest.fixture(scope="module")
def unpadded() -> list[np.ndarray]:
    network = Network(tf.distribute.OneDeviceStrategy("CPU:0"))
    return network.trained_and_evaluated(two_samples(None))


def test_padding_counts_nowhere(unpadded: list[np.ndarray]) -> None:
    network = Network(tf.distribute.OneDeviceStrategy("CPU:0"))
    for filler in (0, 255):
        padded = network.trained_and_evaluated(two_samples(filler))
        for with_padding, without in zip(padded, unpadded, strict=True):
            np.testing.assert_allclose(with_padding, without, rtol=1e-9, atol=1e-9)


def test_replicas_normalise_by_the_samples_of_both_without_padding(
    two_cpus: Any, unpadded: list[np.ndarray]
) -> None:
    network = Network(two_cpus)
    for places in (FIRST, APART):  # the second replica has padding alone, or a sample, too
        padded = network.trained_and_evaluated(two_samples(255, places))
        for with_padding, without in zip(padded, unpadded, strict=True):
            np.testing.assert_allclose(with_padding, without, rtol=1e-9, atol=1e-9)


def test_a_sample_of_weight_0_is_normalised_by_the_others() -> None:
    values, _ = activations((3, 8, 8, 4))
    layer, other = (BatchNormalization(momentum=0.5) for _ in range(2))
    with counted_samples(tf.constant([1.0, 0.0, 1.0])):
        found = layer(values, training=True)
    assert np.allclose(found[::2], other(values[::2], training=True), atol=1e-6)
    for ours, right in zip(layer.weights, other.weights, strict=True):
        assert np.allclose(ours, right, atol=1e-6)


def test_all_samples_count_where_no_weights_are_given() -> None:
    values, _ = activations((3, 8, 8, 4))
    ours, theirs = (
        module.BatchNormalization(momentum=0.9)
        for module in (job.models.normalization, keras.layers)
    )
    assert np.allclose(ours(values, training=True), theirs(values, training=True), atol=1e-5)
    for weight, right in zip(ours.weights, theirs.weights, strict=True):
        assert weight.name == right.name
        assert np.allclose(weight, right, atol=1e-6)  # the variance, too, is that of Keras
    assert np.allclose(ours(values), theirs(values), atol=1e-5)


def test_replicas_that_are_not_synchronised_see_their_own_samples(two_cpus: Any) -> None:
    values, _ = activations((2, 8, 8, 4))
    with two_cpus.scope():
        layer = BatchNormalization()
        layer.build(values.shape)

    def run() -> tf.Tensor:
        own = tf.distribute.get_replica_context().replica_id_in_sync_group
        return layer(tf.gather(values, [own]), training=True)

    found = two_cpus.experimental_local_results(two_cpus.run(tf.function(run)))
    for each, right in zip(found, values, strict=True):
        assert np.allclose(each, BatchNormalization()(right[np.newaxis], training=True), atol=1e-6)


@pytest.mark.parametrize("normalization", ["group", "batch"])
def test_weights_that_keras_layers_wrote_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, normalization: str
) -> None:
    def model() -> keras.Model:
        config = BATCH_NORM.model_copy(update={"normalization": normalization})
        return build_model(config, image_shape=(8, 8, 1), num_classes=2)

    with monkeypatch.context() as patch:
        for name in ("GroupNormalization", "BatchNormalization"):
            patch.setattr(job.models.blocks, name, getattr(keras.layers, name))
        written = model()
    random = np.random.default_rng(0)
    for weight in written.weights:
        weight.assign(random.uniform(0.5, 1.5, weight.shape))
    path = str(tmp_path / "model.weights.h5")
    written.save_weights(path)
    ours = model()
    kinds = [[each.name.rstrip("_0123456789") for each in m.layers] for m in (ours, written)]
    assert kinds[0] == kinds[1]
    read_weights(ours, path)
    for weight, right in zip(ours.weights, written.weights, strict=True):
        assert weight.name == right.name
        assert np.array_equal(weight, right)
    images = random.uniform(0, 255, (2, 8, 8, 1)).astype(np.float32)
    assert relative_error(ours(images), np.asarray(written(images), np.float64)) < 1e-5


@pytest.mark.parametrize(
    "layer",
    [
        GroupNormalization(4, epsilon=1e-5, center=False),
        BatchNormalization(momentum=0.9, epsilon=1e-5, scale=False, synchronized=True),
    ],
    ids=["group", "batch"],
)
def test_options_are_those_of_keras(layer: keras.layers.Layer) -> None:
    config = layer.get_config()
    again = type(layer).from_config(config)
    theirs = getattr(keras.layers, type(layer).__name__).from_config(config)
    assert again.get_config() == theirs.get_config() == config
    values, _ = activations((2, 8, 8, 8))
    assert np.allclose(again(values), theirs(values), atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (GroupNormalization(2, axis=1), (None, 4, 8, 8), "axis=1 of inputs"),
        (BatchNormalization(), (None, 4), "only the channels of"),
        (BatchNormalization(renorm=True), (None, 8, 8, 4), "renorm=True is not supported"),
    ],
)
def test_what_is_not_computed_is_refused(
    layer: keras.layers.Layer, shape: tuple[int | None, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        layer.build(shape)
