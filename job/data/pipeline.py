"""Makes the batches of the replicas with `tf.data`: reads, decodes, augments."""

import itertools
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from data_prep.imaging.arrays import has_planes
from data_prep.shards.manifest import Manifest
from flexunet.process_pool import available_cores
from job.config import AugmentationConfig, TrainConfig
from job.data.augmentation.augment import augment
from job.data.dataset import Dataset, Split
from job.data.random_streams import SampleKey
from job.data.reader import RecordReader
from job.data.sampling import PADDING, copy_numbers, dropout_keys, epoch_order, global_batches

T = TypeVar("T")


@dataclass(frozen=True)
class EpochPlan:
    """Describes an epoch: its samples, seed and augmentation.

    Attributes:
        batches: (steps, global batch) sample indices of the whole epoch, PADDING included.
        seed: of the run.
        first_step: index of the first batch to make.
        augmentation: None: samples stay as stored.
    """

    batches: np.ndarray
    seed: int
    epoch: int
    first_step: int = 0
    augmentation: AugmentationConfig | None = None


def plan_epoch(
    config: TrainConfig, split: Split, *, epoch: int, first_step: int, share: float | None
) -> EpochPlan:
    """Returns the plan of a training epoch of `split`.

    Args:
        first_step: index of the first batch to make.
        share: `job.data.sampling.share_at` of the epoch.
    """
    order = epoch_order(
        split.has_foreground,
        share,
        seed=config.seed,
        epoch=epoch,
        version=config.random_streams,
    )
    batches = global_batches(order, config.global_batch_size)
    return EpochPlan(batches, config.seed, epoch, first_step, config.augmentation)


@dataclass(frozen=True)
class Replicas:
    """Describes the replicas that share a global batch, and those of this process.

    Attributes:
        first: global index of the first replica of this process.
        total: number of replicas in all processes.
        local: number of replicas in this process; each takes every local-th batch.
    """

    first: int = 0
    total: int = 1
    local: int = 1


def make_batches(
    dataset: Dataset, reader: RecordReader, plan: EpochPlan, replicas: Replicas | None = None
) -> Any:
    """Returns a `tf.data.Dataset` of per-replica batches, in the order in which replicas take them.

    Each element holds `image` (b, H, W, C) uint8|uint16, `mask` (b, H, W) uint8, `weight` (b,)
    float32 and `key` (b,) int64, with b = global batch / replicas.

    Args:
        replicas: None: a single replica.
    """
    import tensorflow as tf

    replicas = replicas or Replicas()
    samples = _sample_rows(plan, replicas)
    batch_size = samples["index"].shape[1]

    def load(row: dict[str, Any]) -> dict[str, Any]:
        files = tf.numpy_function(reader.read_many, [row["index"]], [tf.string, tf.string])
        image, mask = (tf.ensure_shape(each, [batch_size]) for each in files)
        return {"image": image, "mask": mask, **row}

    decode = _decoder(dataset.manifest, plan)
    parallel = available_cores()
    data = tf.data.Dataset.from_tensor_slices(samples)
    # Functions that AutoGraph converts leave a temporary file behind when a process is killed.
    load, decode = map(tf.autograph.experimental.do_not_convert, (load, decode))
    data = data.map(load, num_parallel_calls=parallel, deterministic=True)
    data = data.unbatch().map(decode, num_parallel_calls=parallel, deterministic=True)
    data = data.batch(batch_size, drop_remainder=True)
    options = tf.data.Options()
    # Autotuning runs a thread that sleeps for up to a minute, and the end of an iterator waits for
    # it: this costs seconds at the end of every epoch (TensorFlow 2.21). A fixed number is as fast.
    options.autotune.enabled = False
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return data.prefetch(2 * replicas.local).with_options(options)


def _sample_rows(plan: EpochPlan, replicas: Replicas) -> dict[str, np.ndarray]:
    """Returns the samples of each per-replica batch by name: index, copy, weight, key, (N, b)."""
    # A sample that occurs twice in an epoch has other random numbers each time.
    copies = np.where(plan.batches == PADDING, 0, copy_numbers(plan.batches))[plan.first_step :]
    batches = plan.batches[plan.first_step :]
    indices, copies = (_per_replica(each, replicas) for each in (batches, copies))
    weights = (indices != PADDING).astype(np.float32)
    # Padding repeats the first sample of the step: real pixels, weight 0.
    fillers = np.repeat(batches[:, :1], replicas.local, axis=0)
    indices = np.where(indices == PADDING, fillers, indices)
    keys = dropout_keys(indices, seed=plan.seed, epoch=plan.epoch, copies=copies)
    return {"index": indices, "copy": copies, "weight": weights, "key": keys}


