"""Keeps an exponential average of a model's weights during training.

The average of a long run follows the weights slowly. Early in a run that would keep the random
start for many steps, so the momentum of update t, counted from 0, is min(m, (1 + t) / (10 + t)).
Sources: Polyak and Juditsky 1992, doi:10.1137/0330046; Tarvainen and Valpola 2017,
arXiv:1703.01780. The warm-up is that of `tf.train.ExponentialMovingAverage`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tensorflow as tf


class WeightAverage:
    """Averages floating-point weights, including the moving statistics of batch normalisation.

    The average of the moving statistics belongs to the averaged weights about as well as new
    statistics would, and needs no pass over the data. Integer variables are not averaged.
    """

    def __init__(self, momentum: float, weights: Sequence[Any]) -> None:
        """Creates an average equal to the weights; call it inside the strategy's scope.

        Args:
            momentum: share of the old average kept by an update, in (0, 1).
            weights: Keras variables.
        """
        self._momentum = momentum
        variables = [each.value for each in weights]
        self._weights = [each for each in variables if each.dtype.is_floating]
        self._averages = [
            tf.Variable(tf.identity(each), trainable=False, name="average")
            for each in self._weights
        ]
        self._positions = {id(each): number for number, each in enumerate(self._weights)}

    @property
    def variables(self) -> list[Any]:
        """The averages as TensorFlow variables; while `in_use`, the raw weights."""
        return list(self._averages)

    def of(self, weight: Any) -> Any:
        """Returns the average of a TensorFlow variable; a variable without one itself."""
        number = self._positions.get(id(weight))
        return weight if number is None else self._averages[number]

    def update(self, step: tf.Tensor) -> None:
        """Moves the average towards the weights; call it in replica context after their update.

        Args:
            step: () int64, number of earlier updates.
        """
        count = tf.cast(step, tf.float64)
        momentum = tf.minimum(
            tf.constant(self._momentum, tf.float64), (1.0 + count) / (10.0 + count)
        )
        for average, weight in zip(self._averages, self._weights, strict=True):
            # One fused operation: average -= (1 - momentum) (average - weight).
            tf.raw_ops.ResourceApplyGradientDescent(
                var=average.handle,
                alpha=tf.cast(1.0 - momentum, weight.dtype),
                delta=average - weight,
            )

    def restart(self) -> None:
        """Sets the average to the current weights."""
        for average, weight in zip(self._averages, self._weights, strict=True):
            average.assign(weight.read_value())

    def move_to_weights(self) -> None:
        """Sets the weights to the average; the raw weights are lost."""
        for average, weight in zip(self._averages, self._weights, strict=True):
            weight.assign(average.read_value())

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Gives the model its averaged weights inside the block, and then the raw ones again."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for averages, weights in zip(self._averages, self._weights, strict=True):
            for average, weight in zip(_copies(averages), _copies(weights), strict=True):
                # TensorFlow passes the arrays on; it copies one only when it is changed.
                raw = weight.read_value()
                weight.assign(average.read_value())
                average.assign(raw)


def _copies(variable: Any) -> tuple[Any, ...]:
    """Returns the variable of each local replica."""
    return tuple(getattr(variable, "values", (variable,)))
