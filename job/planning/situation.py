"""Defines a rule of a plan, and what it may look at: facts, limits, and values chosen so far."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from flexunet.settings import deep_merge
from job.config import ModelConfig, TrainConfig, nested_values
from job.planning.facts import DatasetFacts, MachineFacts
from job.planning.network_cost import NetworkCost, network_cost

GIB = 2**30

_MOST_LEVELS = 12  # of ModelConfig

# Share of the memory that a plan uses. Evaluation, checkpoints and fluctuations need the rest.
MEMORY_SHARE = {"cpu": 0.75, "gpu": 0.85}
# A process of TensorFlow without a network, its input pipeline included, bytes.
_PROCESS_BYTES = {"cpu": 0.85e9, "gpu": 0.7e9}
# Weights, gradients, both moments, and a copy for checkpoints.
_BYTES_PER_PARAMETER = 24
# A number that the backward pass needs, with the buffers of its layer. Measured on CPUs, where
# 16-bit numbers need as much.
_BYTES_PER_VALUE = {"cpu": 9.0, "gpu": 9.0}
# Floating-point operations per second that training reaches: of a core, or of a GPU. Low guesses:
# the dry step measures the true duration.
_RATES = {
    ("cpu", "float32"): 25e9,
    ("cpu", "mixed_bfloat16"): 50e9,
    ("gpu", "float32"): 5e12,
    ("gpu", "mixed_bfloat16"): 15e12,
    ("gpu", "mixed_float16"): 15e12,
}


@dataclass(frozen=True)
class Limits:
    """Limits that a dry step has found.

    Attributes:
        samples_at_once: most samples of a replica in memory together; None: as estimated.
        base_filters: most filters of the first level; None: as estimated.
        slowdown: measured over estimated duration of a step; 1: not measured.
        measured_filters: filters of the measured step; more are not measured. None: any number.
    """

    samples_at_once: int | None = None
    base_filters: int | None = None
    slowdown: float = 1.0
    measured_filters: int | None = None


@dataclass(frozen=True)
class Situation:
    """Holds what a rule may look at.

    Attributes:
        values: by dotted path: the options given by the user, and those chosen by earlier rules.
        given: names of the options given by the user.
    """

    facts: DatasetFacts
    machine: MachineFacts
    limits: Limits
    values: Mapping[str, Any]
    given: frozenset[str]

    def value(self, option: str) -> Any:
        """Returns the value of `option`: given, chosen, or the default of `TrainConfig`."""
        if option in self.values:
            return self.values[option]
        found: Any = TrainConfig()
        for part in option.split("."):
            found = getattr(found, part)
        return found

    def with_values(self, values: Mapping[str, Any]) -> "Situation":
        """Returns the situation after `values` were chosen; options of the user stay."""
        return replace(self, values={**values, **self.values})

    def model(self, **changes: Any) -> ModelConfig:
        """Returns the network of the values so far, with `changes`."""
        values = nested_values(dict(self.values)).get("model", {})
        # Not validated: another level may still be chosen for a dropout rate.
        defaults = ModelConfig().model_dump()
        return ModelConfig.model_construct(**deep_merge(deep_merge(defaults, values), changes))

    def cost(self, **changes: Any) -> NetworkCost:
        """Returns the cost of `model(**changes)`."""
        model, facts = self.model(**changes), self.facts
        shape = (facts.height, facts.width, model.image_channels or facts.channels)
        return network_cost(model, shape, model.num_classes or len(facts.classes))

    @property
    def batch(self) -> int:
        """The global batch."""
        return int(self.value("global_batch_size"))

    @property
    def replica_batch(self) -> int:
        """The batch of a replica, at least 1."""
        return max(1, self.batch // self.machine.num_replicas)

    @property
    def allowed_levels(self) -> tuple[int, int]:
        """Fewest and most levels with the given deep supervision and dropout rate."""
        rate = float(self.value("model.dropout_rate"))
        fewest = 2 + supervised if (supervised := int(self.value("model.deep_supervision"))) else 1
        return fewest, math.ceil(1 / rate) if rate else _MOST_LEVELS

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch."""
        return math.ceil(max(1, self.facts.num_train) / self.batch)

    @property
    def time_budget(self) -> float | None:
        """Minutes of --time-budget."""
        minutes = self.value("time_budget")
        return None if minutes is None else float(minutes)

    @property
    def num_steps(self) -> int:
        """Steps of the training: of its epochs, or as many as its time budget allows."""
        epochs = self.value("epochs")
        if epochs is not None:
            return int(epochs) * self.steps_per_epoch
        return max(1, round(60 * (self.time_budget or 1) / self.step_seconds()))

    @property
    def memory_bytes(self) -> float:
        """The memory that training may use."""
        return MEMORY_SHARE[self.machine.device] * self.machine.memory_bytes

    def training_bytes(self, samples_at_once: int, **changes: Any) -> float:
        """Returns the estimated memory of training with so many samples at once."""
        device, cost = self.machine.device, self.cost(**changes)
        replicas = self.machine.local_replicas if device == "cpu" else 1
        of_replica = (
            _BYTES_PER_PARAMETER * cost.num_parameters
            + _BYTES_PER_VALUE[device] * cost.num_values * samples_at_once
        )
        return _PROCESS_BYTES[device] + replicas * of_replica

    def step_seconds(self, **changes: Any) -> float:
        """Returns the estimated duration of a training step, corrected by a measured one."""
        machine = self.machine
        rate = _RATES.get((machine.device, machine.precision), _RATES[machine.device, "float32"])
        samples: float = self.replica_batch
        if machine.device == "cpu":
            num_processes = machine.num_replicas / machine.local_replicas
            samples = self.batch / num_processes / machine.cores
        return self.limits.slowdown * 3 * self.cost(**changes).flops * samples / rate


# option -> (value, reason)
Chosen = dict[str, tuple[Any, str]]


@dataclass(frozen=True)
class Rule:
    """A rule of a plan.

    Attributes:
        options: those that it chooses.
        text: the rule in words, for the documentation.
        choose: the rule.
    """

    options: tuple[str, ...]
    text: str
    choose: Callable[[Situation], Chosen]
