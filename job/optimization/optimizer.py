"""Computes Adam and AdamW as one fused update per weight.

The state is plain variables and the step number is an argument, so that a checkpoint can hold the
complete state. The fused kernel of TensorFlow reads and writes each array once; the separate
operations of the Keras optimizer read them about five times.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from flexunet.errors import ContentError
from job.config import OptimizerConfig
from job.optimization.averaging import WeightAverage
from job.optimization.loss_scale import LossScale


@dataclass(frozen=True)
class SlowWeights:
    """Selects weights with a lower learning rate.

    Attributes:
        is_slow: of each weight.
        frozen_updates: number of updates at the start in which they stay the same; their moments
            are updated.
        factor: of the learning rate after that, 1 or less.
    """

    is_slow: tuple[bool, ...]
    frozen_updates: int
    factor: float

    def rate(self, step: tf.Tensor, learning_rate: tf.Tensor) -> tf.Tensor:
        """Returns the learning rate of the slow weights, () float64.

        Args:
            step: () int64, number of earlier updates.
            learning_rate: () float64, of the other weights.
        """
        slower = learning_rate * tf.constant(self.factor, learning_rate.dtype)
        return tf.where(step < self.frozen_updates, tf.zeros_like(slower), slower)


class Adam:
    """Updates weights by Adam (arXiv:1412.6980) or AdamW (arXiv:1711.05101).

    Same formulas as Keras: `epsilon` is added to the root of the uncorrected second moment, and
    AdamW shrinks the weight by `learning_rate * weight_decay` before the update.
    Source: Kingma and Ba 2015; Loshchilov and Hutter 2019.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        weights: Sequence[Any],
        loss_scale: LossScale | None = None,
        average: WeightAverage | None = None,
        slow: SlowWeights | None = None,
    ) -> None:
        """Creates zero moments for `weights`; call it inside the strategy's scope.

        Args:
            weights: trainable Keras variables, in the order of the gradients.
            loss_scale: scale of the gradients; saved and restored with the moments.
            average: updated after the weights; a checkpoint has it in files of its own.
            slow: weights with a lower learning rate.
        """
        self.loss_scale = loss_scale
        self.average = average
        self._config = config
        self._slow = slow
        self._weights = [weight.value for weight in weights]
        self._names = [f"{index:04d}" for index in range(len(weights))]
        self._first = [_zeros(weight, "first_moment") for weight in self._weights]
        self._second = [_zeros(weight, "second_moment") for weight in self._weights]

    def apply(
        self, gradients: Sequence[tf.Tensor], *, step: tf.Tensor, learning_rate: tf.Tensor
    ) -> None:
        """Updates the weights in place; call it in replica context with the global gradients.

        Args:
            step: () int64, number of earlier updates; 0 for the first update.
            learning_rate: () float64.
        """
        config = self._config
        rates = self._rates(step, learning_rate)
        for weight, first, second, gradient, rate in zip(
            self._weights, self._first, self._second, gradients, rates, strict=True
        ):
            gradient = self._clipped(gradient)
            dtype = gradient.dtype
            rate = tf.cast(rate, dtype)
            count = tf.cast(step + 1, dtype)
            if config.name == "adamw":
                decayed = weight * (rate * tf.cast(config.weight_decay, dtype))
                tf.raw_ops.AssignSubVariableOp(resource=weight.handle, value=decayed)
            tf.raw_ops.ResourceApplyAdam(
                var=weight.handle,
                m=first.handle,
                v=second.handle,
                beta1_power=tf.cast(config.beta_1, dtype) ** count,
                beta2_power=tf.cast(config.beta_2, dtype) ** count,
                lr=rate,
                beta1=tf.cast(config.beta_1, dtype),
                beta2=tf.cast(config.beta_2, dtype),
                epsilon=tf.cast(config.epsilon, dtype),
                grad=gradient,
            )
        if self.average is not None:
            self.average.update(step)

    def averaged_weights(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context in which the model has the averaged weights, if there is an average."""
        return contextlib.nullcontext() if self.average is None else self.average.in_use()

    def _rates(self, step: tf.Tensor, learning_rate: tf.Tensor) -> list[tf.Tensor]:
        """Returns the learning rate of each weight."""
        if self._slow is None:
            return [learning_rate] * len(self._weights)
        slower = self._slow.rate(step, learning_rate)
        return [slower if is_slow else learning_rate for is_slow in self._slow.is_slow]

    @property
    def variables(self) -> list[Any]:
        """The moments, the loss scale and the averaged weights, as TensorFlow variables."""
        averages = self.average.variables if self.average is not None else []
        return [*self.named_variables().values(), *averages]

    def named_variables(self) -> dict[str, Any]:
        """Returns the variables by name: `first/0000`, `second/0000`, ... per weight.

        Includes those of `LossScale.named_variables` if there is a loss scale.
        """
        moments: dict[str, Any] = {}
        for name, first, second in zip(self._names, self._first, self._second, strict=True):
            moments[f"first/{name}"] = first
            moments[f"second/{name}"] = second
        return moments | (self.loss_scale.named_variables() if self.loss_scale else {})

    def load_state(self, moments: Mapping[str, np.ndarray], *, source: str) -> None:
        """Sets the moments, and the loss scale if there is one.

        Raises:
            ContentError: names or shapes do not fit the weights, or the loss scale is missing.
        """
        for kind, variables in (("first", self._first), ("second", self._second)):
            for name, variable in zip(self._names, variables, strict=True):
                value = moments.get(f"{kind}/{name}")
                if value is None or value.shape != tuple(variable.shape):
                    found = "missing" if value is None else f"of shape {value.shape}"
                    raise ContentError(
                        f"{source}: moment {kind}/{name} is {found}, expected "
                        f"{tuple(variable.shape)}; the file belongs to another model"
                    )
                variable.assign(value)
        if self.loss_scale:
            self.loss_scale.load_state(moments, source=source)

    def _clipped(self, gradient: tf.Tensor) -> tf.Tensor:
        if self._config.clipnorm:
            gradient = tf.clip_by_norm(gradient, tf.cast(self._config.clipnorm, gradient.dtype))
        if self._config.clipvalue:
            limit = tf.cast(self._config.clipvalue, gradient.dtype)
            gradient = tf.clip_by_value(gradient, -limit, limit)
        return gradient


def _zeros(weight: Any, name: str) -> Any:
    return tf.Variable(tf.zeros(weight.shape, weight.dtype), trainable=False, name=name)
