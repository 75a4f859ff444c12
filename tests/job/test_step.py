"""The training step: the same computation on one device and on two mirrored replicas."""

import inspect
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from job.config import LossName, ModelConfig, OptimizerConfig, TrainConfig
from job.data.dataset import open_dataset
from job.data.sampling import PADDING, dropout_keys, global_batches, sample_order
from job.data.shard_cache import open_reader
from job.distributed.exchange_plan import make_plan
from job.distributed.replica_sums import Criterion
from job.evaluation.evaluator import make_evaluator
from job.evaluation.steps import make_evaluation_step
from job.losses import is_mean, make_loss
from job.metrics.batch import RunningSums, reference_metrics
from job.models.ensemble import Network, network_of
from job.models.registry import build_model
from job.optimization.optimizer import Adam
from job.training.step import CLOCK, MESSAGES, StepOptions, make_train_step
from tests.job.discs import prepare_discs

NUM_SAMPLES, SIDE, BATCH = 10, 16, 4
MODEL = ModelConfig(num_layers=2, base_filters=4, base_kernels=(5, 5), dropout_rate=0.1)


@pytest.fixture(scope="module")
def samples() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (NUM_SAMPLES, SIDE, SIDE, 1), dtype=np.uint8)
    return images, (images[..., 0] > 160).astype(np.uint8)


def batches(
    samples: tuple[np.ndarray, np.ndarray], epoch: int, num_replicas: int
) -> Iterator[list[dict[str, Any]]]:
    """Yields the parts of every global batch, one per replica; the last has padding."""
    images, masks = samples
    order = sample_order(NUM_SAMPLES, seed=3, epoch=epoch, version=2)
    for indices in global_batches(order, BATCH):
        rows = np.where(indices == PADDING, indices[0], indices)
        whole = {
            "image": images[rows],
            "mask": masks[rows],
            "weight": (indices != PADDING).astype(np.float32),
            "key": dropout_keys(rows, seed=3, epoch=epoch),
        }
        size = BATCH // num_replicas
        yield [
            {name: tf.constant(value[i * size : (i + 1) * size]) for name, value in whole.items()}
            for i in range(num_replicas)
        ]


class Trained:
    """A small network trained under `strategy`, with what was computed on the way."""

    def __init__(
        self,
        strategy: Any,
        samples: tuple[np.ndarray, np.ndarray],
        *,
        precision: str,
        loss_name: LossName = "categorical_crossentropy",
        num_steps: int | None = None,
        model: ModelConfig = MODEL,
        optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3),  # noqa: B008 - frozen
        num_micro_batches: int = 1,
        gathers: bool = False,
        uses_xla: bool = False,
        message: tuple[float, ...] | None = None,
    ) -> None:
        with strategy.scope():
            self.model = build_model(
                model, image_shape=(SIDE, SIDE, 1), num_classes=2, seed=5, precision=precision
            )
            self.optimizer = Adam(optimizer, self.model.trainable_variables)
        loss = make_loss(loss_name, num_classes=2)
        metrics = reference_metrics(["dice_coef_multiclass", "sensitivity"])
        num_replicas = strategy.num_replicas_in_sync
        plan = make_plan(
            self.model,
            batch_size=BATCH // num_replicas,
            num_replicas=num_replicas,
            flops_per_byte=1e12 if gathers else 0.0,  # computing costs nothing, or all there is
        )
        self.step = make_train_step(
            strategy,
            self.model,
            self.optimizer,
            Criterion(loss, metrics),
            StepOptions(
                plan,
                num_micro_batches,
                is_mean(loss_name),
                uses_xla,
                has_messages=message is not None,
                has_clock=message is not None,
            ),
        )
        self.losses: list[float] = []
        self.sums = RunningSums()
        count = 0
        for epoch in range(3):
            for parts in batches(samples, epoch, strategy.num_replicas_in_sync):
                if count == num_steps:
                    return
                batch = strategy.experimental_distribute_values_from_function(
                    lambda context, parts=parts: parts[context.replica_id_in_sync_group]
                )
                rate = tf.constant(1e-3, tf.float64)
                sent = () if message is None else (tf.constant(message, tf.float64),)
                self.arguments = (batch, tf.constant(count, tf.int64), rate, *sent)
                sums = self.step(*self.arguments)
                self.sums.add(sums)
                self.losses.append(float(sums["loss"][0]) / float(sums["loss"][1]))
                count += 1


_TRAINED: dict[str, Trained] = {}


def trained_once(strategy: Any, samples: Any, **options: Any) -> Trained:
    """Returns the network of these options, for tests that do not change it."""
    whole = inspect.signature(Trained).bind(strategy, samples, **options)
    whole.apply_defaults()
    key = f"{strategy.num_replicas_in_sync} {list(whole.arguments.items())[2:]!r}"
    if key not in _TRAINED:
        _TRAINED[key] = Trained(strategy, samples, **options)
    return _TRAINED[key]


