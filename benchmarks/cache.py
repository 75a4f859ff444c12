"""Measures how fast the shards of a dataset in a bucket are copied to the cache of a node.

    python benchmarks/cache.py [--num-shards 64] [--shard-mb 4] [--latency-ms 40] [--stream-mb-s 20]

The bucket is an emulator behind a proxy, in another process, which answers every request late and
paces each stream. One stream copies shard after shard; the package copies several at a time. Both
compute and compare the checksums. The kinds run in turns. `share_of_streams` compares the bytes per
second with those of the streams together, without the latency.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
from machine import describe_machine, shown, spread, write_result

from data_prep.shards.manifest import ShardInfo
from flexunet.progress import Progress, no_heartbeat
from flexunet.storage import crc32c_of, open_store
from job.data import downloads
from job.data.downloads import ShardCopies

PROJECT = Path(__file__).resolve().parents[1]
URL = "gs://test-bucket/dataset"


@click.command()
@click.option("--num-shards", default=64, show_default=True, help="Shards to copy.")
@click.option("--shard-mb", default=4.0, show_default=True, help="Size of a shard, MB.")
@click.option("--latency-ms", default=40.0, show_default=True, help="Delay of every answer.")
@click.option("--stream-mb-s", default=20.0, show_default=True, help="MB/s of each stream.")
@click.option("--repeats", default=3, show_default=True, help="Copies of each kind.")
def main(
    num_shards: int, shard_mb: float, latency_ms: float, stream_mb_s: float, repeats: int
) -> None:
    """Measure the copies of a remote dataset, print a table and write `results/cache.json`."""
    num_streams = downloads._NUM_STREAMS
    seconds: dict[str, list[float]] = {"one": [], "several": []}
    cpu_seconds: dict[str, list[float]] = {"one": [], "several": []}
    fault = {"delay_s": latency_ms / 1e3, "bytes_per_s": stream_mb_s * 1e6}
    with slow_bucket(**fault):
        shards = put_shards(num_shards, int(shard_mb * 1e6))
        for _ in range(repeats):
            for name, streams in (("one", 1), ("several", num_streams)):
                downloads._NUM_STREAMS = streams
                wall, cpu = copied(shards)
                seconds[name].append(wall)
                cpu_seconds[name].append(cpu)
    total_mb = num_shards * shard_mb
    faster = [a / b for a, b in zip(seconds["one"], seconds["several"], strict=True)]
    shares = [total_mb / each / (num_streams * stream_mb_s) for each in seconds["several"]]
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "num_shards": num_shards,
        "shard_mb": shard_mb,
        "latency_ms": latency_ms,
        "stream_mb_s": stream_mb_s,
        "num_streams": num_streams,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "cpu_seconds": {name: spread(values) for name, values in cpu_seconds.items()},
        "times_as_fast": spread(faster),
        "share_of_streams": spread(shares),
    }
    write_result("cache", result)
    print(
        f"{num_shards} shards of {shard_mb:g} MB, {latency_ms:g} ms, {stream_mb_s:g} MB/s a stream"
    )
    for name, values in seconds.items():
        print(f"{name:8} s {shown(values)}, CPU s {shown(cpu_seconds[name])}")
    print(f"{num_streams} streams: {shown(faster)} times as fast, "
          f"{shown(shares)} of {num_streams * stream_mb_s:g} MB/s")  # fmt: skip


@contextmanager
def slow_bucket(*, delay_s: float, bytes_per_s: float) -> Iterator[None]:
    """Sets STORAGE_EMULATOR_HOST to a bucket whose downloads are slow."""
    fault = {"action": "slow", "kinds": ["get"], "delay_s": delay_s, "bytes_per_s": bytes_per_s}
    command = [sys.executable, "-m", "tests.faults.proxy", "--fault", json.dumps(fault)]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            name, _, address = server.stdout.readline().strip().partition("=")
            os.environ[name] = address
            yield
        finally:
            server.terminate()


def put_shards(number: int, num_bytes: int) -> list[ShardInfo]:
    """Stores shards of random bytes in the bucket."""
    random, store = np.random.default_rng(0), open_store(URL)
    shards = []
    for index in range(number):
        name, data = f"train-{index:05d}-of-{number:05d}.tfrecord", random.bytes(num_bytes)
        store.put(name, data)
        shards.append(
            ShardInfo(
                name=name, split="train", num_records=1, num_bytes=num_bytes, crc32c=crc32c_of(data)
            )
        )
    return shards


def copied(shards: list[ShardInfo]) -> tuple[float, float]:
    """Returns wall and CPU seconds of copying `shards` to a new folder."""
    folder = tempfile.mkdtemp(prefix="flexunet-bench-")
    try:
        wall, cpu = time.perf_counter(), time.process_time()
        with Progress("cache", 1, shown=False) as bar:
            ShardCopies(open_store(URL), shards, folder).run(no_heartbeat, bar)
        return time.perf_counter() - wall, time.process_time() - cpu
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
