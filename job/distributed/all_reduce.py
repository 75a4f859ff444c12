"""Sums every gradient over the replicas by all-reduce."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf


@dataclass(frozen=True)
class Gradients:
    """Holds the gradients of one replica, from one or more backward passes."""

    values: list[tf.Tensor]

    def __add__(self, other: "Gradients") -> "Gradients":
        """Returns the sum of two parts."""
        return Gradients([a + b for a, b in zip(self.values, other.values, strict=True)])

    def tensors(self) -> list[tf.Tensor]:
        """Returns all tensors of the backward pass."""
        return self.values


class AllReduce:
    """Computes the gradient of the global batch on each replica by all-reduce."""

    def __init__(self, model: keras.Model) -> None:
        """Prepares the all-reduce of all trainable weights of `model`."""
        self._weights = list(model.trainable_variables)

    @contextmanager
    def record_layers(self) -> Iterator[None]:
        """Does nothing: no layer is recorded."""
        yield

    @contextmanager
    def recorded(self) -> Iterator[list[Any]]:
        """Yields an empty list: no layer call is recorded."""
        yield []

    def local_gradient(
        self, tape: tf.GradientTape, loss: tf.Tensor, factors: Sequence[Any]
    ) -> Gradients:
        """Returns the part of this replica in the gradient, before any exchange.

        Args:
            loss: its gradient is the part of this replica (see `job.losses.replica_sum`).
            factors: the list of `recorded`.
        """
        return Gradients(tape.gradient(loss, [weight.value for weight in self._weights]))

    def gradients(self, local_gradient: Gradients) -> list[tf.Tensor]:
        """Returns the global gradient of each weight, in the order of the model's weights.

        All replicas must call it in replica context, once per update.
        """
        context = tf.distribute.get_replica_context()
        total: list[tf.Tensor] = context.all_reduce(
            tf.distribute.ReduceOp.SUM, local_gradient.values
        )
        return total
