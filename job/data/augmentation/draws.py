"""Draws whether a kind of augmentation applies to a sample, and by how much."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from job.config import AugmentationConfig
from job.data.random_streams import Purpose

Draws: TypeAlias = Callable[[Purpose], np.random.Generator]  # of one sample


@dataclass(frozen=True)
class DrawnRange:
    """Holds the range of a kind that applies, and the generator of its amounts.

    Attributes:
        limits: smallest and largest amount.
        generator: the stream of this kind, after the draw whether the kind applies.
    """

    limits: tuple[float, float]
    generator: np.random.Generator

    def uniform(self) -> float:
        """Returns an amount between the limits."""
        low, high = self.limits
        return low + (high - low) * self.generator.random()

    def log_uniform(self) -> float:
        """Returns an amount between the limits; twice is as likely as half."""
        low, high = self.limits
        return float(low * (high / low) ** self.generator.random())


def drawn_range(
    draws: Draws, purpose: Purpose, config: AugmentationConfig, kind: str
) -> DrawnRange | None:
    """Returns the range of `kind` if it applies to the sample, else None.

    Args:
        kind: `config` has `{kind}_probability` and `{kind}_range`.
    """
    probability = getattr(config, f"{kind}_probability")
    if not probability:
        return None  # most kinds of most runs: do not make a generator
    generator = draws(purpose)
    if generator.random() >= probability:
        return None
    return DrawnRange(getattr(config, f"{kind}_range"), generator)
