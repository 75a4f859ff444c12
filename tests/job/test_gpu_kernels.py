"""Every function that is compiled for training, evaluation and prediction can run on a GPU.

No GPU is needed: TensorFlow lists the kernels that it has for one. Nothing is computed either, the
functions are only traced, with the arguments that training, evaluation and prediction give them.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import numpy as np
import pytest
import tensorflow as tf

from flexunet.settings import deep_merge, parse_settings
from job.config import LossName, MetricName, ModelConfig, OptimizerConfig, TrainConfig
from job.data.dataset import Dataset, open_dataset
from job.distributed.process_group import ProcessGroup
from job.losses import make_loss
from job.models.ensemble import make_probability_step, network_of
from job.models.registry import build_model
from job.training.setup import TrainingSetup
from job.training.state import TrainState
from job.training.trainer import Trainer
from job.training.trainer_factory import open_trainer
from tests.job.discs import prepare_discs
from tests.job.gpu_kernels import missing_kernels

pytestmark = pytest.mark.skipif(
    not tf.test.is_built_with_cuda(), reason="this TensorFlow is built without kernels for GPUs"
)

SIDE = 16
LOSSES: tuple[LossName, ...] = get_args(LossName)
METRICS: tuple[MetricName, ...] = get_args(MetricName)
# Instance normalisation is the layer of group normalisation.
NORMALIZATIONS = [
    name
    for name in get_args(ModelConfig.model_fields["normalization"].annotation)
    if name != "instance"
]
OPTIMIZERS = get_args(OptimizerConfig.model_fields["name"].annotation)
PRECISIONS = [
    name for name in get_args(TrainConfig.model_fields["precision"].annotation) if name != "auto"
]
SMALL = {
    "global_batch_size": 4,
    "precision": "float32",
    "model": {"num_layers": 2, "base_filters": 8, "base_kernels": (3, 3), "dropout_rate": 0.1},
}
# Each precision, normalisation and optimizer once, and a few losses: the tests below have each
# normalisation with each precision, and each loss.
STEPS = [
    {
        "loss": {"name": loss},
        "model": {"normalization": normalization},
        "precision": precision,
        "optimizer": {"name": optimizer, "clipnorm": 1.0},
        "metrics": METRICS,
    }
    for precision, normalization, loss, optimizer in zip(
        PRECISIONS,
        itertools.cycle(NORMALIZATIONS),
        itertools.cycle(LOSSES),
        itertools.cycle(OPTIMIZERS),
        strict=False,
    )
]
OTHERS: dict[str, dict[str, Any]] = {
    "micro-batches": {"loss": {"name": "ce_dice"}, "accumulate": 2},
    "micro-batches of a mean": {"accumulate": 2},
    "one sigmoid output": {"model": {"num_classes": 1}},
    "class weights": {"loss": {"class_weights": (1.0, 2.0)}},
    "XLA": {"xla": "on"},
}


class Traced(Exception):
    """Ends what called a compiled function: it was traced, and nothing shall be computed."""


@contextlib.contextmanager
def traced(function: Any) -> Iterator[tuple[Any, list[Any]]]:
    """Yields a stand-in for a compiled function, and what tracing gave when it was called."""
    found: list[Any] = []

    def trace(*arguments: Any) -> None:
        found.append(function.get_concrete_function(*arguments))
        raise Traced

    with contextlib.suppress(Traced):
        yield trace, found


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_dataset(prepare_discs(tmp_path_factory.mktemp("discs"), num_images=10, side=SIDE))


@pytest.fixture(scope="module")
def one_cpu() -> Any:
    return tf.distribute.OneDeviceStrategy("CPU:0")


def problems(
    strategy: Any, dataset: Dataset, options: Mapping[str, Any], *, predicts: bool = False
) -> list[str]:
    """Returns a line for each operation without a kernel that a run would have.

    Args:
        predicts: of the step of prediction too.
    """
    config = parse_settings(TrainConfig, deep_merge(SMALL, options), "test")
    with open_trainer(
        TrainingSetup(config, dataset, None, strategy, ProcessGroup(strategy))
    ) as trainer:
        functions = [training_function(trainer), evaluation_function(trainer)]
        if predicts:
            functions.append(trainer.evaluator.probabilities.get_concrete_function(pixels()))
    return [str(each) for function in functions for each in missing_kernels(function)]


def training_function(trainer: Trainer) -> Any:
    with traced(trainer.train_step) as (trainer.train_step, found):
        next(trainer.train_steps(TrainState(learning_rate=1e-3)))
    return found[0]


def evaluation_function(trainer: Trainer) -> Any:
    with traced(trainer.evaluator.step) as (step, found):
        evaluator = dataclasses.replace(trainer.evaluator, step=step)
        evaluator.evaluate("valid", trainer.readers["valid"])
    return found[0]


def pixels(dtype: Any = tf.uint8) -> tf.TensorSpec:
    return tf.TensorSpec((2, SIDE, SIDE, 1), dtype)


def test_every_choice_is_among_the_steps() -> None:
    assert {each["model"]["normalization"] for each in STEPS} == set(NORMALIZATIONS)
    assert {each["optimizer"]["name"] for each in STEPS} == set(OPTIMIZERS)
    assert {each["precision"] for each in STEPS} == set(PRECISIONS)
    assert {"float32", "mixed_bfloat16", "float64"} <= set(PRECISIONS)


@pytest.mark.parametrize(
    "options", STEPS, ids=lambda each: "-".join((each["model"]["normalization"], each["precision"]))
)
def test_a_gpu_has_kernels_for_losses_normalisations_and_precisions(
    one_cpu: Any, dataset: Dataset, options: dict[str, Any]
) -> None:
    assert problems(one_cpu, dataset, options, predicts=True) == []


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("normalization", [each for each in NORMALIZATIONS if each != "none"])
def test_a_gpu_has_kernels_for_each_normalisation_and_its_gradient(
    one_cpu: Any, normalization: str, precision: str
) -> None:
    values = SMALL["model"] | {"num_layers": 2, "normalization": normalization}
    config = parse_settings(ModelConfig, values, "test")
    with one_cpu.scope():
        model = build_model(config, image_shape=(SIDE, SIDE, 1), num_classes=2, precision=precision)
    (layer, *_) = (each for each in model.layers if "normalization" in each.name)
    weights = [weight.value for weight in layer.trainable_weights]

    @tf.function(autograph=False)
    def gradient(inputs: tf.Tensor, training: bool) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = layer(inputs, training=training)
        return tape.gradient(outputs, [inputs, *weights])

    inputs = tf.TensorSpec((2, *layer.input.shape[1:]), layer.compute_dtype)
    found = [
        str(each)
        for training in (False, True)
        for each in missing_kernels(gradient.get_concrete_function(inputs, training))
    ]
    assert found == []


@pytest.mark.parametrize("name", OTHERS)
def test_a_gpu_has_kernels_for_other_options(one_cpu: Any, dataset: Dataset, name: str) -> None:
    assert problems(one_cpu, dataset, OTHERS[name]) == []


def test_a_gpu_has_kernels_for_deep_pixels_and_pixels_that_are_ignored(
    one_cpu: Any, dataset: Dataset
) -> None:
    manifest = dataset.manifest.model_copy(
        update={"ignore_id": 255, "bit_depth": 16, "value_max": 65535}
    )
    deep = dataclasses.replace(dataset, manifest=manifest)
    assert problems(one_cpu, deep, {"loss": {"name": "ce_dice"}}) == []


# At so many FLOPs per byte all layers are all-reduced, or all gathered.
@pytest.mark.parametrize(("flops_per_byte", "normalization"), [(1e-6, "batch"), (1e12, "none")])
def test_a_gpu_has_kernels_for_what_replicas_exchange(
    two_cpus: Any, dataset: Dataset, flops_per_byte: float, normalization: str
) -> None:
    options = {
        "exchange_flops_per_byte": flops_per_byte,
        "model": {"normalization": normalization},
    }
    assert problems(two_cpus, dataset, options) == []


@pytest.mark.parametrize("dtype", [tf.float32, tf.float64], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("num_outputs", [1, 3])
def test_a_gpu_has_kernels_for_each_loss_and_its_gradient(num_outputs: int, dtype: Any) -> None:
    labels = tf.TensorSpec((2, SIDE, SIDE), tf.int32)
    logits = tf.TensorSpec((2, SIDE, SIDE, num_outputs), dtype)
    found = []
    for name in LOSSES:
        loss = make_loss(
            name,
            num_classes=num_outputs,
            class_weights=[1.0] * max(num_outputs, 2),
            ignore_id=255,
        )

        @tf.function(autograph=False)
        def gradient(labels: Any, logits: Any, weights: Any, loss: Any = loss) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(logits)
                value = loss(labels, logits, weights, tf.identity)
            return tape.gradient(value, logits)

        weights = tf.TensorSpec((2,), tf.float32)
        found += missing_kernels(gradient.get_concrete_function(labels, logits, weights))
    assert [str(each) for each in found] == []


@pytest.mark.parametrize("num_outputs", [1, 3])
def test_a_gpu_has_kernels_for_mirrored_images_and_several_networks(num_outputs: int) -> None:
    config = parse_settings(ModelConfig, SMALL["model"], "test")
    shape = (SIDE, SIDE, 1)
    models = [
        build_model(config, image_shape=shape, num_classes=num_outputs, precision=precision)
        for precision in ("float32", "mixed_bfloat16")
    ]
    found = []
    step = make_probability_step(network_of(models, "horizontal"))
    for dtype in (tf.uint8, tf.uint16):
        found += missing_kernels(step.get_concrete_function(pixels(dtype)))
    assert [str(each) for each in found] == []


def test_a_gpu_has_kernels_for_what_processes_send_each_other(two_cpus: Any) -> None:
    process_group = ProcessGroup(two_cpus)
    assert process_group._sum(np.ones(3, np.int64)).tolist() == [1, 1, 1]
    assert process_group._add is not None
    words = two_cpus.experimental_distribute_values_from_function(
        lambda context: tf.ones(3, tf.int64)
    )
    function = process_group._add.get_concrete_function(words)  # type: ignore[attr-defined]
    # With it `tf.distribute` takes apart what it summed at once. It waits for the host anyway:
    # messages are read there, and weights are shared once, at the start.
    assert missing_kernels(function, may_miss=["SplitV"]) == set()


# What must be found.


def halved(masks: tf.Tensor) -> tf.Tensor:
    return tf.split(masks, 2)[0]


def test_an_operation_without_a_kernel_is_named() -> None:
    function = tf.function(halved, autograph=False).get_concrete_function(
        tf.TensorSpec((4, 8), tf.uint8)
    )
    (found,) = missing_kernels(function)
    assert found.op == "Split"
    assert found.types == (("T", ("uint8",)),)
    line = halved.__code__.co_firstlineno + 1
    assert found.source == f"tests/job/test_gpu_kernels.py:{line} halved"
    assert str(found) == f"Split(T=uint8) in halved, made by {found.source}"
    assert missing_kernels(function, may_miss=["Split"]) == set()


def test_the_same_operation_has_a_kernel_for_other_types() -> None:
    function = tf.function(halved, autograph=False).get_concrete_function(
        tf.TensorSpec((4, 8), tf.float32)
    )
    assert missing_kernels(function) == set()


def test_an_operation_in_a_branch_of_a_loop_of_a_called_function_is_found() -> None:
    @tf.function(autograph=False)
    def inner(masks: tf.Tensor) -> tf.Tensor:
        def body(i: tf.Tensor, masks: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            halves = tf.cond(i > 1, lambda: tf.concat([halved(masks)] * 2, 0), lambda: masks)
            return i + 1, halves

        return tf.while_loop(lambda i, masks: i < 3, body, (tf.constant(0), masks))[1]

    outer = tf.function(lambda masks: inner(masks) + 1, autograph=False)
    found = missing_kernels(outer.get_concrete_function(tf.TensorSpec((4, 8), tf.uint8)))
    assert "Split" in {each.op for each in found}


def test_an_operation_that_xla_cannot_compile_is_found() -> None:
    assert_compiled = tf.function(lambda x: x + 1, jit_compile=True, autograph=False)
    assert_compiled(tf.ones(1)).numpy()  # XLA lists its kernels when it first compiles

    @tf.function(autograph=False)
    def outer(x: tf.Tensor) -> tf.Tensor:
        return compiled(x)

    @tf.function(jit_compile=True, autograph=False)
    def compiled(x: tf.Tensor) -> tf.Tensor:
        return tf.strings.to_number(tf.strings.as_string(x)) + x

    found = missing_kernels(outer.get_concrete_function(tf.TensorSpec((2,), tf.float32)))
    assert {each.op for each in found} == {"AsString", "StringToNumber"}