@pytest.fixture(scope="module")
def one_cpu() -> Any:
    return tf.distribute.OneDeviceStrategy("CPU:0")


@pytest.mark.parametrize("loss_name", ["categorical_crossentropy", "bce_dice", "dice_multiclass"])
def test_two_replicas_compute_what_one_device_does(
    one_cpu: Any, two_cpus: Any, samples: Any, loss_name: LossName
) -> None:
    one = trained_once(one_cpu, samples, precision="float64", loss_name=loss_name)
    two = trained_once(two_cpus, samples, precision="float64", loss_name=loss_name)
    assert len(one.losses) == 9  # 3 epochs of ceil(10 / 4) steps
    assert np.allclose(one.losses, two.losses, rtol=1e-9, atol=0)
    for name in ("loss", "dice_coef_multiclass", "sensitivity"):
        assert one.sums.mean(name) == pytest.approx(two.sums.mean(name), rel=1e-9)
    for a, b in zip(one.model.weights, two.model.weights, strict=True):
        assert np.allclose(a.numpy(), b.numpy(), rtol=0, atol=1e-9)


def test_float32_gradients_of_two_replicas_agree_by_norm(
    one_cpu: Any, two_cpus: Any, samples: Any
) -> None:
    optimizer = OptimizerConfig(clipvalue=None)
    one, two = (
        Trained(strategy, samples, precision="float32", num_steps=1, optimizer=optimizer)
        for strategy in (one_cpu, two_cpus)
    )
    first, second = (
        {name: moment.numpy() for name, moment in each.optimizer.named_variables().items()}
        for each in (one, two)
    )
    # After one step the first moment is 0.1 times the gradient.
    for name in (name for name in first if name.startswith("first/")):
        scale = np.linalg.norm(first[name])
        assert np.linalg.norm(first[name] - second[name]) <= 2e-5 * scale
        assert scale > 0


def test_messages_change_no_bit_of_training(two_cpus: Any, samples: Any) -> None:
    plain, sending = (
        trained_once(two_cpus, samples, precision="float64", loss_name="bce_dice", message=message)
        for message in (None, (1.0, math.inf, 2.5, 0.0))
    )
    assert plain.losses == sending.losses
    for name in ("loss", "dice_coef_multiclass", "sensitivity"):
        assert plain.sums.pair(name) == sending.sums.pair(name)
    for a, b in zip(plain.model.weights, sending.model.weights, strict=True):
        assert np.array_equal(a.numpy(), b.numpy())
    # Both replicas send the message, in each of the 9 steps.
    assert sending.sums.pair(MESSAGES) == (2 * 9.0, math.inf)
    assert sending.sums.pair(CLOCK) == (2 * 9 * 2.5, 0.0)


def test_training_lowers_the_loss_and_padding_counts_nowhere(one_cpu: Any, samples: Any) -> None:
    trained = trained_once(one_cpu, samples, precision="float64")
    assert np.mean(trained.losses[-3:]) < np.mean(trained.losses[:3])
    assert trained.sums.pair("loss")[1] == 3 * NUM_SAMPLES  # 3 epochs


def reported_size(network: Network, sizes: list[int]) -> Network:
    """Returns `network`, which adds the number of pictures that it is given to `sizes`."""

    def reported(images: tf.Tensor) -> tf.Tensor:
        sizes.append(images.shape[0])
        return network(images)

    return reported


