"""Predicts and measures the cases of one process, each once.

The processes of a group share the cases. They exchange nothing until all are done, so that none
waits for another in between. Each process may measure in worker processes of its own.
"""

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flexunet.errors import StoppedError
from flexunet.process_pool import available_cores, in_order, open_pool
from flexunet.progress import Heartbeat, Progress
from job.data.cases import Case, read_case
from job.data.dataset import Dataset, Split
from job.data.pipeline import EpochPlan, distributed_batches
from job.data.reader import RecordReader
from job.data.sampling import global_batches
from job.evaluation.case_file import CaseFile
from job.evaluation.case_measures import CaseInput, CaseMeasures, CaseResult
from job.inference.sliding_window import Probabilities
from job.metrics.confusion import Counts
from job.metrics.per_case import CaseMetrics

_WORTH_S = 4.0  # measuring that takes longer here is given to worker processes
_NUM_TRIED = 3  # cases that are measured here before
_MAX_WAITING_BYTES = 2**28  # of the cases that wait for a worker process
_REMEDY = "close other programs or evaluate on a machine with more memory; the same command retries"


@dataclass(frozen=True)
class Watch:
    """Functions that long work calls.

    Attributes:
        shown: show the progress.
        should_stop: called after every batch and after every measured case.
        heartbeat: called for every measured case, and for every batch of windows of a case.
    """

    shown: bool
    should_stop: Callable[[], bool]
    heartbeat: Heartbeat

    def check_stop(self, work: str) -> None:
        """Calls `should_stop`.

        Raises:
            StoppedError: it returned True.
        """
        if self.should_stop():
            raise StoppedError(f"stopped {work}; the same command resumes")


@dataclass
class RankResult:
    """The results of one process.

    Attributes:
        sums: `ReplicaSums` of the replicas of this process, for each batch.
        cases: by index, the metrics of a case, its counts, and those without postprocessing.
    """

    sums: list[list[Any]] = field(default_factory=list)
    cases: dict[int, tuple[dict[str, CaseMetrics], Counts, Counts | None]] = field(
        default_factory=dict
    )


