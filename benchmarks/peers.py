"""Compares the training input with other data loaders on the same samples, in images per second.

    make bench-peers        # creates .venv-peers (9 GB with PyTorch) and runs this script in it
    python benchmarks/peers.py [--num-images 400] [--image-size 512] [--batch-size 8]

WebDataset and MosaicML Streaming need PyTorch, and MosaicML Streaming an older google-cloud-storage
than this project: they are not in `uv.lock`. The script skips and reports loaders that are not
installed.

Every loader delivers the same pairs of PNG files from a local disk, decoded to uint8 and batched,
without augmentation, as tensors of its own framework. The script first checks, pixel by pixel, that
an epoch contains exactly the samples of the dataset. Each loader has one worker or thread per core,
and its own long-lived process: PyTorch forks its workers, which is unsafe in a process with
TensorFlow's threads. Loaders run in turns. The rate is that of a whole epoch including its start;
`first` is the time to the first batch. Other loaders decode with Pillow, as in their documentation,
and again with OpenCV, to separate the decoder from the loader.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import numpy as np
from input import Input, prepare_phantoms
from machine import connected_process, describe_machine, shown, spread, write_result

from data_prep.imaging.codecs import read_image, read_mask_pixels
from data_prep.shards.records import decode_example, unframe_record
from flexunet.process_pool import available_cores
from job.config import TrainConfig
from job.data.dataset import open_dataset
from job.data.shard_cache import open_reader

OURS = "flexunet"
KEYS = ("image/encoded", "image/segmentation/class/encoded")
SHARD_SIZE_MB = 8.0  # of TFRecords: small, so that loaders can read several at a time
NUM_SHARDS = 8  # of the other formats, of equal size: WebDataset gives whole shards to its workers
PEER_PACKAGES = ("webdataset", "mosaicml-streaming", "torch", "torchvision")


@dataclass(frozen=True)
class Samples:
    """The paths of the samples in each format, and the settings of the loaders."""

    dataset: str
    tars: str
    mds: str
    batch_size: int
    shuffle_buffer: int  # samples
    num_workers: int


# (image, mask) or (image, mask, weight) of a batch; image (b, H, W) or (b, H, W, 1) uint8, mask
# (b, H, W) uint8, weight (b,) float32, 0 for a sample that only fills the batch.
Batches = Iterator[tuple[Any, ...]]
Epoch = Callable[[int], Batches]


@dataclass(frozen=True)
class Method:
    """A loader: a function that opens it, and returns a function for the batches of an epoch."""

    open: Callable[[Samples], Epoch]
    shuffle: str
    modules: tuple[str, ...] = ()  # needed in addition to the project's


def open_ours(samples: Samples) -> Epoch:
    """Opens the training input of this project."""
    from job.distributed.strategy import configure

    strategy = configure(TrainConfig(global_batch_size=samples.batch_size))
    dataset = open_dataset(samples.dataset)
    reader = open_reader(dataset, dataset.split("train"), cache="full", cache_dir=None)
    measured = Input(dataset, reader, strategy, samples.batch_size)

    def epoch(number: int) -> Batches:
        for batch in measured.batches(None, epoch=number, limit=measured.num_samples):
            local = (batch[key] for key in ("image", "mask", "weight"))
            yield tuple(strategy.experimental_local_results(values)[0] for values in local)

    return epoch


def open_tfrecord(samples: Samples, *, autotune: bool) -> Epoch:
    """Opens the pipeline of TensorFlow's performance guide over the same shards."""
    from job.distributed.strategy import configure

    configure(TrainConfig(global_batch_size=samples.batch_size))
    import tensorflow as tf

    parallel = tf.data.AUTOTUNE if autotune else samples.num_workers
    split = open_dataset(samples.dataset).split("train")
    paths = [f"{samples.dataset}/{name}" for name in sorted(set(split.shards))]
    features = {key: tf.io.FixedLenFeature([], tf.string) for key in KEYS}

    def decode(record: Any) -> tuple[Any, Any]:
        example = tf.io.parse_single_example(record, features)
        image, mask = (tf.io.decode_png(example[key], 1, tf.uint8) for key in KEYS)
        return image, mask[..., 0]

    data = tf.data.Dataset.from_tensor_slices(paths).shuffle(len(paths))
    data = data.interleave(
        tf.data.TFRecordDataset,
        cycle_length=samples.num_workers,
        num_parallel_calls=parallel,
        deterministic=False,
    )
    data = data.shuffle(samples.shuffle_buffer)
    data = data.map(decode, num_parallel_calls=parallel, deterministic=False)
    data = data.batch(samples.batch_size).prefetch(tf.data.AUTOTUNE if autotune else 2)
    options = tf.data.Options()
    options.autotune.enabled = autotune
    data = data.with_options(options)
    return lambda number: iter(data)


