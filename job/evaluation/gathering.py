"""Runs the evaluation of all processes of a group; puts their results in the order of the split."""

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from flexunet.progress import Heartbeat
from job.distributed.process_group import ProcessGroup
from job.evaluation.case_file import CaseFile
from job.evaluation.case_measures import temperatures
from job.evaluation.example_cases import example_cases
from job.evaluation.rank_evaluation import RankEvaluation, RankResult, Watch
from job.metrics.calibration import Calibration
from job.metrics.confusion import Confusion, Counts
from job.metrics.per_case import SIZES, CaseMetrics
from job.metrics.thresholds import ThresholdSweep
from job.postprocessing.masks import Ids

T = TypeVar("T")

CASES_AT_ONCE = 256  # whose tallies the processes exchange together


@dataclass(frozen=True)
class Measured:
    """The measures of each case."""

    case_metrics: dict[str, list[CaseMetrics]]  # by size
    counts: Counts  # (cases, classes, 4) int64, of the measured masks
    plain_counts: Counts | None  # likewise, without postprocessing; None if that is the same
    sweep: ThresholdSweep  # at network size
    calibration: Calibration  # likewise
    confusion: Confusion  # likewise, of the measured masks
    masks: dict[int, Ids]  # predicted at network size, of the `example_cases`


def measure_together(
    own: RankEvaluation, process_group: ProcessGroup, watch: Watch, names: Sequence[str]
) -> tuple[list[list[Any]], Measured]:
    """Predicts and measures each case once, in one of the processes; all must call this function.

    Args:
        own: the part of this process.
        names: of the foreground classes.

    Returns:
        In all processes: for each batch the `ReplicaSums` of all replicas, and the measures.

    Raises:
        StoppedError: `watch.should_stop` returned True in one of the processes.
    """
    results: list[RankResult] = []
    with CaseFile() as file:

        def work(notify: Heartbeat, is_stopped: Callable[[], bool]) -> None:
            results.append(own.run(Watch(watch.shown, is_stopped, notify), file))

        process_group.run_stoppable(work, watch.heartbeat, watch.should_stop)
        parts = gather(process_group, results[0])
        cases = {index: case for each in parts for index, case in each.cases.items()}
        counts = np.stack([cases[index][1] for index in range(len(own.cases))])
        plain = [each for index in range(len(own.cases)) if (each := cases[index][2]) is not None]
        sweep = ThresholdSweep(names)
        calibration = Calibration(names, temperatures(own.measures.postprocessing))
        confusion = Confusion([each.name for each in own.dataset.manifest.classes])
        for start in range(0, len(cases), CASES_AT_ONCE):
            part = range(start, min(start + CASES_AT_ONCE, len(cases)))
            tallies = joined(gather(process_group, file.tallies(part)))
            for index in part:
                sweep.add(tallies[index].sweep)
                calibration.add(tallies[index].calibration)
                confusion.add(tallies[index].confusion)
        chosen = [index for _, index, _ in example_cases(counts)]
        masks = joined(gather(process_group, file.masks(chosen)))
    metrics = {size: [cases[index][0][size] for index in range(len(cases))] for size in SIZES}
    sums = [
        [replica for part in batch for replica in part]
        for batch in zip(*(each.sums for each in parts), strict=True)
    ]
    unpacked = {index: mask.unpack() for index, mask in masks.items()}
    plain_counts = np.stack(plain) if plain else None
    return sums, Measured(
        case_metrics=metrics,
        counts=counts,
        plain_counts=plain_counts,
        sweep=sweep,
        calibration=calibration,
        confusion=confusion,
        masks=unpacked,
    )


def gather(process_group: ProcessGroup, value: T) -> list[T]:
    """Returns `value` of all processes, by rank."""
    if process_group.size == 1:
        return [value]
    found = process_group.all_gather_bytes(pickle.dumps(value))
    # The processes of a run trust each other: they exchange its weights.
    return [pickle.loads(each) for each in found]  # noqa: S301


def joined(parts: Sequence[dict[int, T]]) -> dict[int, T]:
    """Returns the values of all processes by index."""
    return {index: value for part in parts for index, value in part.items()}
