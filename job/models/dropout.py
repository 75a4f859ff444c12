"""Computes dropout as a pure function of (seed, epoch, layer, sample).

The dropout layer of Keras draws from a state that depends on the number of replicas and that
`save_weights` does not save. Here each sample has a key, so that its dropout is the same on any
number of replicas and after a restart. `sample_keys` passes the keys to the layers, because a layer
of a functional model gets only its own input.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import keras
import tensorflow as tf

# (layer, shape of one sample) -> the values that the layer keeps, (B, *shape) bool.
Draw = Callable[["SampleDropout", tuple[int, ...]], tf.Tensor]

_draw: ContextVar[Draw | None] = ContextVar("draw", default=None)


@contextmanager
def sample_keys(keys: tf.Tensor) -> Iterator[None]:
    """Passes `keys`, (B,) int64, to the dropout layers called inside the block."""
    with _drawn_by(lambda layer, shape: _drawn(layer, shape, keys)):
        yield


@contextmanager
def kept_values(kept: Mapping[str, tf.Tensor]) -> Iterator[None]:
    """Passes the result of `draw_kept` to the dropout layers called inside the block."""
    with _drawn_by(lambda layer, shape: kept[layer.name]):
        yield


def draw_kept(model: keras.Model, keys: tf.Tensor) -> dict[str, tf.Tensor]:
    """Returns the values that the dropout layers of `model` keep, (B, ...) bool by layer name.

    For code compiled by XLA, whose generator gives other numbers for the same seeds.

    Args:
        keys: (B,) int64, as for `sample_keys`.
    """
    layers = [layer for layer in model.layers if isinstance(layer, SampleDropout) and layer.rate]
    return {layer.name: _drawn(layer, layer.output.shape[1:], keys) for layer in layers}


@contextmanager
def _drawn_by(draw: Draw) -> Iterator[None]:
    token = _draw.set(draw)
    try:
        yield
    finally:
        _draw.reset(token)


def _drawn(layer: "SampleDropout", shape: tuple[int, ...], keys: tf.Tensor) -> tf.Tensor:
    # One draw per sample: the batch is small and its size static. A single draw for the batch would
    # make the values of a sample depend on its position.
    index = tf.constant(layer.index, tf.int64)
    return tf.stack(
        [
            tf.random.stateless_uniform(shape, seed=tf.stack([key, index])) >= layer.rate
            for key in tf.unstack(keys)
        ]
    )


@keras.saving.register_keras_serializable("flexunet")
class SampleDropout(keras.layers.Layer):
    """Sets a fraction `rate` of each sample's values to 0 and scales the rest by 1/(1-rate)."""

    def __init__(self, rate: float, index: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rate = rate
        self.index = index  # unique per layer; part of the random seed
        self.supports_masking = True

    def get_config(self) -> dict[str, Any]:
        """Returns what the layer is made of, for a model that is saved as a whole."""
        return {**super().get_config(), "rate": self.rate, "index": self.index}

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Returns `inputs` (B, H, W, C) with dropout in training, unchanged otherwise.

        Raises:
            RuntimeError: training outside `sample_keys`.
        """
        if not training or self.rate == 0.0:
            return inputs
        draw = _draw.get()
        if draw is None:
            raise RuntimeError(f"{self.name} was called in training outside of `sample_keys`")
        keep = draw(self, tuple(inputs.shape[1:]))
        scale = tf.cast(1.0 / (1.0 - self.rate), inputs.dtype)
        return tf.where(keep, inputs * scale, tf.zeros_like(inputs))
