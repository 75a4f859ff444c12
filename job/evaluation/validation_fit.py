"""Fits thresholds, smallest regions and temperature of a run on its validation split.

Each case goes through the network once. Its probabilities are kept in a temporary file, rounded to
1/65535, and read again for each class: first the thresholds are fitted, one class after the other,
then the smallest regions of the masks with these thresholds. The processes of a group share the
cases and select the same values.
"""

import logging
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from flexunet.progress import Heartbeat, Progress
from flexunet.text import pluralize
from job.data.reader import RecordReader
from job.distributed.process_group import ProcessGroup
from job.evaluation.case_file import CaseFile
from job.evaluation.case_measures import PackedMask
from job.evaluation.evaluator import Evaluator, foreground_names
from job.evaluation.gathering import CASES_AT_ONCE, gather, joined
from job.evaluation.rank_evaluation import RankEvaluation, RankResult, Watch
from job.inference.sliding_window import Probabilities
from job.metrics.bootstrap import Pair, difference_interval, ratio
from job.metrics.per_case import without_ignored
from job.metrics.thresholds import THRESHOLDS
from job.postprocessing.masks import DEFAULT_THRESHOLD, Ids, class_ids
from job.postprocessing.region_filter import CaseRegions, FittedOn, candidate_limits
from job.postprocessing.selection import Selection, concatenated, select
from job.postprocessing.stored import (
    FittedClass,
    FittedPostprocessing,
    FittedValue,
    described,
)
from job.postprocessing.temperature import (
    DEFAULT_TEMPERATURE,
    TEMPERATURES,
    log_likelihoods,
)
from job.postprocessing.threshold_counts import DEFAULT_INDEX, count_at_thresholds

logger = logging.getLogger(__name__)

T = TypeVar("T")
Values = npt.NDArray[np.float64]

VALIDATION = "valid"

_FULL = 65535  # the stored value of probability 1
_MAX_LIMITS = 256  # smallest regions that are tried for a class


def fit_postprocessing(
    evaluator: Evaluator, reader: RecordReader, checkpoint: Sequence[str], watch: Watch
) -> FittedPostprocessing:
    """Fits the postprocessing of the current weights; all processes of the group must call it.

    Args:
        evaluator: without postprocessing.
        reader: of the validation split.
        checkpoint: folder and digest of the checkpoint that has these weights.

    Raises:
        StoppedError: `watch.should_stop` returned True in one of the processes.
    """
    dataset = evaluator.dataset
    split, names = dataset.split(VALIDATION), foreground_names(dataset)
    groups = [case.group for case in evaluator.cases_of(split)]
    own = evaluator.rank_evaluation(split, reader)
    with CaseFile() as file:
        cases = _ValidationCases(own, evaluator.process_group, watch, file)
        likelihoods = cases.predict()
        ones = np.ones((1, len(TEMPERATURES)))
        temperature = select(
            concatenated([(each[np.newaxis], ones) for each in likelihoods]),
            groups,
            DEFAULT_TEMPERATURE,
        )
        fitted, before, after = _fit_classes(cases, names, groups)
    gain = _gain(after, before)
    low, high = difference_interval(after, before, groups) or (None, None)
    return FittedPostprocessing(
        fitted_on=FittedOn(
            split=split.name,
            num_cases=len(groups),
            dataset_sha256=dataset.digest,
            fold=evaluator.config.fold,
        ),
        num_groups=len(set(groups)),
        checkpoint=checkpoint[0],
        commit_sha256=checkpoint[1],
        overlap=evaluator.windows.overlap if evaluator.has_windows else None,
        classes=fitted,
        temperature=_fitted_value(temperature, TEMPERATURES),
        dice_before=ratio(*before),
        dice=ratio(*after),
        gain=gain,
        low=low,
        high=high,
    )


def log_fit(fitted: FittedPostprocessing) -> None:
    """Logs the fitted values and what they change on the validation cases."""
    names = [each.name for each in fitted.classes]
    groups = pluralize(fitted.num_groups, "group")
    dice = ""
    if fitted.dice_before is not None and fitted.dice is not None:
        dice = f"; foreground Dice there {fitted.dice_before:.4f} before, {fitted.dice:.4f} after"
    logger.info(
        "postprocessing fitted on %s (%s): %s%s",
        pluralize(fitted.fitted_on.num_cases, "validation image"),
        groups,
        described(names, fitted.values()),
        dice,
    )


