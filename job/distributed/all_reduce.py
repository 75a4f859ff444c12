"""Sums every gradient over the replicas by all-reduce: the plain way, and the default."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf


@dataclass(frozen=True)
class Gradients:
    """A replica's part of the gradient of each weight, after one backward pass or several."""

    values: list[tf.Tensor]

    def __add__(self, other: "Gradients") -> "Gradients":
        """Returns the part of both backward passes together."""
        return Gradients([a + b for a, b in zip(self.values, other.values, strict=True)])

    def tensors(self) -> list[tf.Tensor]:
        """Returns all that was computed backwards."""
        return self.values


class AllReduce:
    """Computes on each replica the gradient of the global batch."""

    def __init__(self, model: keras.Model) -> None:
        """Sums the gradients of all trainable weights of `model`."""
        self._weights = list(model.trainable_variables)

    @contextmanager
    def record_layers(self) -> Iterator[None]:
        """Changes nothing: no layer is watched."""
        yield

    @contextmanager
    def recorded(self) -> Iterator[list[Any]]:
        """Yields an empty list: no call of a layer is kept."""
        yield []

    def local_gradient(
        self, tape: tf.GradientTape, loss: tf.Tensor, factors: Sequence[Any]
    ) -> Gradients:
        """Returns what this replica knows of the gradient before any exchange.

        Args:
            loss: has as gradient this replica's share (`job.losses.replica_sum`).
            factors: what `recorded` has yielded.
        """
        return Gradients(tape.gradient(loss, [weight.value for weight in self._weights]))

    def gradients(self, local_gradient: Gradients) -> list[tf.Tensor]:
        """Returns the global gradient of each weight, in the order of the model's weights.

        Called in replica context by all replicas, once per update.
        """
        context = tf.distribute.get_replica_context()
        total: list[tf.Tensor] = context.all_reduce(
            tf.distribute.ReduceOp.SUM, local_gradient.values
        )
        return total
