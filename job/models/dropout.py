"""Computes dropout as a pure function of (seed, epoch, layer, sample, copy).

The dropout layer of Keras draws from a state that depends on the number of replicas and that
`save_weights` does not save. Here each sample has a key, so that its dropout is the same on any
number of replicas and after a restart. The layers get what they keep from a context, because a
layer of a functional model gets only its own input.

Since version 3 of the random streams, `draw_kept` draws for all layers and samples at once: each
value of a layer is a part of a hash of the key of its sample and of a counter, and each layer has
its own counters. Before, a layer drew for each sample with an operation of its own (`sample_keys`).
Source of the hash: SplitMix64, Steele et al., OOPSLA 2014.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from math import prod
from typing import Any

import keras
import numpy as np
import tensorflow as tf

# (layer, shape of one sample) -> the values that the layer keeps, (B, *shape) bool.
Draw = Callable[["SampleDropout", tuple[int, ...]], tf.Tensor]

_draw: ContextVar[Draw | None] = ContextVar("draw", default=None)


_STEP = 0x9E3779B97F4A7C15  # of the counter: odd, so that it takes every value of 64 bits
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))  # shift, then multiply
_LAST_SHIFT = 31
_LEVELS = 2**16  # a value is 16 bits of the hash
_PER_WORD = 4  # values in 64 bits
_ROW = 256  # words: a layer has whole rows of them, so that one addition makes all counters


def dropout(
    layers: Iterable[Any], keys: tf.Tensor, random_streams: int
) -> AbstractContextManager[None]:
    """Returns a context in which the dropout layers draw for samples with `keys`.

    Args:
        layers: of the model.
        keys: (B,) int64, a random number for each sample.
        random_streams: version of the random streams, 1 to 3.
    """
    if random_streams < 3:
        return sample_keys(keys)
    return kept_values(draw_kept(layers, keys, random_streams))


@contextmanager
def sample_keys(keys: tf.Tensor) -> Iterator[None]:
    """Passes `keys`, (B,) int64, to the dropout layers called inside the block; until version 2."""
    with _drawn_by(lambda layer, shape: _drawn(layer, shape, keys)):
        yield


@contextmanager
def kept_values(kept: Mapping[str, tf.Tensor]) -> Iterator[None]:
    """Passes the result of `draw_kept` to the dropout layers called inside the block."""
    with _drawn_by(lambda layer, shape: kept[layer.name]):
        yield


def draw_kept(layers: Iterable[Any], keys: tf.Tensor, random_streams: int) -> dict[str, tf.Tensor]:
    """Returns the values that the dropout layers keep, (B, ...) bool by layer name.

    Args:
        layers: of the model.
        keys: (B,) int64, as for `dropout`.
        random_streams: version of the random streams. Code compiled by XLA must get the values of
            versions 1 and 2 from outside, because its generator gives other numbers.
    """
    found = [layer for layer in layers if isinstance(layer, SampleDropout) and layer.rate]
    if random_streams >= 3:
        return _drawn_together(found, keys) if found else {}
    return {layer.name: _drawn(layer, layer.output.shape[1:], keys) for layer in found}


def _drawn_together(layers: "Sequence[SampleDropout]", keys: tf.Tensor) -> dict[str, tf.Tensor]:
    """Returns `draw_kept` of these layers from one hash of 64 bits for 4 values."""
    sizes = [prod(layer.output.shape[1:]) for layer in layers]
    rows = [-(-size // (_ROW * _PER_WORD)) for size in sizes]
    # In Python numbers: a sum beyond 64 bits is meant to wrap.
    starts = [
        (layer.index * 2**32 + row) * _ROW * _STEP % 2**64
        for layer, count in zip(layers, rows, strict=True)
        for row in range(count)
    ]
    limits = np.repeat([_dropped_levels(layer.rate) for layer in layers], rows)
    columns = [(column + 1) * _STEP % 2**64 for column in range(_ROW)]
    state = tf.bitcast(keys, tf.uint64)[:, None, None] + _words(starts)[:, None]
    hashed = tf.bitcast(_mixed(state + _words(columns)), tf.uint16)  # (B, rows, _ROW, 4)
    kept = hashed >= tf.constant(limits.astype(np.uint16)[:, None, None])
    found, first = {}, 0
    for layer, size, count in zip(layers, sizes, rows, strict=True):
        flat = tf.reshape(kept[:, first : first + count], (keys.shape[0], -1))
        found[layer.name] = tf.reshape(flat[:, :size], (-1, *layer.output.shape[1:]))
        first += count
    return found


def _dropped_levels(rate: float) -> int:
    """Returns how many of the `_LEVELS` values of 16 bits are dropped."""
    return min(round(rate * _LEVELS), _LEVELS - 1)


def _words(numbers: Sequence[int] | int) -> tf.Tensor:
    return tf.constant(np.array(numbers, np.uint64))


def _mixed(state: tf.Tensor) -> tf.Tensor:
    """Returns the hash of each 64-bit number, uint64."""
    for shift, factor in _ROUNDS:
        state = _folded(state, shift) * _words(factor)
    return _folded(state, _LAST_SHIFT)


def _folded(state: tf.Tensor, shift: int) -> tf.Tensor:
    return tf.bitwise.bitwise_xor(state, tf.bitwise.right_shift(state, _words(shift)))


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
            RuntimeError: training outside of `dropout`.
        """
        if not training or self.rate == 0.0:
            return inputs
        draw = _draw.get()
        if draw is None:
            raise RuntimeError(f"{self.name} was called in training outside of `dropout`")
        keep = draw(self, tuple(inputs.shape[1:]))
        scale = tf.cast(1.0 / (1.0 - self.rate), inputs.dtype)
        return tf.where(keep, inputs * scale, tf.zeros_like(inputs))
