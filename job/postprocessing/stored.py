"""Stores the fitted postprocessing of a run, and decides what a prediction uses of it.

`postprocessing.json` names the checkpoint and the kind of prediction for which it was fitted. It is
used for no other: an ensemble, mirrored images or windows have other probabilities.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import model_validator

from flexunet.errors import ContentError, UsageError
from flexunet.settings import Settings, parse_settings
from flexunet.storage import ObjectStore
from flexunet.text import pluralize
from job.models.flips import Flips
from job.postprocessing.masks import DEFAULT_THRESHOLD, Postprocessing, given_words
from job.postprocessing.region_filter import FittedOn
from job.runs.layout import read_small
from job.runs.loading import EnsembleMember

POSTPROCESSING_NAME = "postprocessing.json"
UNDO = "--threshold 0.5 --min-region 0 --temperature 1"

_VERSION = 1
_MAX_TEMPERATURE = 100.0  # of --temperature


class FittedValue(Settings):
    """A fitted value, or the default where the gain of the best value is within noise.

    Attributes:
        value: that predictions use.
        best: the best value on all cases.
        score_before, score: foreground Dice, or the mean log-likelihood per pixel, on all
            cases: with the default, and with `value`.
        gain: of choosing a value, measured on groups that had no part in the choice.
        low, high: 95 % bootstrap interval of the gain over groups; None with fewer than 5 groups.
    """

    value: float
    best: float
    score_before: float | None
    score: float | None
    gain: float | None
    low: float | None
    high: float | None


class FittedClass(Settings):
    """The fitted values of a class.

    Attributes:
        threshold: of its probability, without the temperature.
        min_region: pixels at network size; smaller regions are removed.
    """

    name: str
    threshold: FittedValue
    min_region: FittedValue

    @model_validator(mode="after")
    def _in_range(self) -> "FittedClass":
        if not 0 < self.threshold.value < 1:
            raise ValueError(f"threshold {self.threshold.value:g} is not between 0 and 1")
        if not 0 <= self.min_region.value < 2**31:
            raise ValueError(f"min_region {self.min_region.value:g} is no number of pixels")
        return self


class FittedPostprocessing(Settings):
    """The content of `postprocessing.json`.

    Attributes:
        checkpoint: folder of the checkpoint in the run.
        commit_sha256: digest of its COMMIT.json.
        overlap: of windows, pixels; None if images are predicted whole.
        dice_before, dice: foreground Dice of the validation cases, with the defaults and with all
            fitted values.
        gain, low, high: of all fitted values together, and the 95 % interval over groups. The
            values were chosen on the same cases, so it is optimistic.
    """

    version: int = _VERSION
    fitted_on: FittedOn
    num_groups: int
    checkpoint: str
    commit_sha256: str
    flips: Flips = "none"
    overlap: int | None
    classes: tuple[FittedClass, ...]
    temperature: FittedValue
    dice_before: float | None
    dice: float | None
    gain: float | None
    low: float | None
    high: float | None

    @model_validator(mode="after")
    def _temperature_in_range(self) -> "FittedPostprocessing":
        if not 0 < self.temperature.value <= _MAX_TEMPERATURE:
            raise ValueError(
                f"temperature {self.temperature.value:g} is not above 0 and at most "
                f"{_MAX_TEMPERATURE:g}"
            )
        return self

    def text(self) -> str:
        """Returns the text of the file."""
        values = self.model_dump(mode="json")
        return json.dumps(values, indent=2, allow_nan=False) + "\n"

    def record(
        self, values: Postprocessing | None = None, given: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Returns the values that are used and their origin, as JSON.

        Args:
            values: that are used; None: the fitted ones.
            given: keys of the record that options of the user replaced.
        """
        used, names = values or self.values(), [each.name for each in self.classes]
        fitted_on = self.fitted_on.model_dump(mode="json")
        return {**_record(names, used, fitted_on, None), "given": list(given)}

    def values(self) -> Postprocessing:
        """Returns the values that predictions use."""
        return Postprocessing(
            tuple(each.threshold.value for each in self.classes),
            tuple(int(each.min_region.value) for each in self.classes),
            self.temperature.value,
        ).simplified()


