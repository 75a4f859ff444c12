"""Measures training input from a bucket if a node keeps only some records, against all records.

    python benchmarks/records.py [--num-images 200] [--latency-ms 40] [--stream-mb-s 20]

The bucket is that of `cache.py`. A step waits for a batch and then sleeps, as for an accelerator.
`all` has copied every shard (`--cache full`). The other kinds keep a share of the bytes
(`--cache-size`) or nothing (`--cache ranges`), and read the rest ahead; `one at a time` keeps
nothing and reads each record when it is needed. An epoch fills the cache first. Then all kinds run
an epoch in turns; `over_all` is their images/s over those of `all` in the same turn.
"""

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from cache import URL, slow_bucket
from input import prepare_phantoms
from machine import describe_machine, shown, spread, write_result

from flexunet.storage import open_store
from job.config import TrainConfig
from job.data.dataset import Dataset, open_dataset
from job.data.pipeline import EpochPlan, distributed_batches, one_ahead
from job.data.reader import RecordReader
from job.data.record_cache import RemoteRecords
from job.data.sampling import global_batches, sample_order
from job.data.shard_cache import CacheOptions, open_readers

GIB = 2**30


class Impatient(RecordReader):
    """Reads nothing ahead."""

    def expect(self, indices: np.ndarray) -> None:
        """Ignores the order."""


@click.command()
@click.option("--num-images", default=200, show_default=True, help="Phantoms to generate.")
@click.option("--image-size", default=256, show_default=True, help="Side of the images, pixels.")
@click.option("--batch-size", default=8, show_default=True, help="Images per step.")
@click.option("--step-ms", default=100.0, show_default=True, help="Duration of a step.")
@click.option("--latency-ms", default=40.0, show_default=True, help="Delay of every answer.")
@click.option("--stream-mb-s", default=20.0, show_default=True, help="MB/s of each stream.")
@click.option("--repeats", default=3, show_default=True, help="Measured epochs of each kind.")
def main(
    num_images: int, image_size: int, batch_size: int, step_ms: float, latency_ms: float,
    stream_mb_s: float, repeats: int,
) -> None:  # fmt: skip
    """Measure the input from a bucket, print a table and write `results/records.json`."""
    from job.distributed.strategy import configure

    strategy = configure(TrainConfig(global_batch_size=batch_size))
    work = tempfile.mkdtemp(prefix="flexunet-bench-")
    try:
        with slow_bucket(delay_s=latency_ms / 1e3, bytes_per_s=stream_mb_s * 1e6):
            dataset = put_phantoms(work, num_images, image_size)
            readers = readers_of(dataset, work)
            rates: dict[str, list[float]] = {name: [] for name in readers}
            for epoch in range(1 + repeats):
                for name, reader in readers.items():
                    rate = images_per_s(strategy, dataset, reader, epoch, batch_size, step_ms)
                    if epoch:  # the first one fills the cache
                        rates[name].append(rate)
    finally:
        shutil.rmtree(work)
    over_all = {
        name: [a / b for a, b in zip(values, rates["all"], strict=True)]
        for name, values in rates.items()
    }
    lengths = dataset.split("train").lengths
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "num_images": len(lengths),
        "mean_record_kb": float(lengths.mean() / 1e3),
        "batch_size": batch_size,
        "step_ms": step_ms,
        "latency_ms": latency_ms,
        "stream_mb_s": stream_mb_s,
        "images_per_s": {name: spread(values) for name, values in rates.items()},
        "over_all": {name: spread(values) for name, values in over_all.items()},
    }
    write_result("records", result)
    print(f"{len(lengths)} records of {lengths.mean() / 1e3:.0f} kB, steps of {batch_size} images "
          f"and {step_ms:g} ms, {latency_ms:g} ms, {stream_mb_s:g} MB/s a stream")  # fmt: skip
    for name, values in rates.items():
        print(f"{name:14} images/s {shown(values, 1)}, over all {shown(over_all[name])}")


def put_phantoms(work: str, num_images: int, image_size: int) -> Dataset:
    """Returns a dataset of phantoms in the bucket."""
    source, target = open_store(prepare_phantoms(work, num_images, image_size).url), open_store(URL)
    for stat in source.list():
        target.put(stat.name, source.get(stat.name))
    return open_dataset(URL)


def readers_of(dataset: Dataset, work: str) -> dict[str, RecordReader]:
    """Returns the readers by the share of the bytes that they keep."""
    split = dataset.split("train")
    shares = {"half": 0.5, "a tenth": 0.1}
    options = {
        "all": CacheOptions("full", f"{work}/all", progress=False),
        "nothing": CacheOptions("ranges", None),
    }
    for name, share in shares.items():
        size = share * float(split.lengths.sum()) / GIB
        options[name] = CacheOptions("full", str(Path(work) / name), size, progress=False)
    readers = {
        name: open_readers(dataset, {"train": split}, options[name])["train"]
        for name in ("all", "half", "a tenth", "nothing")
    }
    store = open_store(URL)
    return readers | {
        "one at a time": Impatient(store, split, RemoteRecords(store, None), channels=1)
    }


def images_per_s(
    strategy: Any, dataset: Dataset, reader: RecordReader, epoch: int, batch_size: int,
    step_ms: float,
) -> float:  # fmt: skip
    """Returns the images per second of an epoch, without those of its first step."""
    order = sample_order(len(dataset.split("train")), seed=0, epoch=epoch, version=2)
    plan = EpochPlan(global_batches(order, batch_size), 0, epoch)
    begin, num_steps = 0.0, -1
    for _ in one_ahead(distributed_batches(strategy, dataset, reader, plan)):
        begin = begin or time.perf_counter()
        num_steps += 1
        time.sleep(step_ms / 1e3)
    seconds = time.perf_counter() - begin - step_ms / 1e3
    return num_steps * batch_size / seconds


if __name__ == "__main__":
    main()
