"""Measures `prep` from bucket to bucket when each request takes a while.

    python benchmarks/bucket.py [--num-images 2000] [--delay-ms 40] [--checkout FOLDER]

A proxy (`tests/faults/proxy.py`) in front of a bucket emulator answers each request late, and lists
them. plain: threads that only download the files of the source, one or 16 at once. first: the whole
command, with the start of the program and its processes. again: the same command, which finds the
finished dataset. Proxy and emulator need CPU time of the same machine; if it is busy, they answer
later than asked for. So compare with plain, which they slow down too.
"""

import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
import psutil
from machine import describe_machine, watched_memory, write_result

from flexunet.process_pool import MAX_REQUESTS
from flexunet.storage import open_store

PROJECT = Path(__file__).parents[1]
SOURCE, OUTPUT = "gs://test-bucket/source", "gs://test-bucket/output"
_NUM_SINGLE = 60  # downloads one at a time suffice to measure


@click.command()
@click.option("--num-images", default=2000, show_default=True, help="Pairs of the source.")
@click.option("--image-size", default=64, show_default=True, help="Side of the images, pixels.")
@click.option("--delay-ms", default=40.0, show_default=True, help="Delay of each answer.")
@click.option("--num-processes", default=2, show_default=True, help="Processes of prep.")
@click.option("--num-plain", default=400, show_default=True, help="Downloads of plain.")
@click.option("--checkout", default=str(PROJECT), help="Folder of the version to measure.")
def main(num_images: int, image_size: int, num_plain: int, checkout: str, **options: Any) -> None:
    """Measure prep on a slow bucket, print a table and write `results/bucket.json`.

    The rate of plain is measured before and after the first run, as the machine may be busy.
    """
    with served(options["delay_ms"] / 1e3) as proxy:
        names = upload(num_images, image_size)
        files = names[:num_plain]
        one = requests_per_s(files[:_NUM_SINGLE], 1)
        before = requests_per_s(files, MAX_REQUESTS)
        requests_since(proxy)
        command = [sys.executable, "-m", "data_prep", SOURCE, OUTPUT, f"--image-size={image_size}"]
        command.append(f"--num-processes={options['num_processes']}")
        first = run_prep(command, checkout, proxy)
        after = requests_per_s(files, MAX_REQUESTS)
        requests_since(proxy)
        again = run_prep(command, checkout, proxy)
    plain_s = first["requests"] * statistics.mean((1 / before, 1 / after))
    result = {
        "machine": describe_machine(),
        "num_images": num_images,
        "image_size": image_size,
        **options,
        "plain_requests_per_s": {
            "1_at_once": {"before": one},
            f"{MAX_REQUESTS}_at_once": {"before": before, "after": after},
        },
        "prep": {"first": first, "again": again},
        "first_over_plain": first["wall_s"] / plain_s,
    }
    write_result("bucket", result)
    print_table(result)


@contextmanager
def served(delay_s: float) -> Iterator[subprocess.Popen[str]]:
    """Yields a proxy in its own process; this process and its children send requests to it."""
    fault = {"action": "stall-answer", "seconds": delay_s}
    command = [sys.executable, "-m", "tests.faults.proxy", "--fault", json.dumps(fault)]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as proxy:
        assert proxy.stdout is not None
        name, _, address = proxy.stdout.readline().strip().partition("=")
        os.environ[name] = address
        try:
            yield proxy
        finally:
            proxy.terminate()


def requests_since(proxy: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """Returns the requests to the proxy since the last call."""
    proxy.send_signal(signal.SIGUSR2)
    assert proxy.stdout is not None
    found: list[dict[str, Any]] = json.loads(proxy.stdout.readline())
    return found


def upload(num_images: int, size: int) -> list[str]:
    """Stores pairs of a noisy image and a mask with a square; returns the names of the files."""
    store, random = open_store(SOURCE), np.random.default_rng(1)
    files = {}
    for i in range(num_images):
        image = random.integers(0, 256, (size, size), dtype=np.uint8)
        mask = np.zeros((size, size), np.uint8)
        mask[size // 4 : size // 2, size // 4 : size // 2] = 255
        for folder, pixels in (("images", image), ("masks", mask)):
            files[f"{folder}/case-{i:05d}.png"] = cv2.imencode(".png", pixels)[1].tobytes()
    with ThreadPoolExecutor(MAX_REQUESTS) as threads:
        list(threads.map(store.put, files, files.values()))
    return list(files)


def requests_per_s(names: list[str], num_threads: int) -> float:
    """Returns the rate of `num_threads` threads that download the files `names`."""
    store = open_store(SOURCE)
    with ThreadPoolExecutor(num_threads) as threads:
        list(threads.map(store.get, names[:num_threads]))  # opens the connections
        started = time.perf_counter()
        list(threads.map(store.get, names))
        return len(names) / (time.perf_counter() - started)


def run_prep(command: list[str], checkout: str, proxy: subprocess.Popen[str]) -> dict[str, Any]:
    """Runs `command` with the code of `checkout`; returns its time, memory and requests."""
    environment = os.environ | {"PYTHONPATH": checkout}
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with subprocess.Popen(
        command, cwd=checkout, env=environment, stdout=subprocess.DEVNULL
    ) as process:
        with watched_memory(lambda: tree_of(process.pid)) as peak_bytes:
            exit_code = process.wait()
        wall_s = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if exit_code:
        raise SystemExit(f"prep ended with exit code {exit_code}")
    found = requests_since(proxy)
    downloads = [e for e in found if e["kind"] == "get" and e["name"].startswith("source/")]
    return {
        "wall_s": wall_s,
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_rss_mb": peak_bytes[0] / 1e6,
        "requests": len(found),
        "of_kind": dict(Counter(each["kind"] for each in found)),
        "source_downloads": len(downloads),
    }


def tree_of(process_id: int) -> list[psutil.Process]:
    """Returns a process and all that it started."""
    top = psutil.Process(process_id)
    return [top, *top.children(recursive=True)]


def print_table(result: dict[str, Any]) -> None:
    """Prints `result` with the machine."""
    machine = result["machine"]
    print(f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_at_the_end'][0]}")
    print(f"{result['num_images']} pairs, {result['delay_ms']:g} ms a request")
    for name, rates in result["plain_requests_per_s"].items():
        shown = ", ".join(f"{rate:.1f} {when}" for when, rate in rates.items())
        print(f"plain, {name.replace('_', ' '):12} {shown} requests/s")
    for name, each in result["prep"].items():
        kinds = ", ".join(f"{count} {kind}" for kind, count in each["of_kind"].items())
        print(
            f"prep, {name:12} {each['wall_s']:7.1f} s, {each['cpu_s']:.1f} CPU s, "
            f"{each['requests']} requests ({kinds}), "
            f"{each['source_downloads']} downloads of source files, "
            f"peak memory of a process {each['peak_rss_mb']:.0f} MB"
        )
    print(f"first / the time of as many requests, 16 at once: {result['first_over_plain']:.2f}")


if __name__ == "__main__":
    main()