def iterate(batches: Any, reader: RecordReader) -> Iterator[Any]:
    """Yields the elements of `batches`; raises a failure of `reader` as the original error."""
    import tensorflow as tf

    elements = iter(batches)
    while True:
        try:
            element = next(elements)
        except StopIteration:
            return
        except tf.errors.OpError as error:
            if reader.failure is not None:
                raise reader.failure from error
            raise
        yield element


def distributed_batches(
    strategy: Any,
    dataset: Dataset,
    reader: RecordReader,
    plan: EpochPlan,
    *,
    first_replica: int = 0,
) -> Iterator[Any]:
    """Yields a per-replica batch for every step of `plan`, from its first step on.

    Does not use a distributed dataset, which takes a quarter of a second longer to start and
    assigns samples to replicas by its own rules.

    Args:
        first_replica: global index of the first replica of this process.
    """
    num_local = len(strategy.extended.worker_devices)
    replicas = Replicas(first_replica, strategy.num_replicas_in_sync, num_local)
    batches = make_batches(dataset, reader, plan, replicas)
    reader.expect(_sample_rows(plan, replicas)["index"].reshape(-1))
    elements = iterate(batches, reader)
    for first in elements:
        parts = [first, *itertools.islice(elements, num_local - 1)]
        on_devices = [
            _on_device(part, device)
            for part, device in zip(parts, strategy.extended.worker_devices, strict=True)
        ]
        yield strategy.experimental_distribute_values_from_function(
            lambda context, parts=on_devices: parts[context.replica_id_in_sync_group % num_local]
        )


def one_ahead(batches: Iterator[T]) -> Iterator[T]:
    """Yields `batches` while a thread prepares the next one and copies it to its device."""
    with ThreadPoolExecutor(1, thread_name_prefix="next-batch") as thread:
        taken = thread.submit(next, batches, None)
        while (batch := taken.result()) is not None:
            taken = thread.submit(next, batches, None)
            yield batch


def _on_device(part: Mapping[str, Any], device: str) -> dict[str, Any]:
    import tensorflow as tf

    with tf.device(device):
        # Random generators take their keys from the host.
        return {
            name: value if name == "key" else tf.identity(value) for name, value in part.items()
        }


def _per_replica(batches: np.ndarray, replicas: Replicas) -> np.ndarray:
    """Returns the part of this process in global batches, one row per replica and step."""
    num_steps, batch_size = batches.shape
    local_size = batch_size // replicas.total
    per_replica = batches.reshape(num_steps, replicas.total, local_size)
    local = per_replica[:, replicas.first : replicas.first + replicas.local]
    return local.reshape(num_steps * replicas.local, local_size)


def decode_image(data: Any, channels: int, dtype: Any) -> Any:
    """Returns the tensor (H, W, C) of a stored image, as `data_prep.imaging.arrays.decode_image`.

    Args:
        data: () string, the stored PNG.
        dtype: tf.uint8 or tf.uint16.
    """
    import tensorflow as tf

    if not has_planes(channels):
        return tf.io.decode_png(data, channels, dtype)
    planes = tf.io.decode_png(data, 1, dtype)[..., 0]
    width = tf.shape(planes)[1]
    return tf.transpose(tf.reshape(planes, [channels, -1, width]), [1, 2, 0])


def _decoder(manifest: Manifest, plan: EpochPlan) -> Any:
    """Returns the function that decodes and, if the plan says so, augments a sample."""
    import tensorflow as tf

    height, width = manifest.image_height, manifest.image_width
    dtype = tf.uint16 if manifest.bit_depth == 16 else tf.uint8
    augmentation = plan.augmentation

    def warp(
        image: np.ndarray, mask: np.ndarray, index: np.ndarray, copy: np.ndarray
    ) -> list[np.ndarray]:
        assert augmentation is not None  # noqa: S101 - only called where it is set
        sample = SampleKey(plan.seed, plan.epoch, int(index), int(copy))
        pair = augment(image, mask, sample, config=augmentation, value_max=manifest.value_max)
        return list(pair)

    def decode(element: dict[str, Any]) -> dict[str, Any]:
        image = decode_image(element["image"], manifest.channels, dtype)
        mask = tf.io.decode_png(element["mask"], 1, tf.uint8)[..., 0]
        if augmentation is not None and augmentation.enabled:
            image, mask = tf.numpy_function(
                warp, [image, mask, element["index"], element["copy"]], [dtype, tf.uint8]
            )
        return {
            "image": tf.ensure_shape(image, [height, width, manifest.channels]),
            "mask": tf.ensure_shape(mask, [height, width]),
            "weight": element["weight"],
            "key": element["key"],
        }

    return decode
