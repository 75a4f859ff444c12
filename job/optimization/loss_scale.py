"""Scales the loss dynamically for gradients in float16.

float16 has no numbers between 0 and 6e-8, where many gradients are. So the loss is multiplied by a
scale before the backward pass, and the gradient is divided by it in float32. The scale is as large
as the gradients allow: it doubles after `GROWTH_STEPS` updates in a row, and halves when a gradient
overflows. Such a step is skipped: it changes no weight and does not count.

Source: Micikevicius et al. 2018, arXiv:1710.03740. The first scale and the number of steps are
those of Keras' `LossScaleOptimizer`. Scales are powers of two, which cause no rounding.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from flexunet.errors import ContentError

FIRST = 2.0**15
SMALLEST = 1.0
LARGEST = 2.0**24
GROWTH_STEPS = 2000
# After this many skipped steps in a row no scale helps: 24 halvings lead from the largest scale to
# the smallest.
MOST_SKIPPED = 50


class LossScale:
    """Holds the scale of a run and its counters as variables, for checkpoints."""

    def __init__(self) -> None:
        """Creates the variables; call it inside the strategy's scope."""
        self._scale = _variable(FIRST, tf.float32, "scale")
        self._good_steps = _variable(0, tf.int64, "good_steps")
        self._skipped_in_row = _variable(0, tf.int64, "skipped_in_row")

    def scaled(self, loss: tf.Tensor) -> tf.Tensor:
        """Returns the scaled `loss` for differentiation, () float32."""
        return loss * tf.cast(_value(self._scale), loss.dtype)

    def apply(
        self, gradients: Sequence[tf.Tensor], update: Callable[[list[tf.Tensor]], None]
    ) -> tf.Tensor:
        """Updates the weights if the gradients are finite, and then the scale.

        Call it in replica context with the global gradients, which are the same on all replicas:
        either all replicas skip a step, or none does.

        Args:
            gradients: gradients of the scaled loss, float32.
            update: called with the gradients of the unscaled loss.

        Returns:
            Number of steps skipped in a row, () int64; 0 if this one was not skipped.
        """
        inverse = 1.0 / _value(self._scale)
        found = [gradient * tf.cast(inverse, gradient.dtype) for gradient in gradients]
        is_finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(each)) for each in found])

        def updated() -> tf.Tensor:
            update(found)
            return tf.constant(True)

        tf.cond(is_finite, updated, lambda: tf.constant(False))
        return self._advance(is_finite)

    def _advance(self, is_finite: tf.Tensor) -> tf.Tensor:
        """Sets the variables after a step; returns the number of steps skipped in a row."""
        scale, good_steps = _value(self._scale), _value(self._good_steps) + 1
        grows = good_steps >= GROWTH_STEPS
        larger = tf.where(grows, tf.minimum(2 * scale, LARGEST), scale)
        none = tf.constant(0, tf.int64)
        skipped = tf.where(is_finite, none, _value(self._skipped_in_row) + 1)
        _assign(self._scale, tf.where(is_finite, larger, tf.maximum(scale / 2, SMALLEST)))
        _assign(self._good_steps, tf.where(is_finite & ~grows, good_steps, none))
        _assign(self._skipped_in_row, skipped)
        return skipped

    @property
    def value(self) -> float:
        """The current scale."""
        return float(self._scale.numpy())

    def named_variables(self) -> dict[str, Any]:
        """Returns the variables by name: `loss_scale/scale`, ..."""
        return {
            "loss_scale/scale": self._scale,
            "loss_scale/good_steps": self._good_steps,
            "loss_scale/skipped_in_row": self._skipped_in_row,
        }

    def load_state(self, values: Mapping[str, np.ndarray], *, source: str) -> None:
        """Sets the variables from `values`, by name.

        Raises:
            ContentError: a variable is missing or not a single number.
        """
        for name, variable in self.named_variables().items():
            value = values.get(name)
            if value is None or value.shape != ():
                found = "missing" if value is None else f"of shape {value.shape}"
                raise ContentError(
                    f"{source}: {name} is {found}, but a run in mixed_float16 stores one number "
                    "there; restore the file, or train a run with another name"
                )
            variable.assign(value)


def loss_scale_for(precision: str) -> LossScale | None:
    """Returns the loss scale of a precision or None; call it in the strategy's scope."""
    return LossScale() if precision == "mixed_float16" else None


def _variable(value: float, dtype: tf.DType, name: str) -> Any:
    return tf.Variable(tf.constant(value, dtype), trainable=False, name=f"loss_{name}")


# In replica context a strategy's variable takes no plain assignment: each replica sets its own.


def _value(variable: Any) -> tf.Tensor:
    return tf.raw_ops.ReadVariableOp(resource=variable.handle, dtype=variable.dtype)


def _assign(variable: Any, value: tf.Tensor) -> None:
    tf.raw_ops.AssignVariableOp(resource=variable.handle, value=value)
