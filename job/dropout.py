"""Dropout as a pure function of (seed, epoch, layer, sample).

Keras' own layer draws from a state that depends on the number of replicas and is lost by
`save_weights`. Here each sample brings a key, so that a sample is treated alike on any number of
replicas and after a restart. The keys reach the layers through `sample_keys`, because a layer of a
functional model sees only its own input.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import keras
import tensorflow as tf

_keys: ContextVar[tf.Tensor | None] = ContextVar("sample_keys", default=None)


@contextmanager
def sample_keys(keys: tf.Tensor) -> Iterator[None]:
    """Gives `keys`, (B,) int64, to the dropout layers that are called inside the block."""
    token = _keys.set(keys)
    try:
        yield
    finally:
        _keys.reset(token)


class SampleDropout(keras.layers.Layer):
    """Sets a fraction `rate` of each sample's values to 0 and scales the rest by 1/(1-rate)."""

    def __init__(self, rate: float, index: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rate = rate
        self.index = index  # tells layers apart; part of the random seed
        self.supports_masking = True

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Returns `inputs` (B, H, W, C) with dropout in training, unchanged otherwise.

        Raises:
            RuntimeError: training outside `sample_keys`.
        """
        if not training or self.rate == 0.0:
            return inputs
        keys = _keys.get()
        if keys is None:
            raise RuntimeError(f"{self.name} is trained outside of `sample_keys`")
        # One draw per sample: the batch is small and its size static, and a draw that covered
        # the batch would tie a sample's values to its place in it.
        keep = tf.stack(
            [
                tf.random.stateless_uniform(
                    inputs.shape[1:], seed=tf.stack([key, tf.cast(self.index, tf.int64)])
                )
                >= self.rate
                for key in tf.unstack(keys)
            ]
        )
        scale = tf.cast(1.0 / (1.0 - self.rate), inputs.dtype)
        return tf.where(keep, inputs * scale, tf.zeros_like(inputs))
