"""Sums every gradient over the replicas by all-reduce, in the type in which they are sent.

bfloat16 halves the bytes. Each part is rounded to the nearest value, and each sum on its way too.
No replica keeps what was rounded off. So all replicas have the same state, a checkpoint needs
nothing more, and a run continues with any number of replicas. `benchmarks/rounding.py` compares
this with stochastic rounding and with error feedback.
"""

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


def sum_over_replicas(values: Sequence[tf.Tensor], dtype: str) -> list[tf.Tensor]:
    """Returns the sum of each tensor over all replicas, in the dtype of the tensor.

    All replicas must call it in replica context.

    Args:
        dtype: in which the tensors are sent; "float32": their own, so nothing is rounded.
    """
    context = tf.distribute.get_replica_context()
    is_narrow = dtype == "bfloat16" and context.num_replicas_in_sync > 1
    sent = [tf.cast(value, tf.bfloat16) for value in values] if is_narrow else list(values)
    total: list[tf.Tensor] = context.all_reduce(tf.distribute.ReduceOp.SUM, sent)
    return [tf.cast(each, value.dtype) for each, value in zip(total, values, strict=True)]


class AllReduce:
    """Computes the gradient of the global batch on each replica by all-reduce."""

    def __init__(self, model: keras.Model, dtype: str) -> None:
        """Prepares the all-reduce of all trainable weights of `model`, see `sum_over_replicas`."""
        self._weights = list(model.trainable_variables)
        self._dtype = dtype

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
        return sum_over_replicas(local_gradient.values, self._dtype)
