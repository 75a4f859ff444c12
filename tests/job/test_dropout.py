"""Dropout depends on the sample's key and the layer, and on nothing else."""

from math import prod

import keras
import numpy as np
import pytest
import tensorflow as tf

from job.models.dropout import SampleDropout, draw_kept, dropout, kept_values
from tests.job.gpu_kernels import missing_kernels

STREAMS = pytest.mark.parametrize("version", [2, 3])
SHAPE = (8, 8, 5)  # values: no multiple of those that one hash or one row of hashes gives


def network(*rates: float) -> keras.Model:
    """Returns a network of dropout layers, one after the other."""
    inputs = keras.Input(SHAPE)
    outputs = inputs
    for index, rate in enumerate(rates):
        outputs = SampleDropout(rate, index, name=f"dropout_{index}")(outputs)
    return keras.Model(inputs, outputs)


def kept(keys: list[int], version: int, *, index: int = 0, rate: float = 0.25) -> np.ndarray:
    """Returns what the layer of this index keeps, (B, *SHAPE) bool."""
    layers = network(*[rate] * (index + 1)).layers
    drawn = draw_kept(layers, tf.constant(keys, tf.int64), version)
    found: np.ndarray = drawn[f"dropout_{index}"].numpy()
    return found


@STREAMS
def test_a_sample_is_dropped_alike_in_any_batch(version: int) -> None:
    alone, among = kept([7], version), kept([3, 7, 5], version)
    assert np.array_equal(alone[0], among[1])
    assert not np.array_equal(among[0], among[1])


@STREAMS
def test_layers_and_keys_draw_differently(version: int) -> None:
    assert not np.array_equal(kept([7], version), kept([7], version, index=1))
    # Keys beyond 32 bits count in full.
    assert not np.array_equal(kept([7], version), kept([7 + 2**40], version))


@STREAMS
def test_a_layer_draws_the_same_beside_other_layers(version: int) -> None:
    first, second = network(0.25, 0.5).layers[1:]
    together = draw_kept([first, second], tf.constant([7, -3], tf.int64), version)
    for layer in (first, second):
        (alone,) = draw_kept([layer], tf.constant([7, -3], tf.int64), version).values()
        assert np.array_equal(alone, together[layer.name])


def test_version_3_is_split_mix_64() -> None:
    mask = 2**64 - 1

    def word(state: int) -> int:
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            state = (state ^ (state >> shift)) * factor & mask
        return state ^ (state >> 31)

    key, index = -(2**61) + 12345, 3
    first = index * 2**32 * 256 + 1
    words = [word((key + 0x9E3779B97F4A7C15 * (first + i)) & mask) for i in range(prod(SHAPE) // 4)]
    parts = [(each >> 16 * lane) & 0xFFFF for each in words for lane in range(4)]
    expected = np.array(parts).reshape(SHAPE) >= round(0.04 * 2**16)
    assert np.array_equal(kept([key], 3, index=index, rate=0.04)[0], expected)


def test_version_3_keeps_values_independently() -> None:
    keys = np.random.default_rng(0).integers(-(2**63), 2**63, 400).tolist()
    drawn = draw_kept(network(0.1, 0.28).layers, tf.constant(keys, tf.int64), 3)
    rates = np.repeat([0.1, 0.28], prod(SHAPE))
    dropped = ~np.concatenate([each.numpy().reshape(400, -1) for each in drawn.values()], axis=1)
    # With mean 0 and variance 1, (samples, places of both layers); 128,000 draws of each layer.
    scores = (dropped - rates) / np.sqrt(rates * (1 - rates))
    assert np.abs(scores.reshape(400, 2, -1).mean(axis=(0, 2))).max() < 5 / np.sqrt(128_000)
    # Products of pairs of samples, and of pairs of places.
    for values in (scores, scores.T):
        products = values @ values.T / np.sqrt(values.shape[1])
        others = products[np.triu_indices(len(values), 1)]
        assert np.std(others) == pytest.approx(1, abs=0.02)
        assert np.abs(others).max() < 7


@STREAMS
def test_the_rest_is_scaled_to_keep_the_mean(version: int) -> None:
    model, keys = network(0.25), tf.range(50, dtype=tf.int64)
    with dropout(model.layers, keys, version):
        values = model(tf.ones((50, *SHAPE)), training=True).numpy()
    assert set(np.unique(values)) == {np.float32(0), np.float32(1 / 0.75)}
    # 16,000 draws: the share of zeros has a standard deviation of 0.0034.
    assert np.mean(values == 0) == pytest.approx(0.25, abs=0.02)


def test_inference_passes_values_on() -> None:
    values = tf.ones((1, 2, 2, 1))
    assert np.array_equal(SampleDropout(0.5, 0)(values).numpy(), values.numpy())


def test_training_without_keys_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="outside of `dropout`"):
        SampleDropout(0.5, 0)(tf.ones((1, 2, 2, 1)), training=True)


@STREAMS
def test_what_is_drawn_before_is_what_the_layers_draw(version: int) -> None:
    model = network(0.5, 0.25)
    values, keys = tf.ones((3, *SHAPE)), tf.constant([7, 3, 2**40], tf.int64)
    with dropout(model.layers, keys, version):
        drawn_inside = model(values, training=True)
    with kept_values(draw_kept(model.layers, keys, version)):
        assert np.array_equal(model(values, training=True), drawn_inside)


def test_version_3_has_one_draw_for_all_samples_and_layers() -> None:
    layers = network(0.1, 0.2, 0.3).layers

    @tf.function(autograph=False)
    def draw(keys: tf.Tensor) -> dict[str, tf.Tensor]:
        return draw_kept(layers, keys, 3)

    def operations(num_samples: int) -> list[str]:
        function = draw.get_concrete_function(tf.TensorSpec((num_samples,), tf.int64))
        assert missing_kernels(function) == set()
        return sorted(op.type for op in function.graph.get_operations())

    assert operations(2) == operations(64)
    assert operations(64).count("Mul") == 2
    assert not any("Random" in name for name in operations(64))
