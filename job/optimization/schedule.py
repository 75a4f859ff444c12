"""Computes learning rate warm-up, cosine decay and plateau reduction, and early stopping.

Warm-up and cosine are a pure function of the step. Plateau reduction and early stopping follow the
rules of Keras, with state that can be saved; both watch a value that should fall. As in Keras, an
improvement is judged after rounding to float32, so that noise below 1e-7 of the value is none.
Unlike in Keras, NaN and infinity never count as the best value: in Keras, a first NaN stays the
best for ever.

Source of the rules: `ReduceLROnPlateau` and `EarlyStopping` of Keras 3.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flexunet.text import pluralize

_LONGEST_WARMUP = 0.1  # of the time of a run with a time budget


def rate_factor(
    step: int, *, steps_per_epoch: int, epochs: int | None, warmup_epochs: float, is_cosine: bool
) -> float:
    """Returns the factor of the learning rate at `step`, counted from 0.

    In the n steps of the warm-up the factor rises linearly from 1 / n to 1. After that it is 1, or
    with cosine (1 + cos(pi t)) / 2, with t rising from 0 to 1 over the remaining steps.
    Source: Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts.
    """
    num_warmup = round(warmup_epochs * steps_per_epoch)
    if step < num_warmup:
        return (step + 1) / num_warmup
    if not is_cosine:
        return 1.0
    if epochs is None:
        raise ValueError("without a number of epochs the schedule needs a time budget")
    rest = max(1, epochs * steps_per_epoch - num_warmup)
    return _cosine((step - num_warmup) / rest)


def timed_rate_factor(
    step: int, fraction: float, *, steps_per_epoch: int, warmup_epochs: float, is_cosine: bool
) -> float:
    """Returns the factor of the learning rate at `step` of a run with a time budget.

    As `rate_factor`, with two differences. The cosine falls over the whole time. The warm-up ends
    after a tenth of the time at the latest, because an epoch may take longer than that.

    Args:
        fraction: part of the time, or of the epochs if these end first, that is used; 0 to 1.
    """
    factor = _cosine(fraction) if is_cosine else 1.0
    num_warmup = round(warmup_epochs * steps_per_epoch)
    if step < num_warmup:
        factor *= min(1.0, max((step + 1) / num_warmup, fraction / _LONGEST_WARMUP))
    return factor


def _cosine(part: float) -> float:
    return (1 + math.cos(math.pi * min(1.0, part))) / 2


@dataclass
class PlateauReducer:
    """Multiplies the learning rate by `factor` when the value stops falling.

    Attributes:
        factor: in (0, 1).
        patience: epochs without improvement before a reduction; 0 acts like 1.
        min_lr: lower limit of the learning rate.
        min_delta: a smaller fall is no improvement.
        cooldown: epochs after a reduction that do not count.
    """

    factor: float = 0.4
    patience: int = 10
    min_lr: float = 0.0
    min_delta: float = 1e-4
    cooldown: int = 0
    best: float | None = field(default=None, init=False)
    wait: int = field(default=0, init=False)
    cooldown_left: int = field(default=0, init=False)

    def update(self, value: float, lr: float) -> float:
        """Returns the learning rate after an epoch that ended with `value` at rate `lr`."""
        if self.cooldown_left > 0:
            self.cooldown_left -= 1
            self.wait = 0
        if _is_improvement(value, self.best, self.min_delta):
            self.best = value
            self.wait = 0
            return lr
        if self.cooldown_left > 0:
            return lr
        self.wait += 1
        if self.wait < self.patience or np.float32(lr) <= np.float32(self.min_lr):
            return lr
        self.cooldown_left = self.cooldown
        self.wait = 0
        return max(lr * self.factor, self.min_lr)

    def state(self) -> dict[str, Any]:
        """Returns the state for `load_state`, in JSON types."""
        return {"best": self.best, "wait": self.wait, "cooldown_left": self.cooldown_left}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores a result of `state`."""
        self.best = state["best"]
        self.wait = state["wait"]
        self.cooldown_left = state["cooldown_left"]


@dataclass
class EarlyStopping:
    """Stops training if the value has not fallen for `patience` epochs; keeps the best epoch.

    Attributes:
        patience: epochs without improvement; 0 or less never stops, but keeps the best.
        min_delta: a smaller fall is no improvement.
        best: the best value so far, None before the first.
        best_epoch: the epoch of `best`, counted from 0.
    """

    patience: int = 10
    min_delta: float = 0.0
    best: float | None = field(default=None, init=False)
    best_epoch: int | None = field(default=None, init=False)
    wait: int = field(default=0, init=False)

    def update(self, value: float, epoch: int) -> bool:
        """Returns whether to stop after `epoch` (from 0), whose value is `value`."""
        if _is_improvement(value, self.best, self.min_delta):
            self.best, self.best_epoch, self.wait = value, epoch, 0
            return False
        self.wait += 1
        return 0 < self.patience <= self.wait and epoch > 0

    def state(self) -> dict[str, Any]:
        """Returns the state for `load_state`, in JSON types."""
        return {"best": self.best, "best_epoch": self.best_epoch, "wait": self.wait}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores a result of `state`."""
        self.best = state["best"]
        self.best_epoch = state["best_epoch"]
        self.wait = state["wait"]


def stopped_early_words(epochs: int, best_epoch: int) -> str:
    """Returns the words for an early stop; `best_epoch` counts from 0, the words from 1."""
    return (
        f"stopped early after {pluralize(epochs, 'epoch')}: the validation loss has not fallen "
        f"since epoch {best_epoch + 1}"
    )


def _is_improvement(value: float, best: float | None, min_delta: float) -> bool:
    if not math.isfinite(value):
        return False
    if best is None:
        return True
    return bool(np.float32(value + min_delta) < np.float32(best))
