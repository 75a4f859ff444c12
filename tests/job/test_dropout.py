"""Dropout depends on the sample's key and the layer, and on nothing else."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from job.models.dropout import SampleDropout, draw_kept, kept_values, sample_keys


def dropped(keys: list[int], *, index: int = 0, rate: float = 0.25) -> np.ndarray:
    layer = SampleDropout(rate, index)
    with sample_keys(tf.constant(keys, tf.int64)):
        result: np.ndarray = layer(tf.ones((len(keys), 8, 8, 4)), training=True).numpy()
    return result


def test_a_sample_is_dropped_alike_in_any_batch() -> None:
    alone, among = dropped([7]), dropped([3, 7, 5])
    assert np.array_equal(alone[0], among[1])
    assert not np.array_equal(among[0], among[1])


def test_layers_and_keys_draw_differently() -> None:
    assert not np.array_equal(dropped([7], index=0), dropped([7], index=1))
    # Keys beyond 32 bits count in full.
    assert not np.array_equal(dropped([7]), dropped([7 + 2**40]))


def test_the_rest_is_scaled_to_keep_the_mean() -> None:
    values = dropped(list(range(50)), rate=0.25)
    assert set(np.unique(values)) == {np.float32(0), np.float32(1 / 0.75)}
    # 12,800 draws: the share of zeros has a standard deviation of 0.0038.
    assert np.mean(values == 0) == pytest.approx(0.25, abs=0.02)


def test_inference_passes_values_on() -> None:
    values = tf.ones((1, 2, 2, 1))
    assert np.array_equal(SampleDropout(0.5, 0)(values).numpy(), values.numpy())


def test_training_without_keys_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="outside of `sample_keys`"):
        SampleDropout(0.5, 0)(tf.ones((1, 2, 2, 1)), training=True)


def test_what_is_drawn_before_is_what_the_layers_draw() -> None:
    inputs = keras.Input((8, 8, 4))
    model = keras.Model(inputs, SampleDropout(0.25, 0)(SampleDropout(0.5, 1)(inputs)))
    values, keys = tf.ones((3, 8, 8, 4)), tf.constant([7, 3, 2**40], tf.int64)
    with sample_keys(keys):
        drawn_inside = model(values, training=True)
    with kept_values(draw_kept(model, keys)):
        assert np.array_equal(model(values, training=True), drawn_inside)
