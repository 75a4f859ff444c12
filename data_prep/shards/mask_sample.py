"""Reads statistics of a sample of the mask files of a source.

A few files are read, spread over the source. More are read as long as hardly any of them has
foreground, and all of them if the sample leaves their meaning open.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from data_prep.masks.statistics import MaskStatistics, read_statistics
from data_prep.shards.encode import one_thread
from data_prep.shards.pair_reader import read_file
from data_prep.shards.source_pairs import File, SourcePair
from flexunet.errors import ContentError
from flexunet.process_pool import Workers, in_order_ahead, request_threads

NUM_SAMPLED = 32  # files
_MIN_FILLED = 4  # files with foreground, if there are so many
_MAX_SAMPLED = 512  # files, unless none of them has foreground
_MAX_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True)
class SampleTask:
    """The files that one worker reads.

    Attributes:
        max_pixels: larger masks are left out.
        num_requests: requests at once; 1: one file after the other, in the same thread.
    """

    files: tuple[File, ...]
    max_pixels: int
    num_requests: int


Run = Callable[[Sequence[SampleTask], int], Iterable[MaskStatistics]]
"""Runs `statistics_of_files` on tasks with this number of files, and shows the progress."""


def read_samples(
    items: Sequence[SourcePair], workers: Workers, task: SampleTask, read_rest: Run
) -> Iterator[MaskStatistics]:
    """Yields the statistics of a sample of the masks of `items`, and then of all masks.

    Files that cannot be read are left out; the first pass of `prep` reports them.

    Args:
        task: without files.
        read_rest: reads the masks that are not in the sample.

    Raises:
        StorageError: a file cannot be read from storage.
    """
    total = MaskStatistics()
    files = [file for item in items for file in item.masks]
    samples = _samples(files)
    for sample in samples:
        number = max(1, min(workers.num_workers(), len(sample) // 4))
        tasks = [dataclasses.replace(task, files=tuple(sample[i::number])) for i in range(number)]
        total = sum(workers.in_order(statistics_of_files, tasks), total)
        if is_enough(total):
            break
    yield total
    rest = [file for sample in samples for file in sample]
    if rest:
        tasks = [
            dataclasses.replace(task, files=tuple(rest[start : start + NUM_SAMPLED]))
            for start in range(0, len(rest), NUM_SAMPLED)
        ]
        yield sum(read_rest(tasks, len(rest)), total)


def statistics_of_files(task: SampleTask) -> MaskStatistics:
    """Returns the statistics of the readable files of a task."""
    total = MaskStatistics()
    with one_thread(), request_threads(task.num_requests) as reader:
        read = in_order_ahead(reader, read_file, task.files, size_of=lambda file: file.size)
        for file, data in zip(task.files, read, strict=True):
            try:
                total += read_statistics(data, name=file.name, max_pixels=task.max_pixels)
            except ContentError:
                continue
    return total


def is_enough(masks: MaskStatistics) -> bool:
    """Returns whether several masks have foreground, or one of many has."""
    num_filled = masks.num_files - masks.num_empty
    return num_filled >= _MIN_FILLED or (num_filled > 0 and masks.num_files >= _MAX_SAMPLED)


def _samples(files: Sequence[File]) -> Iterator[list[File]]:
    """Yields all files in samples that grow, each spread over the files that are left."""
    left = list(files)
    number = NUM_SAMPLED
    while left:
        count = min(number, len(left))
        chosen = set(np.linspace(0, len(left) - 1, count).round().astype(int).tolist())
        yield [left[i] for i in sorted(chosen)]
        left = [file for i, file in enumerate(left) if i not in chosen]
        number = min(2 * number, _MAX_AT_ONCE)
