"""The exponential average of weights: its formula, its exchange with the weights, its files."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from job.config import OptimizerConfig
from job.optimization.averaging import WeightAverage
from job.optimization.loss_scale import LossScale
from job.optimization.optimizer import Adam
from job.runs import serialization

MOMENTUM = 0.7


class Averaged:
    """A model with weights, statistics and a counter, trained by gradients of a test."""

    def __init__(self, strategy: Any, *, has_scale: bool = False) -> None:
        self.strategy = strategy
        with strategy.scope():
            inputs = keras.Input((3,))
            outputs = keras.layers.Dropout(0.5)(keras.layers.BatchNormalization()(inputs))
            self.model = keras.Model(inputs, keras.layers.Dense(2)(outputs))
            random = np.random.default_rng(7)
            for variable in self.model.trainable_variables:
                variable.assign(random.normal(size=variable.shape))
            self.average = WeightAverage(MOMENTUM, self.model.variables)
            scale = LossScale() if has_scale else None
            self.adam = Adam(
                OptimizerConfig(learning_rate=0.1),
                self.model.trainable_variables,
                scale,
                self.average,
            )
        self.step = tf.function(self._step, autograph=False)

    def _step(self, seed: tf.Tensor, step: tf.Tensor) -> None:
        def update(gradients: list[tf.Tensor]) -> None:
            self.adam.apply(gradients, step=step, learning_rate=tf.constant(0.1, tf.float64))

        def run() -> None:
            for variable in self.model.non_trainable_variables:
                if variable.dtype == "float32":
                    variable.assign(variable + 1.0)
            gradients = [tf.fill(each.shape, seed) for each in self.model.trainable_variables]
            if self.adam.loss_scale is None:
                update(gradients)
            else:
                self.adam.loss_scale.apply(gradients, update)

        self.strategy.run(run)

    def train(self, values: list[float]) -> None:
        """Does a step with each of `values` as the gradient of all weights."""
        for number, value in enumerate(values):
            self.step(tf.constant(value, tf.float32), tf.constant(number, tf.int64))

    def weights(self) -> list[np.ndarray]:
        """Returns copies of the floating-point weights."""
        floating = [each for each in self.model.variables if each.dtype.startswith("float")]
        return [np.array(each.numpy()) for each in floating]

    def averages(self) -> list[np.ndarray]:
        """Returns copies of their averages."""
        return [np.array(each.numpy()) for each in self.average.variables]


def assert_equal(first: list[np.ndarray], second: list[np.ndarray]) -> None:
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a, b)


@pytest.fixture(scope="module")
def one_cpu() -> Any:
    return tf.distribute.OneDeviceStrategy("CPU:0")


def test_the_average_follows_its_formula_and_leaves_integers_out(one_cpu: Any) -> None:
    trained = Averaged(one_cpu)
    assert len(trained.average.variables) == len(trained.model.variables) - 1  # the counter
    expected = trained.weights()
    assert_equal(trained.averages(), expected)
    for step in range(12):
        trained.step(tf.constant(float(step % 3) - 1.0), tf.constant(step, tf.int64))
        momentum = min(MOMENTUM, (1 + step) / (10 + step))
        pairs = zip(expected, trained.weights(), strict=True)
        expected = [momentum * old + (1 - momentum) * new for old, new in pairs]
    for a, b in zip(trained.averages(), expected, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    assert not np.allclose(trained.averages()[0], trained.weights()[0])


def test_replicas_average_alike_and_exchange_gives_every_bit_back(two_cpus: Any) -> None:
    trained = Averaged(two_cpus)
    trained.train([1.0, -2.0, 0.5])
    for variable in trained.average.variables:
        first, second = (each.numpy() for each in variable.values)
        assert np.array_equal(first, second)
    raw, averages = trained.weights(), trained.averages()
    with pytest.raises(KeyError), trained.average.in_use():
        assert_equal(trained.weights(), averages)
        assert_equal(trained.averages(), raw)
        raise KeyError
    assert_equal(trained.weights(), raw)
    assert_equal(trained.averages(), averages)
    # A later update of the weights does not reach into the average, whose array they had.
    trained.train([1.0])
    with trained.average.in_use():
        pass
    assert not np.array_equal(trained.weights()[0], trained.averages()[0])


def test_a_step_that_float16_skips_does_not_average(one_cpu: Any) -> None:
    trained = Averaged(one_cpu, has_scale=True)
    trained.train([1.0, 2.0])
    before = trained.averages()
    trained.train([float("inf")])
    assert_equal(trained.averages(), before)
    trained.train([1.0])
    assert not np.array_equal(trained.averages()[0], before[0])


def test_a_checkpoint_has_both_and_predicts_with_the_average(one_cpu: Any, tmp_path: Path) -> None:
    trained = Averaged(one_cpu)
    trained.train([1.0, 2.0])
    members = serialization.take(str(tmp_path), trained.model, trained.adam, {})()
    assert list(members) == [
        *("model.weights.h5", "raw.weights.h5", "optimizer.npz", "state.json"),
    ]
    raw, averages = trained.weights(), trained.averages()
    again = Averaged(one_cpu)
    serialization.read_weights(again.model, members["model.weights.h5"])
    assert_equal(again.weights(), averages)
    serialization.read_trained_weights(again.model, again.adam, members)
    assert_equal(again.weights(), raw)
    assert_equal(again.averages(), averages)
    plain = Adam(OptimizerConfig(), again.model.trainable_variables)
    (tmp_path / "plain").mkdir()
    files = serialization.take(str(tmp_path / "plain"), again.model, plain, {})()
    assert list(files) == ["model.weights.h5", "optimizer.npz", "state.json"]