@dataclass(frozen=True)
class PredictionKind:
    """What a stored fit must agree with.

    Attributes:
        members: the weights.
        overlap: of windows, pixels; None if images are predicted whole.
        split: that is predicted; None: new images.
    """

    members: tuple[EnsembleMember, ...]
    flips: Flips
    overlap: int | None
    split: str | None = None


@dataclass(frozen=True)
class ExplicitValues:
    """The values of the options; None where an option is not given.

    Attributes:
        threshold: one for all classes but 0, or one for each.
        min_region: likewise, pixels at network size.
    """

    threshold: tuple[float, ...] | None = None
    min_region: tuple[int, ...] | None = None
    temperature: float | None = None

    @classmethod
    def of(cls, config: Any) -> "ExplicitValues":
        """Returns the values of prediction options, see `PredictConfig`."""
        return cls(config.threshold, config.min_region, config.temperature)

    @property
    def names(self) -> tuple[str, ...]:
        """The keys of the record that the options replace."""
        values = (self.threshold, self.min_region, self.temperature)
        names = ("thresholds", "min_region", "temperature")
        return tuple(name for name, value in zip(names, values, strict=True) if value is not None)

    @property
    def is_complete(self) -> bool:
        """Whether the options replace every fitted value."""
        return len(self.names) == 3


@dataclass(frozen=True)
class Resolved:
    """The postprocessing of a prediction.

    Attributes:
        line: what a user must know, for the log; None: nothing.
        record: the values and their origin, as JSON; None: the defaults, and nothing was fitted.
    """

    values: Postprocessing = field(default_factory=Postprocessing)
    line: str | None = None
    record: dict[str, Any] | None = None


def resolve_postprocessing(
    runs: Sequence[ObjectStore],
    names: Sequence[str],
    kind: PredictionKind,
    explicit: ExplicitValues,
) -> Resolved:
    """Returns how the probabilities of runs become masks: options over the fit of the run.

    Args:
        runs: folders of the runs; a fit is used only for one run.
        names: of the foreground classes.

    Raises:
        UsageError: an option has another number of values than there are classes.
        ContentError: the fit is damaged, or of a later version.
    """
    thresholds = _per_class(explicit.threshold, names, "--threshold")
    min_pixels = _per_class(explicit.min_region, names, "--min-region")
    fitted = None if explicit.is_complete else read_postprocessing(runs[0], names)
    reason = None if fitted is None else _why_not(fitted, kind)
    base = Postprocessing() if fitted is None or reason else fitted.values()
    values = Postprocessing(
        thresholds if thresholds is not None else base.thresholds,
        min_pixels if min_pixels is not None else base.min_pixels,
        base.temperature if explicit.temperature is None else explicit.temperature,
    ).simplified()
    if fitted is None and explicit == ExplicitValues():
        return Resolved()
    if fitted is not None and reason is None:
        record = fitted.record(values, explicit.names)
    else:
        record = _record(names, values, None, reason)
    line = None
    if fitted is not None and reason is not None:
        line = f"{runs[0].url}/{POSTPROCESSING_NAME} is not used: {reason}"
    elif fitted is not None and values != Postprocessing():
        line = _used_words(runs[0], fitted, values, explicit.names)
    return Resolved(values, line, record)


def _record(
    names: Sequence[str],
    values: Postprocessing,
    fitted_on: dict[str, Any] | None,
    reason: str | None,
) -> dict[str, Any]:
    return {
        "classes": list(names),
        "thresholds": [*(values.thresholds or [DEFAULT_THRESHOLD] * len(names))],
        "min_region": [*(values.min_pixels or [0] * len(names))],
        "temperature": values.temperature,
        "fitted_on": fitted_on,
        "not_used": reason,
    }


