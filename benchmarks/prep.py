"""Compares `prep` and `inspect` with plain decoding and encoding of the same files, in images/s.

    python benchmarks/prep.py [--source FOLDER] [--num-images 600] [--image-size 512]

plain: one process reads both files of each pair, decodes them, encodes the pixels as PNG again with
the same codec, and keeps nothing: the minimum of any preparation. prep: the whole command, from
pairing to report and commit, without the start of the program. inspect: the whole command with its
contact sheet, without the start of the program. Runs alternate, so that a busy
machine affects all alike; ratios compare neighbouring runs.
"""

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import click
import psutil
from machine import describe_machine, spread, watched_memory, write_result

from data_prep.config import PrepConfig
from data_prep.imaging.codecs import encode_png, read_image, read_mask_pixels
from data_prep.inspection.config import InspectConfig
from data_prep.inspection.pipeline import inspect_source
from data_prep.phantoms.images import write_phantoms
from data_prep.pipeline import prepare
from data_prep.sources.pairs import Pair, Source, find_pairs, find_sources
from flexunet.process_pool import OpenWorkers, Workers, in_order, open_pool
from flexunet.storage import open_store

Sources = tuple[Source, ...]


@click.command()
@click.option("--source", help="Folder with images/ and masks/; none: phantoms.")
@click.option("--num-images", default=600, show_default=True, help="Phantoms to generate.")
@click.option("--image-size", default=512, show_default=True, help="Side of the images, pixels.")
@click.option("--repeats", default=5, show_default=True, help="Runs of each kind.")
def main(source: str | None, num_images: int, image_size: int, repeats: int) -> None:
    """Measure prep, print a table and write `results/prep.json`."""
    with tempfile.TemporaryDirectory() as work:
        folder = source or f"{work}/source"
        if source is None:
            write_phantoms(folder, num_images, image_size, 1)
        result = {"machine": describe_machine()}
        result |= measure_rates(folder, work, image_size, repeats)
        if source is None:
            result["peak_worker_rss_mb"] = measure_memory(work, num_images // 4, image_size)
    write_result("prep", result)
    print_table(result)


def measure_rates(source: str, work: str, size: int, repeats: int) -> dict[str, Any]:
    """Returns the images/s of each kind of run, CPU times, and ratios of neighbouring runs."""
    from prep import run_plain  # by a name that workers know: they do not run this script again

    sources = find_sources(source)
    pairs = find_pairs(sources)[0]
    halves = [pairs[0::2], pairs[1::2]]
    output = f"{work}/output"
    run_prep(sources, output, size)  # imports matplotlib and pyarrow
    shutil.rmtree(output)
    with open_pool(2) as pool:
        list(in_order(pool, run_plain, [half[:4] for half in halves], num_waiting=2))
        runs: dict[str, Callable[[], object]] = {
            "plain_1": lambda: run_plain(pairs),
            "prep_1": lambda: run_prep(sources, output, size),
            "plain_2": lambda: list(in_order(pool, run_plain, halves, num_waiting=2)),
            "prep_2": lambda: run_prep(sources, output, size, pool),
            "inspect_1": lambda: run_inspect(source),
            "inspect_2": lambda: run_inspect(source, pool),
        }
        rates: dict[str, list[float]] = {name: [] for name in runs}
        cpu_ms: dict[str, list[float]] = {name: [] for name in ("plain_1", "prep_1", "inspect_1")}
        for _ in range(repeats):
            for name, run in runs.items():
                started, cpu_started = time.perf_counter(), time.process_time()
                run()
                rates[name].append(len(pairs) / (time.perf_counter() - started))
                if name in cpu_ms:
                    spent_s = time.process_time() - cpu_started
                    cpu_ms[name].append(1e3 * spent_s / len(pairs))
                shutil.rmtree(output, ignore_errors=True)
    return {
        "num_images": len(pairs),
        "image_size": size,
        "images_per_s": {name: spread(values) for name, values in rates.items()},
        "cpu_ms_per_image": {name: spread(values) for name, values in cpu_ms.items()},
        "ratios": {
            f"{first} / {second}": spread(
                [a / b for a, b in zip(rates[first], rates[second], strict=True)]
            )
            for first, second in (
                ("prep_1", "plain_1"), ("prep_2", "plain_2"),
                ("prep_2", "prep_1"), ("plain_2", "plain_1"),
                ("inspect_1", "prep_1"), ("inspect_2", "inspect_1"),
            )
        },
    }  # fmt: skip


def measure_memory(work: str, num_images: int, size: int) -> dict[str, float]:
    """Returns the peak resident memory of one of two workers, MB, for N and for 4 N images.

    Shards are small, so that both runs write several: a worker keeps one shard in memory.
    """
    peaks = {}
    for number in (num_images, 4 * num_images):
        source = f"{work}/memory-{number}"
        write_phantoms(source, number, size, 2)
        with open_pool(2) as pool, watched_memory(psutil.Process().children) as peak_bytes:
            config = PrepConfig(image_size=size, num_processes=2, shard_size=2.0)
            found = find_sources(source)
            workers = two_workers(pool)
            prepare(found, f"{source}-output", config, open_workers=workers, progress=False)
        peaks[str(number)] = peak_bytes[0] / 1e6
    return peaks


def run_plain(pairs: list[Pair]) -> None:
    """Decodes and encodes every pair."""
    import cv2

    cv2.setNumThreads(1)
    for pair in pairs:
        image = open_store(pair.image_url).get(pair.image_name)
        mask = open_store(pair.mask_url).get(pair.mask_name)
        encode_png(read_image(image, name=pair.id))
        encode_png(read_mask_pixels(mask, name=pair.id), is_mask=True)


def run_prep(sources: Sources, output: str, size: int, executor: Executor | None = None) -> None:
    """Prepares `sources` in this process, or by two in `executor`."""
    config = PrepConfig(image_size=size, num_processes=1)
    open_workers = two_workers(executor) if executor else None
    prepare(sources, output, config, open_workers=open_workers, progress=False)


def run_inspect(source: str, executor: Executor | None = None) -> None:
    """Inspects the folder `source` in this process, or by two in `executor`."""
    config = InspectConfig(num_processes=1)
    open_workers = two_workers(executor) if executor else None
    inspect_source(
        source, config, with_contact_sheet=True, open_workers=open_workers, progress=False
    )


def two_workers(executor: Executor) -> OpenWorkers:
    """Returns a function that opens `executor` with two workers and does not close it."""
    return lambda: contextlib.nullcontext(Workers(executor, lambda: 2))


def print_table(result: dict[str, Any]) -> None:
    """Prints `result` with the machine."""
    machine = result["machine"]
    print(f"{machine['cpu']}, {machine['cores']} cores; median (least to most)")
    side = result["image_size"]
    print(f"{result['num_images']} pairs, stored as {side} x {side} pixels")
    for name, value in result["images_per_s"].items():
        print(
            f"{name:18} {value['median']:7.1f} images/s ({value['min']:.1f} to {value['max']:.1f})"
        )
    for name, value in result["cpu_ms_per_image"].items():
        print(f"{name:18} {value['median']:7.2f} CPU ms ({value['min']:.2f} to {value['max']:.2f})")
    for name, value in result["ratios"].items():
        print(f"{name:18} {value['median']:7.2f} ({value['min']:.2f} to {value['max']:.2f})")
    for number, peak in result.get("peak_worker_rss_mb", {}).items():
        print(f"peak memory of a worker, {number} images: {peak:.0f} MB")


if __name__ == "__main__":
    main()
