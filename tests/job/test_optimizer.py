"""Adam and AdamW: equal to Keras' optimizers, with state that can be saved."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from flexunet.errors import ContentError
from job.config import OptimizerConfig
from job.optimization.optimizer import Adam


def run(config: OptimizerConfig, gradients: list[list[np.ndarray]]) -> list[np.ndarray]:
    """Returns the weights after one update per entry of `gradients`, starting at ones."""
    weights = [keras.Variable(np.ones(g.shape, np.float32)) for g in gradients[0]]
    optimizer = Adam(config, weights)
    for step, values in enumerate(gradients):
        optimizer.apply(
            [tf.constant(v, tf.float32) for v in values],
            step=tf.constant(step, tf.int64),
            learning_rate=tf.constant(config.learning_rate, tf.float64),
        )
    return [weight.numpy() for weight in weights]


@pytest.fixture
def gradients() -> list[list[np.ndarray]]:
    random = np.random.default_rng(1)
    return [[random.normal(size=shape) for shape in ((3, 4), (5,))] for _ in range(10)]


@pytest.mark.parametrize(
    ("config", "reference"),
    [
        (
            OptimizerConfig(learning_rate=0.01, clipvalue=0.4),
            lambda: keras.optimizers.Adam(0.01, clipvalue=0.4),
        ),
        (
            OptimizerConfig(learning_rate=0.01, clipvalue=None, clipnorm=0.5),
            lambda: keras.optimizers.Adam(0.01, clipnorm=0.5),
        ),
        (
            OptimizerConfig(name="adamw", learning_rate=0.01, weight_decay=0.1, clipvalue=0),
            lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
        ),
    ],
)
def test_update_is_that_of_keras(
    config: OptimizerConfig, reference: Any, gradients: list[list[np.ndarray]]
) -> None:
    theirs = [keras.Variable(np.ones(g.shape, np.float32)) for g in gradients[0]]
    optimizer = reference()
    optimizer.build(theirs)
    for values in gradients:
        optimizer.apply([tf.constant(v, tf.float32) for v in values])
    for mine, their in zip(run(config, gradients), theirs, strict=True):
        assert np.allclose(mine, their.numpy(), rtol=1e-5, atol=1e-7)


def test_saved_moments_continue_bit_by_bit(gradients: list[list[np.ndarray]]) -> None:
    config = OptimizerConfig(learning_rate=0.01)
    whole = run(config, gradients)
    weights = [keras.Variable(np.ones(g.shape, np.float32)) for g in gradients[0]]
    optimizer = Adam(config, weights)
    for step, values in enumerate(gradients):
        if step == 4:
            state = {name: v.numpy().copy() for name, v in optimizer.named_variables().items()}
            optimizer = Adam(config, weights)
            optimizer.load_state(state, source="test")
        optimizer.apply(
            [tf.constant(v, tf.float32) for v in values],
            step=tf.constant(step, tf.int64),
            learning_rate=tf.constant(0.01, tf.float64),
        )
    for a, b in zip(whole, weights, strict=True):
        assert np.array_equal(a, b.numpy())


def test_moments_of_another_model_are_refused() -> None:
    optimizer = Adam(OptimizerConfig(), [keras.Variable(np.ones(3, np.float32))])
    with pytest.raises(ContentError, match="first/0000 is missing"):
        optimizer.load_state({}, source="x")
    moments = {"first/0000": np.zeros(3), "second/0000": np.zeros(4)}
    with pytest.raises(ContentError, match=r"second/0000 is of shape \(4,\)"):
        optimizer.load_state(moments, source="x")
