"""Cases that several processes measure: exchanges, stops, worker processes, files."""

import multiprocessing
import os
import pickle
import resource
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from data_prep.imaging.geometry import Geometry
from flexunet.errors import FlexUNetError, StoppedError, StorageError
from job.data.shard_cache import open_reader
from job.distributed import process_group
from job.distributed.process_group import ProcessGroup, StopPoll
from job.distributed.rendezvous import ProcessSpec
from job.evaluation import case_file, rank_evaluation
from job.evaluation.artifacts import draw_examples
from job.evaluation.case_file import CaseFile
from job.evaluation.case_measures import CaseInput, CaseMeasures, PackedMask
from job.evaluation.evaluator import make_evaluator
from job.evaluation.pipeline import dataset_of
from job.evaluation.rank_evaluation import measure_all
from job.metrics.batch import confusion_counts
from job.metrics.confusion import count_pixels
from job.models.ensemble import network_of
from job.runs.loading import load_model, open_run

T = TypeVar("T")


class Peer(ProcessGroup):
    """A process that is a thread here: the sums are real, without a collective."""

    def __init__(self, rank: int, peers: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(None, ProcessSpec(rank, ("a:1", "b:1")))
        self.peers, self.barrier = peers, barrier

    def _sum(self, values: np.ndarray) -> np.ndarray:
        self.peers[self.rank] = values
        self.barrier.wait(20)
        total: np.ndarray = self.peers[0] + self.peers[1]
        self.barrier.wait(20)
        return total


def in_both(work: Callable[[ProcessGroup], T]) -> list[T]:
    """Returns what `work` returns in each of two processes of a group."""
    peers: list[Any] = [None, None]
    barrier = threading.Barrier(2)
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(lambda rank: work(Peer(rank, peers, barrier)), range(2)))


def test_a_group_gathers_bytes_of_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "_PIECE_BYTES", 1024)
    for lengths in ((0, 0), (1, 0), (0, 5000), (1024, 1024), (3000, 7)):
        sent = [os.urandom(length) for length in lengths]
        for found in in_both(lambda group, sent=sent: group.all_gather_bytes(sent[group.rank])):
            assert found == sent


def test_a_stop_request_of_one_process_ends_the_work_of_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process_group, "_LOOK_S", 0.05)
    asks, beats = [0, 0], [0, 0]

    def work_in(group: ProcessGroup) -> str:
        def beat() -> None:
            beats[group.rank] += 1

        def asked() -> bool:
            asks[group.rank] += 1
            return group.rank == 1 and asks[1] > 2

        def work(notify: Callable[[], None], is_stopped: Callable[[], bool]) -> None:
            for _ in range(400 if group.rank == 0 else 2):  # process 1 is done early
                time.sleep(0.01)
                notify()
                if is_stopped():
                    raise StoppedError("stopped")

        try:
            group.run_stoppable(work, beat, asked)
        except StoppedError as error:
            return str(error)
        return "not stopped"

    assert in_both(work_in) == ["stopped", "stopped"]
    assert beats[1] > 2  # while the other one still makes progress
    assert max(asks) < 50  # not after each bit of progress


@pytest.mark.parametrize(("seconds", "most"), [(0.0, 12), (0.3, 40)])
def test_processes_ask_each_other_about_once_a_second(
    monkeypatch: pytest.MonkeyPatch, seconds: float, most: int
) -> None:
    clock = [100.0, 100.0]
    monkeypatch.setattr(process_group.time, "monotonic", lambda: clock[0])

    def stopped_after(group: ProcessGroup, request: int | None) -> tuple[list[int], int]:
        """Returns the batches after which this process stops, and how often it asked."""
        asked, num_asked = [], 0
        add = group.add

        def counted_add(values: Any) -> list[int]:
            nonlocal num_asked
            num_asked += 1
            return add(values)

        monkeypatch.setattr(group, "add", counted_add)
        batch = 0
        poll = StopPoll(group, lambda: group.rank == 1 and batch == request, 100)
        for batch in range(1, 101):
            if group.rank == 0:
                clock[0] += seconds
            if poll():
                asked.append(batch)
                break
        return asked, num_asked

    for request in (None, 1, 50, 99, 100):
        (first, num_asked), (second, _) = in_both(
            lambda g, request=request: stopped_after(g, request)
        )
        assert first == second
        assert num_asked <= most
        if request is None:
            assert first == []
        else:  # also of the last batch: a request is never lost
            assert request <= first[0] <= min(100, request + (64 if seconds == 0 else 4))