@dataclass(frozen=True)
class RankEvaluation:
    """The part of one process in the evaluation of a split.

    Attributes:
        step: `job.evaluation.steps.make_local_step`.
        predict: returns the probabilities of an image of any size; None: each sample is a case,
            and the step predicts it.
        first_replica: number of the first replica of this process.
        rank, num_processes: of the group.
        num_workers: processes that may measure for this process; 1: it measures alone.
    """

    dataset: Dataset
    split: Split
    reader: RecordReader
    cases: Sequence[Case]
    measures: CaseMeasures
    strategy: Any
    step: Callable[[Any], list[tuple[Any, Probabilities]]]
    predict: Callable[[np.ndarray, Heartbeat], Probabilities] | None
    batch_size: int
    first_replica: int = 0
    rank: int = 0
    num_processes: int = 1
    num_workers: int = 1

    def run(self, watch: Watch, file: CaseFile) -> RankResult:
        """Returns the sums and the metrics of this process; adds the other results to `file`.

        Raises:
            StoppedError: `watch.should_stop` returned True.
        """
        found = RankResult()
        if self.predict is not None:
            self._add_tiles(found, watch)
        inputs, number = self.predicted(found, watch)
        title = f"evaluate {self.split.name}{self._rank_words()}"
        results = measure_all(inputs, self.measures, number, self.num_workers)
        with (
            contextlib.closing(results),
            Progress(title, number, unit="cases", shown=watch.shown) as bar,
        ):
            for result in bar.tracked(results):
                file.add(result.index, result.tallies, result.mask)
                found.cases[result.index] = result.metrics, result.counts, result.plain_counts
                watch.heartbeat()
                watch.check_stop(f"evaluating {self.split.name}")
        return found

    def predicted(self, found: RankResult, watch: Watch) -> tuple[Iterator[CaseInput], int]:
        """Returns the predicted cases of this process, and their number.

        Each case goes through the network once. Adds the sums of whole samples to `found`.
        """
        if self.predict is not None:
            return self._predicted_in_windows(watch), len(self._own_cases())
        return self._predicted_in_batches(found, watch), self._num_samples()

    def _rank_words(self) -> str:
        if self.num_processes == 1:
            return ""
        return f", rank {self.rank} of {self.num_processes}"

    def _own_cases(self) -> Sequence[int]:
        return range(self.rank, len(self.cases), self.num_processes)

    def _num_samples(self) -> int:
        """Returns how many samples this process predicts in batches."""
        return sum(len(numbers) for batch in self._sample_numbers() for numbers in batch)

    def _sample_numbers(self) -> Iterator[list[range]]:
        """Yields the samples of each replica of this process, for each batch; without padding."""
        num_local = len(self.strategy.extended.worker_devices)
        size = self.batch_size // self.strategy.num_replicas_in_sync
        for start in range(0, len(self.split), self.batch_size):
            begins = (start + (self.first_replica + i) * size for i in range(num_local))
            yield [range(begin, min(begin + size, len(self.split))) for begin in begins]

    def _batches(self) -> Iterator[Any]:
        plan = global_batches(np.arange(len(self.split)), self.batch_size)
        return distributed_batches(
            self.strategy,
            self.dataset,
            self.reader,
            EpochPlan(plan, seed=0, epoch=0),
            first_replica=self.first_replica,
        )

    def _add_tiles(self, found: RankResult, watch: Watch) -> None:
        """Adds the sums of the samples, which are tiles of cases."""
        title = f"loss of {self.split.name}{self._rank_words()}"
        num_batches = -(-len(self.split) // self.batch_size)
        with Progress(title, num_batches, unit="batches", shown=watch.shown) as bar:
            for batch in bar.tracked(self._batches()):
                found.sums.append([sums for sums, _ in self.step(batch)])
                watch.heartbeat()
                watch.check_stop(f"evaluating {self.split.name}")

    def _predicted_in_batches(self, found: RankResult, watch: Watch) -> Iterator[CaseInput]:
        """Yields the cases of this process; adds the sums of each batch to `found`."""
        local_results = self.strategy.experimental_local_results
        for batch, numbers in zip(self._batches(), self._sample_numbers(), strict=True):
            of_replicas = self.step(batch)
            found.sums.append([sums for sums, _ in of_replicas])
            masks = [each.numpy() for each in local_results(batch["mask"])]
            for truths, (_, probabilities), samples in zip(
                masks, of_replicas, numbers, strict=True
            ):
                for row, index in enumerate(samples):
                    # Not a view: the batch would stay in memory as long as one of its cases.
                    yield self._input(index, truths[row], probabilities[row].copy())
            watch.heartbeat()
            watch.check_stop(f"evaluating {self.split.name}")

    def _predicted_in_windows(self, watch: Watch) -> Iterator[CaseInput]:
        assert self.predict is not None  # noqa: S101 - only called where it is set
        order = [each for index in self._own_cases() for each in self.cases[index].samples]
        self.reader.expect(np.array(order, np.int64))
        for index in self._own_cases():
            image, truth = read_case(self.reader, self.cases[index])
            yield self._input(index, truth, self.predict(image, watch.heartbeat))

    def _input(self, index: int, truth: np.ndarray, probabilities: np.ndarray) -> CaseInput:
        case = self.cases[index]
        return CaseInput(index, case.geometry, case.spacing, truth, probabilities)


def measure_all(
    inputs: Iterator[CaseInput], measures: CaseMeasures, number: int, num_workers: int
) -> Generator[CaseResult, None, None]:
    """Yields the measures of each of `inputs`, in their order.

    Measures here first; worker processes continue if there is much left to do.

    Args:
        number: of the inputs.

    Raises:
        FlexUNetError: a worker process was killed.
    """
    durations = []
    for count, case in enumerate(inputs, start=1):
        started = time.perf_counter()
        result = measures.measure(case)
        durations.append(time.perf_counter() - started)
        yield result
        # The median of the last few: the first case loads libraries.
        usual_s = statistics.median(durations[-3:])
        if num_workers > 1 and count >= _NUM_TRIED and usual_s * (number - count) > _WORTH_S:
            break
    following = next(inputs, None)
    if following is None:
        return
    size = following.truth.nbytes + following.probabilities.nbytes
    num_waiting = max(1, min(2 * num_workers, _MAX_WAITING_BYTES // size))
    with open_pool(num_workers) as executor:
        tasks = itertools.chain([following], inputs)
        yield from in_order(
            executor, measures.measure, tasks, num_waiting=num_waiting, remedy=_REMEDY
        )


def workers_for(threads: int, num_processes: int) -> int:
    """Returns how many processes may measure for one process of a group.

    Args:
        threads: that the process may use; 0: one per core.
        num_processes: of the group, which may all be on this machine.
    """
    return max(1, (threads or available_cores()) // num_processes)
