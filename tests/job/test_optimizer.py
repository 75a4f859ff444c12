"""Adam and AdamW: equal to Keras' optimizers, with state that can be saved."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from flexunet.errors import ContentError
from job.config import OptimizerConfig
from job.optimization.optimizer import Adam, SlowWeights


def run(
    config: OptimizerConfig, gradients: list[list[np.ndarray]], slow: SlowWeights | None = None
) -> list[np.ndarray]:
    """Returns the weights after one update per entry of `gradients`, starting at ones."""
    weights = [keras.Variable(np.ones(g.shape, np.float32)) for g in gradients[0]]
    optimizer = Adam(config, weights, slow=slow)
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


def test_slow_weights_stay_the_same_at_first_and_then_change_less(
    gradients: list[list[np.ndarray]],
) -> None:
    config = OptimizerConfig(name="adamw", learning_rate=0.01, weight_decay=0.1)
    plain = run(config, gradients)
    assert [
        each.tolist() for each in run(config, gradients, SlowWeights((False, True), 0, 1.0))
    ] == [each.tolist() for each in plain]
    frozen = run(config, gradients[:4], SlowWeights((False, True), 4, 0.5))
    assert np.array_equal(frozen[1], np.ones(5))
    assert np.array_equal(frozen[0], run(config, gradients[:4])[0])
    # The fifth update has the moments of all gradients, and half the rate.
    slow = run(config, gradients[:5], SlowWeights((False, True), 4, 0.5))[1]
    both = [run(config, gradients[:number])[1] for number in (4, 5)]
    step = both[1] - both[0] * (1 - 0.01 * 0.1)
    assert np.allclose(slow, (1 - 0.005 * 0.1) + step / 2, rtol=0, atol=1e-6)
