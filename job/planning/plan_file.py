"""Defines a plan, the file `plan.json` of a run, and which runs are planned."""

from typing import Any, Literal

from pydantic import Field, field_validator

from flexunet.settings import Settings, flag_of
from flexunet.storage import NotFound, ObjectStore
from job.config import TrainConfig, nested_values
from job.planning.facts import DatasetFacts, MachineFacts
from job.runs.layout import parse_record, read_small

PLAN_NAME = "plan.json"
# The options that rules choose.
PLANNED = frozenset(
    {
        *("model.name", "model.base_kernels", "model.dilation", "model.normalization"),
        *("model.num_layers", "model.base_filters", "global_batch_size", "accumulate", "epochs"),
        *("precision", "fit_postprocessing", "loss.name", "loss.class_weights"),
        *("foreground_share", "foreground_share_end"),
        *("optimizer.name", "optimizer.learning_rate", "optimizer.ema_momentum"),
        *("optimizer.clipvalue", "optimizer.clipnorm"),
        *("schedule.reduce_on_plateau", "schedule.cosine", "schedule.warmup_epochs"),
        *("schedule.early_stopping_patience", "augmentation.preset", "augmentation.enabled"),
        *("augmentation.hflip_probability", "augmentation.vflip_probability"),
        "augmentation.rotation_probability",
    }
)

Scalar = bool | int | float | str
Value = Scalar | tuple[Scalar, ...] | None
# Options that the rules of earlier versions chose; plans that have them still hold.
_EARLIER = frozenset(
    f"augmentation.{name}"
    for name in (
        *("shrink_probability", "deformation_probability", "brightening_probability"),
        "rotation_angles",
    )
)


class Choice(Settings):
    """One option of a plan.

    Attributes:
        option: dotted path in `TrainConfig`.
        source: "given" by the user, or chosen by a "rule".
    """

    option: str
    value: Value
    reason: str
    source: Literal["given", "rule"] = "rule"

    @property
    def flag(self) -> str:
        """The command-line option that sets the value."""
        return flag_of(self.option.split("."))


class Measured(Settings):
    """The result of a dry step.

    Attributes:
        memory_bytes: peak memory of a process that trained one step.
        step_s: seconds of a step.
        tried: the attempts before that needed too much memory, in words.
    """

    memory_bytes: int
    step_s: float
    tried: tuple[str, ...] = ()


class Plan(Settings):
    """The options that were chosen for a run, and why.

    Attributes:
        given: the options of the user, by dotted path.
        samples_at_once: most samples of a replica that fit into memory together.
        memory_bytes: estimated memory of training.
        num_steps: training steps of the whole run.
        minutes: estimated duration of training.
        notes: warnings for the user.
    """

    format_version: Literal[1] = 1
    dataset_digest: str = ""
    dataset: DatasetFacts
    machine: MachineFacts
    given: dict[str, Any]
    choices: tuple[Choice, ...]
    samples_at_once: int = Field(ge=1)
    memory_bytes: int = Field(ge=0)
    num_steps: int = Field(ge=1)
    minutes: float = Field(ge=0)
    notes: tuple[str, ...] = ()
    measured: Measured | None = None

    @field_validator("choices")
    @classmethod
    def _chooses_once(cls, choices: tuple[Choice, ...]) -> tuple[Choice, ...]:
        """Refuses an option that no rule has ever chosen, and one that is there twice."""
        known = set(PLANNED | _EARLIER)
        for each in choices:
            if each.option not in known:
                raise ValueError(f"the option {each.option} is chosen twice, or by no rule")
            known.remove(each.option)
        return choices

    def values(self) -> dict[str, Any]:
        """Returns the nested values of all choices and of the given options."""
        return nested_values({**{each.option: each.value for each in self.choices}, **self.given})

    def value(self, option: str) -> Value:
        """Returns the value of an option that a rule chooses or the user gave."""
        return next(each.value for each in self.choices if each.option == option)

    def chose(self, option: str) -> bool:
        """Returns whether a rule chose `option`."""
        return any(each.option == option and each.source == "rule" for each in self.choices)


def read_plan(store: ObjectStore) -> Plan | None:
    """Returns the plan of the run, or cross-validation, in `store`; None if it has none.

    Raises:
        ContentError: the file is damaged, or a later version wrote it.
    """
    try:
        data = read_small(store, PLAN_NAME)
    except NotFound:
        return None
    return parse_record(data, Plan, f"{store.url}/{PLAN_NAME}")


def plan_json(plan: Plan) -> bytes:
    """Returns the bytes of `plan.json`."""
    return (plan.model_dump_json(indent=1) + "\n").encode()


def explicit_values(config: TrainConfig) -> dict[str, Any]:
    """Returns the options that were set when `config` was made, nested; JSON types only."""
    return config.model_dump(mode="json", exclude_unset=True)