def decode_pillow(data: bytes) -> np.ndarray:
    """Returns the pixels of a grey PNG, (H, W) uint8."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)))


def decode_opencv(data: bytes) -> np.ndarray:
    """Returns the pixels of a grey PNG, (H, W) uint8."""
    import cv2

    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
    assert pixels is not None
    return pixels


def opencv_handler(key: str, data: bytes) -> np.ndarray | None:
    """Decodes a PNG file for WebDataset."""
    return decode_opencv(data) if key.endswith(".png") else None


def open_webdataset(samples: Samples, *, decoder: Any) -> Epoch:
    """Opens a `WebLoader` whose workers build batches, as its documentation recommends."""
    import webdataset

    tars = sorted(str(path) for path in Path(samples.tars).glob("*.tar"))
    data = (
        webdataset.WebDataset(tars, shardshuffle=len(tars))
        .shuffle(samples.shuffle_buffer)
        .decode(decoder)
        .to_tuple("image.png", "mask.png")
        .batched(samples.batch_size)
    )
    loader = webdataset.WebLoader(data, batch_size=None, **worker_options(samples))
    return lambda number: iter(loader)


def open_streaming(samples: Samples, *, decode: Callable[[bytes], np.ndarray]) -> Epoch:
    """Opens a `StreamingDataset` of local shards with PyTorch's `DataLoader`."""
    import torch
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    class Pairs(StreamingDataset):
        def __getitem__(self, at: Any) -> tuple[np.ndarray, np.ndarray]:
            sample = super().__getitem__(at)
            return decode(sample["image"]), decode(sample["mask"])

    # They are copied into a batch at once, so nothing writes to them.
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    clean_stale_shared_memory()
    data = Pairs(local=samples.mds, shuffle=True, batch_size=samples.batch_size)
    loader = torch.utils.data.DataLoader(
        data, batch_size=samples.batch_size, **worker_options(samples)
    )
    return lambda number: iter(loader)


def worker_options(samples: Samples) -> dict[str, Any]:
    """Returns options of PyTorch's `DataLoader`: workers that persist over epochs."""
    return {
        "num_workers": samples.num_workers,
        "persistent_workers": True,
        # PyTorch's default on Linux; a spawned process would use another.
        "multiprocessing_context": "fork",
    }


BUFFER = "shards, then a buffer"
BLOCKS = "blocks of shards (py1e)"
TORCH = ("torch",)
WAYS = {
    OURS: Method(open_ours, "exact, global"),
    "TFRecordDataset": Method(functools.partial(open_tfrecord, autotune=True), BUFFER),
    "TFRecordDataset, not tuned": Method(functools.partial(open_tfrecord, autotune=False), BUFFER),
    "WebDataset": Method(
        functools.partial(open_webdataset, decoder="l8"), BUFFER, ("webdataset", *TORCH)
    ),
    "WebDataset, OpenCV": Method(
        functools.partial(open_webdataset, decoder=opencv_handler), BUFFER, ("webdataset", *TORCH)
    ),
    "MosaicML Streaming": Method(
        functools.partial(open_streaming, decode=decode_pillow), BLOCKS, ("streaming", *TORCH)
    ),
    "MosaicML Streaming, OpenCV": Method(
        functools.partial(open_streaming, decode=decode_opencv), BLOCKS, ("streaming", *TORCH)
    ),
}