def _used_words(
    run: ObjectStore, fitted: FittedPostprocessing, values: Postprocessing, given: Sequence[str]
) -> str:
    """Returns the line on values that change a mask or a probability."""
    cases = pluralize(fitted.fitted_on.num_cases, "validation image")
    but = f", but {given_words(given)} given" if given else ""
    return (
        f"postprocessing of {run.url}, fitted on {cases}{but}: "
        f"{described([each.name for each in fitted.classes], values)} (undo: {UNDO})"
    )


def described(names: Sequence[str], values: Postprocessing) -> str:
    """Returns the values that are not the defaults in words."""
    words = []
    for index, name in enumerate(names):
        if values.thresholds and values.thresholds[index] != DEFAULT_THRESHOLD:
            words.append(f"{name}: threshold {values.thresholds[index]:g}")
        if values.min_pixels and values.min_pixels[index]:
            words.append(f"{name}: smallest region {values.min_pixels[index]} pixels")
    if values.temperature != 1:
        words.append(f"temperature {values.temperature:.3g}")
    return ", ".join(words) or "all defaults"


def _why_not(fitted: FittedPostprocessing, kind: PredictionKind) -> str | None:
    """Returns why a fit is not for a prediction, or None if it is."""
    if len(kind.members) > 1:
        return "it was fitted for this run alone, and an ensemble has other probabilities"
    if kind.members[0].commit_sha256 != fitted.commit_sha256:
        return f"it was fitted for {fitted.checkpoint}, not for {kind.members[0].checkpoint}"
    if kind.flips != fitted.flips:
        return f"it was fitted with --flips {fitted.flips}, not {kind.flips}"
    if kind.overlap != fitted.overlap:
        return f"it was fitted with an overlap of {fitted.overlap}, not {kind.overlap}"
    if kind.split == fitted.fitted_on.split:
        return f"it was fitted on the {kind.split} split, where its scores would be optimistic"
    return None


def _per_class(values: tuple[Any, ...] | None, names: Sequence[str], flag: str) -> Any:
    if values is None:
        return None
    if len(values) not in (1, len(names)):
        shown = ",".join(f"{each:g}" for each in values)
        raise UsageError(
            f"{flag}={shown}: give one number, or {len(names)}, one for each class but the "
            f"background ({', '.join(names)})"
        )
    return tuple(values) * len(names) if len(values) == 1 else tuple(values)


def read_postprocessing(run: ObjectStore, names: Sequence[str]) -> FittedPostprocessing | None:
    """Returns the stored fit of a run; None: nothing was fitted.

    Args:
        names: of the foreground classes.

    Raises:
        ContentError: the file is damaged, or of a later version.
    """
    where = f"{run.url}/{POSTPROCESSING_NAME}"
    if run.stat(POSTPROCESSING_NAME) is None:
        return None
    remedy = f"give {UNDO}, or restore the file"
    try:
        values = json.loads(read_small(run, POSTPROCESSING_NAME))
        if not isinstance(values, dict):
            raise ContentError(f"{where}: damaged (not a JSON object); {remedy}")
        if values.get("version") != _VERSION:
            raise ContentError(
                f"{where}: has version {values.get('version')}, and this FlexUNet reads version "
                f"{_VERSION}; {remedy}"
            )
        found = parse_settings(FittedPostprocessing, values, where)
    except (ValueError, RecursionError) as error:
        raise ContentError(f"{where}: damaged ({error}); {remedy}") from error
    except UsageError as error:
        raise ContentError(f"{error}; {remedy}") from error
    if [each.name for each in found.classes] != list(names):
        raise ContentError(
            f"{where}: damaged (its classes are {', '.join(each.name for each in found.classes)}, "
            f"the run's {', '.join(names)}); {remedy}"
        )
    return found
