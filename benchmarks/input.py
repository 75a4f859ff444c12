"""Compares the input pipeline with decoding the same PNG bytes alone, in images per second.

    python benchmarks/input.py [--num-images 200] [--image-size 512] [--batch-size 8]

decode: `tf.io.decode_png` of image and mask in a `tf.data` map, bytes in memory, no batches: the
minimum of any input pipeline. input: reads shards by position, checks, decodes, batches and
distributes as in training. The two kinds with warps add augmentation. Each repeat times an epoch of
a few samples, which is the cost of starting an epoch, and a whole epoch; the rate is that of the
samples in between. The kinds run in turns; ratios compare neighbouring runs. `cpu` is the time of
all threads of this process: use it on a machine that is shared. Then times each kind of
augmentation alone, and the presets, on one thread. Last, measures memory over epochs.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import click
import numpy as np
import psutil
from machine import describe_machine, spread, write_result

from data_prep.config import PrepConfig
from data_prep.phantoms.images import write_phantoms
from data_prep.pipeline import prepare
from data_prep.sources.pairs import find_sources
from job.config import AugmentationConfig, TrainConfig
from job.data.augmentation.augment import augment
from job.data.dataset import Dataset, open_dataset
from job.data.pipeline import EpochPlan, distributed_batches
from job.data.random_streams import SampleKey
from job.data.reader import RecordReader
from job.data.sampling import global_batches, sample_order
from job.data.shard_cache import open_reader

AUGMENTATION = AugmentationConfig(enabled=True)  # the kinds that are on by default
FEW_SAMPLES = 10  # in the short epoch that times the start
EPOCH_REPEATS = 2  # times that a long epoch reads each sample
AUGMENTED_SAMPLES = 16  # of each kind in a repeat


@click.command()
@click.option("--num-images", default=200, show_default=True, help="Phantoms to generate.")
@click.option("--image-size", default=512, show_default=True, help="Side of the images, pixels.")
@click.option("--batch-size", default=8, show_default=True, help="Images per step.")
@click.option("--repeats", default=9, show_default=True, help="Runs of each kind.")
@click.option(
    "--epochs", default=20, show_default=True, help="Epochs over which memory is measured."
)
def main(num_images: int, image_size: int, batch_size: int, repeats: int, epochs: int) -> None:
    """Measure the input pipeline, print a table and write `results/input.json`."""
    from job.distributed.strategy import configure

    strategy = configure(TrainConfig(global_batch_size=batch_size))
    with tempfile.TemporaryDirectory() as work:
        dataset = prepare_phantoms(work, num_images, image_size)
        reader = open_reader(dataset, dataset.split("train"), cache="full", cache_dir=None)
        measured = Input(dataset, reader, strategy, batch_size)
        result: dict[str, Any] = {
            "machine": describe_machine(),
            "num_images": len(dataset.split("train")),
            "image_size": image_size,
            "batch_size": batch_size,
            **measure_rates(measured, repeats),
            "cpu_ms_of_augmentation": measure_augmentation(image_size, repeats),
            "rss_mb_after_epoch": measure_memory(measured, epochs),
        }
    write_result("input", result)
    print_table(result)


def prepare_phantoms(
    work: str, num_images: int, size: int, *, shard_size_mb: float = 64.0
) -> Dataset:
    """Returns a dataset with all phantoms but two in its train split."""
    write_phantoms(f"{work}/source", num_images + 2, size, 1)
    share = 1 / (num_images + 2)
    fractions = (1 - 2 * share, share, share)
    config = PrepConfig(
        image_size=size, fractions=fractions, num_processes=1, shard_size=shard_size_mb
    )
    prepare(find_sources(f"{work}/source"), f"{work}/dataset", config, progress=False)
    return open_dataset(f"{work}/dataset")


class Input:
    """The input of one training process."""

    def __init__(
        self, dataset: Dataset, reader: RecordReader, strategy: Any, batch_size: int
    ) -> None:
        self.dataset = dataset
        self.reader = reader
        self.strategy = strategy
        self.batch_size = batch_size
        self.num_samples = len(dataset.split("train"))

    def run(self, augmentation: AugmentationConfig | None, *, epoch: int, limit: int) -> None:
        """Reads `limit` samples; repeats samples if the split has fewer."""
        for _ in self.batches(augmentation, epoch=epoch, limit=limit):
            pass

    def batches(
        self, augmentation: AugmentationConfig | None, *, epoch: int, limit: int
    ) -> Iterator[Any]:
        """Returns the batches of `limit` samples, built as in `job/training/trainer.py`."""
        order = sample_order(self.num_samples, seed=0, epoch=epoch, version=2)
        plan = global_batches(np.resize(order, limit), self.batch_size)
        return distributed_batches(
            self.strategy,
            self.dataset,
            self.reader,
            EpochPlan(plan, 0, epoch, augmentation=augmentation),
        )


def decode_run(measured: Input, augmentation: AugmentationConfig | None) -> Callable[[int], None]:
    """Returns a function that decodes `limit` samples, and warps them with `augmentation`."""
    import tensorflow as tf

    order = sample_order(measured.num_samples, seed=0, epoch=0, version=2)
    records = [measured.reader.read(int(i)) for i in order]
    images, masks = [each.image for each in records], [each.mask for each in records]

    def warp(image: np.ndarray, mask: np.ndarray, index: np.ndarray) -> list[np.ndarray]:
        return list(
            augment(
                image, mask, SampleKey(0, 0, int(index)),
                config=augmentation or AUGMENTATION, value_max=255,
            )
        )  # fmt: skip

    def decode(image: Any, mask: Any, index: Any) -> Any:
        pixels = tf.io.decode_png(image, 1), tf.io.decode_png(mask, 1)[..., 0]
        if augmentation is None:
            return pixels
        return tuple(tf.numpy_function(warp, [*pixels, index], [tf.uint8, tf.uint8]))

    data = tf.data.Dataset.from_tensor_slices((images, masks, order)).repeat()

    def run(limit: int) -> None:
        decoded = data.take(limit).map(decode, num_parallel_calls=tf.data.AUTOTUNE)
        for _ in decoded.prefetch(2):
            pass

    return run


def measure_rates(measured: Input, repeats: int) -> dict[str, Any]:
    """Returns the rate and the epoch start of each kind, and ratios of neighbouring runs."""
    runs: dict[str, Callable[[int], None]] = {
        "decode": decode_run(measured, None),
        "input": lambda limit: measured.run(None, epoch=0, limit=limit),
        "decode, warp": decode_run(measured, AUGMENTATION),
        "input, warp": lambda limit: measured.run(AUGMENTATION, epoch=0, limit=limit),
    }
    for run in runs.values():
        run(measured.num_samples)  # warms up
    long = EPOCH_REPEATS * measured.num_samples
    starts: dict[str, list[np.ndarray]] = {name: [] for name in runs}
    samples: dict[str, list[np.ndarray]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            starts[name].append(timed(run, FEW_SAMPLES))
            whole = timed(run, long)
            samples[name].append((whole - starts[name][-1]) / (long - FEW_SAMPLES))
    result: dict[str, Any] = {}
    for i, clock in enumerate(("wall", "cpu")):
        result[f"{clock}_ms_per_sample"] = {
            name: spread([float(times[i]) * 1e3 for times in values])
            for name, values in samples.items()
        }
        result[f"{clock}_ms_of_epoch_of_{FEW_SAMPLES}"] = {
            name: spread([float(times[i]) * 1e3 for times in values])
            for name, values in starts.items()
        }
        result[f"{clock}_rate_ratios"] = {
            f"{first} / {second}": spread(
                [float(b[i] / a[i])
                 for a, b in zip(samples[first], samples[second], strict=True)]
            )
            for first, second in (("input", "decode"), ("input, warp", "decode, warp"))
        }  # fmt: skip
    return result


def measure_augmentation(side: int, repeats: int) -> dict[str, Any]:
    """Returns the CPU time per grey 8-bit sample of each kind of augmentation, ms."""
    import cv2

    kinds = [
        name.removesuffix("_probability")
        for name in AugmentationConfig.model_fields
        if name.endswith("_probability")
    ]
    off = {f"{kind}_probability": 0.0 for kind in kinds}
    configs = {
        kind: AugmentationConfig(enabled=True, **off | {f"{kind}_probability": 1.0})
        for kind in kinds
    }
    configs |= {name: AugmentationConfig(preset=name) for name in ("light", "strong")}
    image = np.random.default_rng(0).integers(0, 256, (side, side, 1), dtype=np.uint8)
    mask = image[..., 0] // 128

    def run(config: AugmentationConfig, limit: int) -> None:
        for index in range(limit):
            augment(image, mask, SampleKey(0, 0, index), config=config, value_max=255)

    times: dict[str, list[float]] = {name: [] for name in configs}
    num_threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    for _ in range(repeats + 1):
        for name, config in configs.items():
            cpu = timed(partial(run, config), AUGMENTED_SAMPLES)[1]
            times[name].append(float(cpu) * 1e3 / AUGMENTED_SAMPLES)
    cv2.setNumThreads(num_threads)
    return {name: spread(values[1:]) for name, values in times.items()}  # the first warms up


def timed(run: Callable[[int], None], limit: int) -> np.ndarray:
    """Returns wall and CPU time of `run(limit)`, (2,) float64, s."""
    wall, cpu = time.perf_counter(), time.process_time()
    run(limit)
    return np.array([time.perf_counter() - wall, time.process_time() - cpu])


def measure_memory(measured: Input, num_epochs: int) -> list[float]:
    """Returns the resident memory of this process after each epoch, MB."""
    memory = []
    for epoch in range(num_epochs):
        measured.run(AUGMENTATION, epoch=epoch, limit=measured.num_samples)
        memory.append(psutil.Process().memory_info().rss / 1e6)
    return memory


def print_table(result: dict[str, Any]) -> None:
    """Prints `result` with the machine."""
    machine = result["machine"]
    print(f"{machine['cpu']}, {machine['cores']} cores; median (least to most)")
    side = result["image_size"]
    print(f"{result['num_images']} samples of {side} x {side} pixels")
    for title, group in result.items():
        if title.startswith(("wall", "cpu")):
            for name, value in group.items():
                numbers = f"{value['median']:8.2f} ({value['min']:.2f} to {value['max']:.2f})"
                print(f"{title:24} {name:26} {numbers}")
    memory = result["rss_mb_after_epoch"]
    print(f"memory after epoch 1, 2, {len(memory)}: {memory[0]:.0f}, {memory[1]:.0f}, "
          f"{memory[-1]:.0f} MB")  # fmt: skip


if __name__ == "__main__":
    main()