def some_case(index: int, seed: int = 0) -> CaseInput:
    random = np.random.default_rng(seed + index)
    probabilities = random.random((24, 24, 3)).astype(np.float32)
    truth = random.integers(0, 3, (24, 24)).astype(np.uint8)
    return CaseInput(index, Geometry("stretch", 48, 36, 0, 0, 24, 24), None, truth, probabilities)


@pytest.mark.cluster
def test_worker_processes_measure_the_same_in_the_same_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cases = [some_case(index) for index in range(12)]
    alone = list(measure_all(iter(cases), CaseMeasures(3, None), len(cases), 1))
    monkeypatch.setattr(rank_evaluation, "_WORTH_S", 0.0)
    shared = list(measure_all(iter(cases), CaseMeasures(3, None), len(cases), 2))
    assert [each.index for each in shared] == list(range(12))
    assert pickle.dumps(shared[-1].metrics) == pickle.dumps(alone[-1].metrics)
    for ours, theirs in zip(shared, alone, strict=True):
        assert ours.metrics == theirs.metrics
        assert np.array_equal(ours.counts, theirs.counts)
        assert np.array_equal(ours.mask.unpack(), theirs.mask.unpack())
        assert np.array_equal(ours.tallies.sweep.tp, theirs.tallies.sweep.tp)


@pytest.mark.cluster
def test_a_killed_worker_process_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_evaluation, "_WORTH_S", 0.0)
    others = set(multiprocessing.active_children())  # of earlier tests in this process

    def workers() -> list[multiprocessing.process.BaseProcess]:
        return [each for each in multiprocessing.active_children() if each not in others]

    def cases() -> Iterator[CaseInput]:
        for index in range(40):
            if index == 10:
                workers()[0].kill()
            yield some_case(index)

    with pytest.raises(FlexUNetError, match=r"killed.*the same command retries"):
        list(measure_all(cases(), CaseMeasures(3, None), 40, 2))
    assert workers() == []


@given(
    seed=st.integers(0, 2**32 - 1),
    num_classes=st.integers(1, 4),
    ignore_id=st.sampled_from([None, 255]),
)
def test_pixels_are_counted_as_on_a_device(
    seed: int, num_classes: int, ignore_id: int | None
) -> None:
    random = np.random.default_rng(seed)
    ids = np.array([*range(max(num_classes, 2)), ignore_id or 0], np.uint8)
    truth, prediction = random.choice(ids, (5, 7)), random.choice(ids[:-1], (5, 7))
    expected = confusion_counts(truth[None], prediction[None], num_classes, ignore_id)[0]
    assert np.array_equal(count_pixels(truth, prediction, num_classes, ignore_id), expected)


def test_results_of_cases_are_kept_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case_file, "_MAX_BYTES", 1000)
    results = [CaseMeasures(3, None).measure(some_case(index)) for index in range(3)]
    with CaseFile() as file:
        for each in reversed(results):
            file.add(each.index, each.tallies, each.mask)
        assert np.array_equal(file.masks([1, 7])[1].unpack(), results[1].mask.unpack())
        assert np.array_equal(file.tallies([2])[2].sweep.fn, results[2].tallies.sweep.fn)
        assert file.tallies([7]) == {}


def test_a_full_temporary_folder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case_file, "_MAX_BYTES", 1000)
    tallies = CaseMeasures(3, None).measure(some_case(0)).tallies
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with CaseFile() as file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
        try:
            with pytest.raises(StorageError, match=r"cannot store the results.*TMPDIR"):
                for index in range(100):
                    file.add(index, tallies, PackedMask((1, 1), b"x"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_each_case_goes_through_the_network_once(trained_run: Path) -> None:
    run = open_run(str(trained_run))
    dataset = dataset_of(run, None)
    network = network_of([load_model(run, which="best")[0]])
    num_images = 0

    def count(images: Any) -> None:
        nonlocal num_images
        num_images += images.shape[0]

    def watched(images: tf.Tensor) -> tf.Tensor:
        tf.py_function(count, [images], [])
        return network(images)

    config = run.config.model_copy(update={"global_batch_size": 2})
    device = tf.distribute.OneDeviceStrategy("CPU:0")
    evaluator = make_evaluator(config, device, dataset, watched)
    reader = open_reader(dataset, dataset.split("test"), cache="full", cache_dir=None)
    evaluation = evaluator.evaluate("test", reader, measured=True)
    assert len(draw_examples(evaluator, evaluation, reader)) == 2 * len(evaluation.cases)
    assert num_images == len(evaluation.cases) == 4