@click.command()
@click.option("--num-images", default=400, show_default=True, help="Phantoms to generate.")
@click.option("--image-size", default=512, show_default=True, help="Side of the images, pixels.")
@click.option("--batch-size", default=8, show_default=True, help="Images per batch.")
@click.option("--shuffle-buffer", default=100, show_default=True, help="Of other loaders, samples.")
@click.option("--repeats", default=7, show_default=True, help="Turns, one epoch of each loader.")
def main(
    num_images: int, image_size: int, batch_size: int, shuffle_buffer: int, repeats: int
) -> None:
    """Compare data loaders, print a table and write `results/peers.json`.

    `make bench-peers` creates an environment with the other loaders, and runs this command in it.
    """
    missing = {name: missing_modules(method) for name, method in WAYS.items()}
    names = [name for name, modules in missing.items() if not modules]
    not_installed = {name: modules for name, modules in missing.items() if modules}
    with tempfile.TemporaryDirectory() as work, contextlib.ExitStack() as stack:
        dataset = prepare_phantoms(work, num_images, image_size, shard_size_mb=SHARD_SIZE_MB)
        samples = Samples(
            dataset=f"{work}/dataset",
            tars=f"{work}/tars",
            mds=f"{work}/mds",
            batch_size=batch_size,
            shuffle_buffer=shuffle_buffer,
            num_workers=available_cores(),
        )
        expected = write_formats(samples, not_installed)
        loaders = {
            name: stack.enter_context(connected_process(serve, name, samples)) for name in names
        }
        for name, loader in loaders.items():
            assert ask(loader, "check", 0) == expected, f"{name}: other samples than the dataset"
        timings = measure(loaders, repeats)
    result = {
        "machine": describe_machine(),
        "peers": installed_versions(),
        "not_installed": not_installed,
        "num_images": num_images,
        "image_size": image_size,
        **{key: asdict(samples)[key] for key in ("batch_size", "shuffle_buffer", "num_workers")},
        "num_shards": len(set(dataset.split("train").shards)),
        "samples_of_an_epoch": "the same pixels in every way",
        **summary(timings, num_images),
    }
    write_result("peers", result)
    print_table(result, timings, num_images)


def missing_modules(method: Method) -> list[str]:
    """Returns the missing modules of `method`."""
    return [name for name in method.modules if importlib.util.find_spec(name) is None]