@dataclass(frozen=True)
class _ValidationCases:
    """The predicted validation cases of this process."""

    own: RankEvaluation
    process_group: ProcessGroup
    watch: Watch
    file: CaseFile
    indices: list[int] = field(default_factory=list)

    def predict(self) -> list[Values]:
        """Predicts the cases once; returns the log-likelihoods of all, see `log_likelihoods`."""
        likelihoods: dict[int, Values] = {}
        ignore_id = self.own.measures.ignore_id

        def work(heartbeat: Heartbeat, is_stopped: Callable[[], bool]) -> None:
            watch = Watch(self.watch.shown, is_stopped, heartbeat)
            inputs, number = self.own.predicted(RankResult(), watch)
            with Progress("fit on valid", number, unit="cases", shown=watch.shown) as bar:
                for case in bar.tracked(inputs):
                    found = log_likelihoods(case.truth, case.probabilities, ignore_id)
                    likelihoods[case.index] = found
                    truth, packed = _without_ignored(case.truth, case.probabilities, ignore_id)
                    self.file.add(case.index, packed, PackedMask.of(truth))
                    self.indices.append(case.index)
                    watch.heartbeat()
                    watch.check_stop("fitting the postprocessing")

        self._run(work)
        return self._gathered(likelihoods)

    def measure(self, function: Callable[[Ids, Probabilities], T]) -> list[T]:
        """Returns what `function` returns for truth and probabilities of each case, in order."""
        found: dict[int, T] = {}

        def work(heartbeat: Heartbeat, is_stopped: Callable[[], bool]) -> None:
            watch = Watch(self.watch.shown, is_stopped, heartbeat)
            for index in self.indices:
                truth = self.file.masks([index])[index].unpack()
                found[index] = function(truth, self.file.tallies([index])[index].unpack())
                watch.heartbeat()
                watch.check_stop("fitting the postprocessing")

        self._run(work)
        return self._gathered(found)

    def _run(self, work: Callable[[Heartbeat, Callable[[], bool]], None]) -> None:
        self.process_group.run_stoppable(work, self.watch.heartbeat, self.watch.should_stop)

    def _gathered(self, found: dict[int, T]) -> list[T]:
        """Returns the values of the cases of all processes, in the order of the split."""
        every: list[T] = []
        for start in range(0, len(self.own.cases), CASES_AT_ONCE):
            part = range(start, min(start + CASES_AT_ONCE, len(self.own.cases)))
            values = {index: found[index] for index in part if index in found}
            merged = joined(gather(self.process_group, values))
            every += [merged[index] for index in part]
        return every


@dataclass(frozen=True)
class _PackedProbabilities:
    """Compressed probabilities, rounded to 1/65535; of two classes only those of class 1."""

    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, probabilities: Probabilities) -> "_PackedProbabilities":
        """Compresses probabilities (H, W, K)."""
        kept = probabilities[..., 1:] if probabilities.shape[-1] == 2 else probabilities
        rounded = np.rint(kept * np.float32(_FULL)).astype(np.uint16)
        return cls(rounded.shape, zlib.compress(rounded.tobytes(), 1))

    def unpack(self) -> Probabilities:
        """Returns probabilities (H, W, K), or (H, W, 1) of two classes."""
        rounded = np.frombuffer(zlib.decompress(self.data), np.uint16).reshape(self.shape)
        return rounded.astype(np.float32) / np.float32(_FULL)


def _without_ignored(
    truth: Ids, probabilities: Probabilities, ignore_id: int | None
) -> tuple[Ids, _PackedProbabilities]:
    """Returns truth and probabilities that have background at ignored pixels."""
    if ignore_id is not None and (ignored := truth == ignore_id).any():
        probabilities = np.where(ignored[..., np.newaxis], np.float32(0), probabilities)
        truth = without_ignored(truth, truth, ignore_id)[0]
    return truth, _PackedProbabilities.of(probabilities)


def _fit_classes(
    cases: _ValidationCases, names: Sequence[str], groups: Sequence[str]
) -> tuple[tuple[FittedClass, ...], Pair, Pair]:
    """Returns the fit of each class, and the terms of the foreground Dice before and after it."""
    thresholds = [DEFAULT_THRESHOLD] * len(names)
    selected: list[Selection] = []
    for class_id in range(1, len(names) + 1):

        def terms(
            truth: Ids, probabilities: Probabilities, class_id: int = class_id
        ) -> tuple[Values, Values]:
            return count_at_thresholds(truth, probabilities, thresholds, class_id).dice_terms()

        scores = concatenated(cases.measure(terms))
        if class_id == 1:  # while all thresholds are the defaults
            before = (
                scores.numerators[:, :, DEFAULT_INDEX],
                scores.denominators[:, :, DEFAULT_INDEX],
            )
        selected.append(select(scores, groups, DEFAULT_INDEX))
        thresholds[class_id - 1] = THRESHOLDS[selected[-1].index]

    def regions(truth: Ids, probabilities: Probabilities) -> list[CaseRegions]:
        ids = class_ids(probabilities, thresholds)
        return [CaseRegions.of(truth, ids, index + 1) for index in range(len(names))]

    found = cases.measure(regions)
    fitted, after = [], []
    for index, name in enumerate(names):
        sizes, terms_after = _fit_regions([each[index] for each in found], groups)
        threshold = _fitted_value(selected[index], THRESHOLDS)
        fitted.append(FittedClass(name=name, threshold=threshold, min_region=sizes))
        after.append(terms_after)
    numerators, denominators = (np.stack(each, axis=1) for each in zip(*after, strict=True))
    return tuple(fitted), before, (numerators, denominators)


def _fit_regions(regions: Sequence[CaseRegions], groups: Sequence[str]) -> tuple[FittedValue, Pair]:
    """Returns the smallest region of a class, and the terms of its Dice, (cases,) each."""
    limits = candidate_limits(regions)
    if len(limits) > _MAX_LIMITS:
        limits = limits[np.linspace(0, len(limits) - 1, _MAX_LIMITS).astype(int)]
    pairs = [each.dice_terms(limits) for each in regions]
    terms = [(dice[np.newaxis], defined[np.newaxis].astype(float)) for dice, defined in pairs]
    scores = concatenated(terms)
    selection = select(scores, groups, 0)
    index = selection.index
    after = scores.numerators[:, 0, index], scores.denominators[:, 0, index]
    return _fitted_value(selection, [float(each) for each in limits]), after


def _gain(after: Pair, before: Pair) -> float | None:
    dice, plain = ratio(*after), ratio(*before)
    return None if dice is None or plain is None else dice - plain


def _fitted_value(selection: Selection, candidates: Sequence[float]) -> FittedValue:
    return FittedValue(
        value=candidates[selection.index],
        best=candidates[selection.best],
        score_before=selection.score_before,
        score=selection.score,
        gain=selection.gain,
        low=selection.low,
        high=selection.high,
    )