@pytest.mark.parametrize("loss_name", ["categorical_crossentropy", "bce_dice", "basnet_hybrid"])
def test_evaluation_step_counts_every_pixel_of_a_case(
    one_cpu: Any, two_cpus: Any, samples: Any, loss_name: LossName
) -> None:
    results = []
    for strategy, number in ((one_cpu, 1), (one_cpu, 2), (two_cpus, 2)):
        with strategy.scope():
            model = build_model(
                MODEL, image_shape=(SIDE, SIDE, 1), num_classes=2, seed=5, precision="float64"
            )
        loss = make_loss(loss_name, num_classes=2)
        metrics = reference_metrics(["dice_coef_multiclass", "sensitivity"])
        sizes: list[int] = []
        step = make_evaluation_step(
            strategy,
            reported_size(network_of([model]), sizes),
            Criterion(loss, metrics),
            2,
            None,
            num_micro_batches=number,
        )
        *_, parts = batches(samples, 0, strategy.num_replicas_in_sync)  # two of four are padding
        batch = strategy.experimental_distribute_values_from_function(
            lambda context, parts=parts: parts[context.replica_id_in_sync_group]
        )
        sums, counts = step(batch)
        assert set(sizes) == {BATCH // strategy.num_replicas_in_sync // number}
        results.append(({name: float(pair[0]) for name, pair in sums.items()}, counts.numpy()))
    (whole, counts), *others = results
    for sums, found in others:
        assert sums == pytest.approx(whole, rel=1e-9)
        assert np.array_equal(found, counts)
    assert whole["loss"] > 0
    assert counts.shape == (BATCH, 2, 4)
    assert np.all(counts.sum(axis=2) == SIDE * SIDE)


@pytest.mark.parametrize(("devices", "accumulate"), [("one_cpu", 2), ("two_cpus", 1)])
def test_evaluations_and_windows_go_through_the_network_in_the_same_parts(
    request: pytest.FixtureRequest, tmp_path: Path, devices: str, accumulate: int
) -> None:
    dataset = open_dataset(prepare_discs(tmp_path))
    config = TrainConfig(global_batch_size=4, accumulate=accumulate)
    sizes: list[int] = []

    def network(images: tf.Tensor) -> tf.Tensor:
        bright = tf.cast(images, tf.float32) - 128
        return tf.concat([-bright, bright], axis=-1)

    strategy = request.getfixturevalue(devices)
    evaluator = make_evaluator(config, strategy, dataset, reported_size(network, sizes))
    reader = open_reader(dataset, dataset.split("valid"), cache="full", cache_dir=None)
    assert evaluator.evaluate("valid", reader).summary["foreground_mean"]["dice"] > 0.5
    assert set(sizes) == {2}
    sizes.clear()
    evaluator.predict(np.zeros((32, 160, 1), np.uint8))
    assert set(sizes) == {2}


ACCUMULATED: list[tuple[LossName, dict[str, Any]]] = [
    ("categorical_crossentropy", {}),
    ("focal", {"activation": "mish"}),
    # No mean: its gradient needs the sums of the whole batch. The second head is at the bottom of
    # two levels, for speed.
    ("ce_dice", {"deep_supervision": 1}),
]


@pytest.mark.parametrize(("loss_name", "changes"), ACCUMULATED)
def test_micro_batches_train_as_the_whole_batch_does(
    one_cpu: Any, two_cpus: Any, samples: Any, loss_name: LossName, changes: dict[str, Any]
) -> None:
    model = MODEL.model_copy(update=changes)
    whole, on_one, on_two = (
        trained_once(strategy, samples, precision="float64", loss_name=loss_name, model=model,
                num_micro_batches=number, gathers=gathers)
        for strategy, number, gathers in (
            (one_cpu, 1, False), (one_cpu, 2, False), (two_cpus, 2, True),
        )
    )  # fmt: skip
    # 10 samples in batches of 4: the last step has micro-batches that are all padding.
    for parts in (on_one, on_two):
        assert np.allclose(whole.losses, parts.losses, rtol=1e-9, atol=0)
        for name in ("loss", "dice_coef_multiclass", "sensitivity"):
            assert whole.sums.mean(name) == pytest.approx(parts.sums.mean(name), rel=1e-9)
        for a, b in zip(whole.model.weights, parts.model.weights, strict=True):
            assert np.allclose(a.numpy(), b.numpy(), rtol=0, atol=1e-9)


def test_the_network_trains_alike_when_xla_compiles_it(
    one_cpu: Any, two_cpus: Any, samples: Any
) -> None:
    plain = trained_once(one_cpu, samples, precision="float64")
    compiled = trained_once(
        two_cpus, samples, precision="float64", num_micro_batches=2, uses_xla=True
    )
    assert num_compiled(plain) == 0
    assert num_compiled(compiled) >= 2  # forward and backward
    assert np.allclose(plain.losses, compiled.losses, rtol=1e-9, atol=0)
    for a, b in zip(plain.model.weights, compiled.model.weights, strict=True):
        assert np.allclose(a.numpy(), b.numpy(), rtol=0, atol=1e-9)


def test_the_network_is_compiled_in_bfloat16_too(one_cpu: Any, samples: Any) -> None:
    plain, compiled = (
        trained_once(one_cpu, samples, precision="mixed_bfloat16", uses_xla=uses_xla)
        for uses_xla in (False, True)
    )
    # Eight bits of precision, and XLA rounds at other places.
    assert np.allclose(plain.losses, compiled.losses, rtol=0.05, atol=0)
    assert compiled.losses[-1] < compiled.losses[0]


def num_compiled(trained: Trained) -> int:
    """Returns how many parts of the training step XLA compiles."""
    graph = trained.step.get_concrete_function(*trained.arguments).graph  # type: ignore[attr-defined]
    return sum("_XlaMustCompile" in each.attr for each in graph.as_graph_def().library.function)