def installed_versions() -> dict[str, str]:
    """Returns the versions of the installed packages of the other loaders."""
    versions = {}
    for name in PEER_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def write_formats(samples: Samples, not_installed: Mapping[str, Any]) -> list[str]:
    """Writes the dataset's PNG bytes in the other formats; returns the digests of the pixels."""
    pairs = read_pairs(samples.dataset)
    if "WebDataset" not in not_installed:
        import webdataset

        Path(samples.tars).mkdir()
        pattern, count = f"{samples.tars}/train-%05d.tar", -(-len(pairs) // NUM_SHARDS)
        with webdataset.ShardWriter(pattern, maxcount=count, verbose=0) as writer:
            for i, (image, mask) in enumerate(pairs):
                writer.write({"__key__": f"{i:06}", "image.png": image, "mask.png": mask})
    if "MosaicML Streaming" not in not_installed:
        from streaming import MDSWriter

        columns = {"image": "bytes", "mask": "bytes"}
        size = sum(len(png) for pair in pairs for png in pair) // NUM_SHARDS
        with MDSWriter(out=samples.mds, columns=columns, size_limit=size) as writer:
            for image, mask in pairs:
                writer.write({"image": image, "mask": mask})
    return sorted(
        digest(
            read_image(image, name="image"), read_mask_pixels(mask, name="mask").astype(np.uint8)
        )
        for image, mask in pairs
    )


def read_pairs(folder: str) -> list[tuple[bytes, bytes]]:
    """Returns the PNG bytes of image and mask of each sample of the train split.

    Does not use TensorFlow, which `RecordReader` imports: TensorFlow and PyTorch each contain an
    LLVM, and a process that loads both may abort.
    """
    split = open_dataset(folder).split("train")
    pairs = []
    for shard, offset, length in zip(split.shards, split.offsets, split.lengths, strict=True):
        with open(f"{folder}/{shard}", "rb") as file:
            file.seek(offset)
            example = decode_example(unframe_record(file.read(length), where=shard))
        image, mask = (example[key] for key in KEYS)
        assert isinstance(image, bytes) and isinstance(mask, bytes)
        pairs.append((image, mask))
    return pairs


def digest(image: np.ndarray, mask: np.ndarray) -> str:
    """Returns the SHA-256 of the pixels of a sample."""
    assert image.dtype == mask.dtype == np.uint8
    assert image.size == mask.size
    return hashlib.sha256(image.tobytes() + mask.tobytes()).hexdigest()


def ask(loader: Connection, what: str, epoch: int) -> Any:
    """Returns the digests of the samples of an epoch ("check"), or its times ("time")."""
    loader.send((what, epoch))
    return loader.recv()


def serve(name: str, samples: Samples, connection: Connection) -> None:
    """Answers `ask` until the connection is closed."""
    epoch = WAYS[name].open(samples)
    with contextlib.suppress(EOFError):
        while True:
            what, number = connection.recv()
            connection.send({"check": digests, "time": timed}[what](epoch, number))


def digests(epoch: Epoch, number: int) -> list[str]:
    """Returns the digest of each sample, sorted."""
    found = []
    for image, mask, *weight in epoch(number):
        images, masks = np.asarray(image), np.asarray(mask)
        used = np.asarray(weight[0]) > 0 if weight else np.ones(len(images), bool)
        found += [digest(*pair) for pair in zip(images[used], masks[used], strict=True)]
    return sorted(found)


def timed(epoch: Epoch, number: int) -> tuple[float, float]:
    """Returns the time to the first batch and of the whole epoch, s."""
    start = time.perf_counter()
    batches = epoch(number)
    next(batches)
    first = time.perf_counter() - start
    for _ in batches:
        pass
    del batches  # may wait for workers
    return first, time.perf_counter() - start


def measure(loaders: dict[str, Connection], repeats: int) -> dict[str, np.ndarray]:
    """Returns the times of each loader, (repeats, 2) float64: first batch, whole epoch, s."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in loaders}
    for turn in range(repeats):
        for name, loader in loaders.items():
            times[name].append(ask(loader, "time", turn + 1))
    return {name: np.array(values) for name, values in times.items()}


def summary(timings: Mapping[str, np.ndarray], num_images: int) -> dict[str, Any]:
    """Returns rates, times to the first batch, and ratios per turn, for the result."""
    ours = timings[OURS][:, 1]
    return {
        "shuffle": {name: WAYS[name].shuffle for name in timings},
        "images_per_s": {
            name: spread((num_images / times[:, 1]).tolist()) for name, times in timings.items()
        },
        "s_to_first_batch": {name: spread(times[:, 0].tolist()) for name, times in timings.items()},
        "rate_ratios": {
            f"{OURS} / {name}": spread((times[:, 1] / ours).tolist())
            for name, times in timings.items()
            if name != OURS
        },
    }


def print_table(
    result: Mapping[str, Any], timings: Mapping[str, np.ndarray], num_images: int
) -> None:
    """Prints the machine, a row per loader, their shuffling and the loaders that are missing."""
    machine = result["machine"]
    print(f"{machine['cpu']}, {machine['cores']} cores; median (least-most) of turns")
    size, shards = result["image_size"], result["num_shards"]
    print(f"{num_images} pairs of {size} x {size} pixels, {shards} shards")
    print(f"{'':27}{'images/s':>16}{'first batch, s':>18}{OURS + ' / it':>18}")
    ours = timings[OURS][:, 1]
    for name, times in timings.items():
        rate = shown((num_images / times[:, 1]).tolist(), 0)
        ratio = "" if name == OURS else shown((times[:, 1] / ours).tolist())
        print(f"{name:27}{rate:>16}{shown(times[:, 0].tolist()):>18}{ratio:>18}")
    for name in timings:
        print(f"shuffle of {name}: {WAYS[name].shuffle}")
    for name, modules in result["not_installed"].items():
        print(f"{name}: skipped, not installed: {', '.join(modules)}; see make bench-peers")


if __name__ == "__main__":
    main()
