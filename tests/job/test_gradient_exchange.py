"""The gradient exchange: the plan, and the same gradients by every way."""

import re
from dataclasses import replace
from functools import partial
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from job.config import ModelConfig, OptimizerConfig, TrainConfig
from job.distributed import exchange_plan
from job.distributed.all_reduce import AllReduce, Gradients
from job.distributed.exchange_plan import (
    NOMINAL_FLOPS_PER_BYTE,
    LayerCost,
    Plan,
    Rates,
    agreed_plan,
    make_plan,
    measured_rates,
)
from job.distributed.gradient_exchange import Exchange, LocalGradient
from job.distributed.replica_sums import Criterion
from job.losses import make_loss
from job.models.registry import BUILDERS, build_model
from job.optimization.optimizer import Adam
from job.training.step import StepOptions, make_train_step
from tests import commands

SIDE, LOCAL, STEPS = 16, 2, 4
ALL_GATHERED = 1e12  # FLOPs per byte: computing costs nothing


def plan_of(model: keras.Model, flops_per_byte: float, num_replicas: int = 2) -> Plan:
    return make_plan(
        model, batch_size=LOCAL, num_replicas=num_replicas, flops_per_byte=flops_per_byte
    )


def network(**changes: Any) -> ModelConfig:
    values = {"num_layers": 3, "base_filters": 4, "base_kernels": (5, 5), "dropout_rate": 0.1}
    return ModelConfig(**(values | changes))


class Trained:
    """A network after some steps on pseudo-random pictures, split over the replicas."""

    def __init__(
        self,
        strategy: Any,
        config: ModelConfig,
        *,
        gathered: bool,
        precision: str = "float32",
        num_steps: int,
        gradient_dtype: str = "float32",
        rate: float = 1e-3,
    ) -> None:
        self.losses: list[float] = []
        self._strategy = strategy
        self._rate = tf.constant(rate, tf.float64)
        with strategy.scope():
            self.model = build_model(
                config, image_shape=(SIDE, SIDE, 1), num_classes=2, seed=5, precision=precision
            )
            settings = OptimizerConfig(clipvalue=None)
            self.optimizer = Adam(settings, self.model.trainable_variables)
        plan = plan_of(self.model, ALL_GATHERED)
        everything = frozenset(cost.name for cost in plan.costs)
        plan = replace(plan, gathered=everything if gathered else frozenset())
        self.plan = plan
        loss = make_loss("bce_dice", num_classes=2)
        options = StepOptions(plan, gradient_dtype=gradient_dtype)
        self._step = make_train_step(
            strategy, self.model, self.optimizer, Criterion(loss, {}), options
        )
        self.train(num_steps)

    def train(self, num_steps: int) -> None:
        """Trains this many more steps."""
        for count in range(len(self.losses), len(self.losses) + num_steps):
            batch = self._batch(self._strategy, count)
            total, number = self._step(batch, tf.constant(count, tf.int64), self._rate)["loss"]
            self.losses.append(total / number)

    @property
    def variables(self) -> list[Any]:
        """Weights and moments: what a checkpoint holds."""
        return [*self.model.variables, *self.optimizer.variables]

    @staticmethod
    def _batch(strategy: Any, count: int) -> Any:
        random = np.random.default_rng(count)
        size = LOCAL * 2
        images = random.integers(0, 256, (size, SIDE, SIDE, 1), dtype=np.uint8)
        whole = {
            "image": images,
            "mask": (images[..., 0] > 160).astype(np.uint8),
            "weight": np.array([1, 1, 1, 0], np.float32),
            "key": np.arange(size, dtype=np.int64) + size * count,
        }
        local = size // strategy.num_replicas_in_sync

        def part(context: Any) -> dict[str, Any]:
            first = local * context.replica_id_in_sync_group
            return {
                name: tf.constant(value[first : first + local]) for name, value in whole.items()
            }

        return strategy.experimental_distribute_values_from_function(part)

    def gradients(self) -> dict[str, np.ndarray]:
        """Returns the gradients, if one step was made: the first moment is 0.1 times them."""
        moments = self.optimizer.named_variables()
        return {k: 10 * v.numpy() for k, v in moments.items() if k.startswith("first/")}


RESIDUAL = {"name": "residual-unet", "residual_blocks": (1,), "num_layers": 2, "dropout_rate": 0.0}


@pytest.mark.parametrize(
    ("config", "num_gathered"),
    [
        (network(), 13),
        (network(normalization="batch", activation="mish", dilation=(2, 2), num_layers=2), 8),
        (ModelConfig(**RESIDUAL, base_filters=4), 9),
    ],
)
def test_gathered_factors_train_as_all_reduce_does(
    two_cpus: Any, config: ModelConfig, num_gathered: int
) -> None:
    reduced, gathered = (
        Trained(two_cpus, config, gathered=method, precision="float64", num_steps=STEPS)
        for method in (False, True)
    )
    # Every convolution of these networks is plain: only normalisation is left to all-reduce.
    assert len(gathered.plan.gathered) == num_gathered
    for a, b in zip(reduced.model.weights, gathered.model.weights, strict=True):
        assert np.allclose(a.numpy(), b.numpy(), rtol=1e-9, atol=1e-9), a.path
    # Nothing is left in the model.
    for ours, plain in zip(gathered.model.layers, reduced.model.layers, strict=True):
        assert "call" not in vars(ours)
        assert getattr(ours, "activation", None) == getattr(plain, "activation", None)


def test_in_bfloat16_it_is_no_farther_from_float32_than_all_reduce(two_cpus: Any) -> None:
    exact, reduced, gathered = (
        Trained(
            two_cpus,
            network(num_layers=2, dropout_rate=0.0),
            gathered=method,
            precision=precision,
            num_steps=1,
        )
        for method, precision in (
            (False, "float32"),
            (False, "mixed_bfloat16"),
            (True, "mixed_bfloat16"),
        )
    )
    distances = []
    for method in (reduced, gathered):
        squares = [
            np.sum((found - exact.gradients()[name]) ** 2)
            for name, found in method.gradients().items()
        ]
        distances.append(np.sqrt(np.sum(squares)))
    assert 0 < distances[1] <= 1.001 * distances[0]


def test_gradients_in_bfloat16_train_as_those_in_float32_do_and_need_no_more_state(
    two_cpus: Any,
) -> None:
    config = network(num_layers=2, base_kernels=(3, 3))
    exact, narrow, later = (
        Trained(two_cpus, config, gathered=False, num_steps=number, gradient_dtype=dtype, rate=5e-3)
        for dtype, number in (("float32", 50), ("bfloat16", 45), ("bfloat16", 0))
    )
    for variable, stored in zip(later.variables, narrow.variables, strict=True):
        variable.assign(stored)
    later.losses = list(narrow.losses)
    for each in (narrow, later):
        each.train(5)
    # A checkpoint has all that the next steps need.
    assert narrow.losses == later.losses
    for a, b in zip(narrow.variables, later.variables, strict=True):
        assert np.array_equal(a.numpy(), b.numpy())
    assert exact.losses[0] == narrow.losses[0]
    assert exact.losses != narrow.losses
    ends = [np.mean(each.losses[-10:]) for each in (exact, narrow)]
    assert ends[0] < 0.9 * exact.losses[0]
    assert ends[1] == pytest.approx(ends[0], rel=0.02)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_exchanges_send_in_the_dtype(two_cpus: Any, dtype: str) -> None:
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(3, use_bias=False)(inputs))
    parts = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    exchanges = (
        (AllReduce(model, dtype), Gradients),
        (Exchange(model, Plan(2, (), 0, frozenset()), dtype), partial(LocalGradient, [])),
    )
    for exchange, gradient in exchanges:

        def run(exchange: Any = exchange, gradient: Any = gradient) -> Any:
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            return exchange.gradients(gradient([tf.gather(parts, replica)]))

        (total,) = two_cpus.run(tf.function(run, autograph=False))
        for found in two_cpus.experimental_local_results(total):
            assert found.dtype == tf.float32
            exact, narrow = (tf.cast(part, dtype) for part in parts)
            assert np.array_equal(found, tf.cast(exact + narrow, tf.float32))


def test_costs_are_those_of_the_layer() -> None:
    image = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 5, padding="same", name="plain")(image)
    x = keras.layers.Conv2DTranspose(2, 2, strides=2, use_bias=False, name="up")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(image, keras.layers.Dense(6, name="dense")(x))
    costs = {cost.name: cost for cost in plan_of(model, 1.0).costs}
    # A batch of 2, float32. Kernel 5*5*3*4 and 4 biases; in 8*8*3, out 8*8*4.
    assert costs["plain"] == LayerCost("plain", 304 * 4, 2 * 448 * 4, 2 * 2 * 64 * 300)
    # Kernel 2*2*2*4, applied at 8*8 places; in 8*8*4, out 16*16*2.
    assert costs["up"] == LayerCost("up", 32 * 4, 2 * 768 * 4, 2 * 2 * 64 * 32)
    # Kernel 2*6 and 6 biases; in 2, out 6.
    assert costs["dense"] == LayerCost("dense", 18 * 4, 2 * 8 * 4, 2 * 2 * 12)


def test_bytes_are_counted_per_replica() -> None:
    costs = (LayerCost("a", 1000, 10, 500), LayerCost("b", 2000, 4000, 700))
    plan = Plan(4, costs, 40, frozenset({"a"}))
    # A ring of 4 sends 2 * 3/4 of a buffer; a gather sends what is one's own to 3 others.
    assert plan.sent_bytes() == 1.5 * (2000 + 40) + 3 * 10
    assert plan.all_reduce_bytes() == 1.5 * 3040
    assert plan.extra_flops() == 3 * 500
    assert plan.seconds(flops_per_s=100.0, bytes_per_s=10.0) == 309 + 15


def test_only_plain_layers_can_be_gathered() -> None:
    class Other(keras.layers.Conv2D):
        pass

    image = keras.Input((8, 8, 4))
    x = Other(4, 3, padding="same", name="other")(image)
    x = keras.layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    x = keras.layers.Conv2D(4, 3, activation=keras.layers.PReLU(), name="activated")(x)
    x = keras.layers.BatchNormalization()(x)
    model = keras.Model(image, keras.layers.Conv2D(4, 3, name="plain")(x))
    plan = plan_of(model, ALL_GATHERED)
    assert [cost.name for cost in plan.costs] == ["plain"]
    # The plain layer has 4 * 3 * 3 * 4 weights and 4 biases; 8 moving statistics have no gradient.
    assert plan.other_bytes == 4 * (model.count_params() - 148 - 8)


def build_with_shared_layer(config: ModelConfig, **options: Any) -> keras.Model:
    policy = options["policy"]
    same = {"dtype": policy, "kernel_initializer": keras.initializers.GlorotUniform(seed=7)}
    image = keras.Input(options["image_shape"])
    x = keras.layers.Rescaling(1 / 255, dtype=policy)(image)
    x = keras.layers.Conv2D(4, 3, padding="same", **same)(x)
    shared = keras.layers.Conv2D(4, 3, padding="same", activation="relu", **same)
    return keras.Model(image, keras.layers.Dense(2, **same)(shared(shared(x))))


def test_a_layer_that_is_called_twice_adds_up(
    two_cpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BUILDERS, "shared", build_with_shared_layer)
    reduced, gathered = (
        Trained(two_cpus, network(name="shared"), gathered=method, precision="float64", num_steps=1)
        for method in (False, True)
    )
    for name, gradient in reduced.gradients().items():
        assert np.allclose(gradient, gathered.gradients()[name], rtol=1e-9, atol=1e-12)


def test_one_replica_gathers_nothing_and_neither_does_a_rate_of_zero() -> None:
    model = build_model(network(), image_shape=(SIDE, SIDE, 1), num_classes=2)
    assert plan_of(model, ALL_GATHERED, num_replicas=1).gathered == frozenset()
    assert plan_of(model, 0.0).gathered == frozenset()


def test_the_inbreast_network_sends_an_eighth_on_two_replicas(zero_weights: None) -> None:
    config = ModelConfig(num_layers=8)
    model = build_model(config, image_shape=(512, 512, 3), num_classes=2, seed=1)
    two = plan_of(model, NOMINAL_FLOPS_PER_BYTE)
    assert two.sent_bytes() < two.all_reduce_bytes() / 8
    # The more replicas, the more there is to gather; in the end a sum is shorter.
    counts = [len(plan_of(model, NOMINAL_FLOPS_PER_BYTE, n).gathered) for n in (2, 8, 64, 512)]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 0


def test_rates_are_measured(two_cpus: Any) -> None:
    # Between cores at 1 to 10000 GFLOP/s that copy 0.1 to 1000 GB/s: work that is not done, for it
    # was folded into a constant, shows as a rate beyond all machines.
    assert 1e-3 < measured_rates(two_cpus, "float32").flops_per_byte < 1e5


# Options of a run, and what its log says about the exchange at 40 GFLOP/s and 100 MB/s.
COSTS: list[tuple[dict[str, Any], bool, str, str | None]] = [
    ({"gradient_dtype": "bfloat16"}, False, "7 of 18 layers", "--gradient-exchange all_reduce"),
    ({}, False, "11 of 18 layers", "with --gradient-exchange all_reduce"),
    ({"exchange_flops_per_byte": 1e-6}, False, "0 of 18 layers", None),
    ({"deterministic": True}, False, "11 of 18 layers", "with --gradient-exchange all_reduce"),
    ({"gradient_exchange": "all_reduce"}, False, "0 of 18 layers", "with --gradient-exchange auto"),
    ({"gradient_exchange": "all_reduce"}, True, "0 of 18 layers", "auto --xla off"),
    ({}, True, "0 of 18 layers", "with --xla off"),
]


class Group:
    """A process group of which this process is the first."""

    is_primary = True

    def __init__(self, size: int) -> None:
        self.size = size

    def run_on_primary(self, work: Any) -> Any:
        return work()


@pytest.fixture(scope="module")
def wide() -> keras.Model:
    return build_model(
        network(num_layers=4, base_filters=16), image_shape=(16, 16, 1), num_classes=2
    )


@pytest.mark.parametrize(("options", "uses_xla", "plan", "other"), COSTS)
def test_several_processes_log_what_the_exchange_costs(
    two_cpus: Any,
    wide: keras.Model,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    uses_xla: bool,
    plan: str,
    other: str | None,
) -> None:
    monkeypatch.setattr(exchange_plan, "measured_rates", lambda *_: Rates(40e9, 100e6))
    caplog.set_level("INFO", logger=exchange_plan.__name__)
    config = TrainConfig(global_batch_size=4, **options)
    lines = []
    for size in (2, 1):
        caplog.clear()
        found = agreed_plan(config, two_cpus, Group(size), wide, uses_xla=uses_xla)  # type: ignore[arg-type]
        lines.append(caplog.text)
        assert (found is None) is (uses_xla or config.gradient_exchange == "all_reduce")
    assert plan in lines[0]
    assert "(measured: 100 MB/s and 40 GFLOP/s per replica)" in lines[0]
    assert lines[0].count("\n") == 1
    narrow = r"with --gradient-dtype bfloat16 in a new run [\d.]+ m?s to exchange"
    is_narrow = config.gradient_dtype == "bfloat16"
    assert bool(re.search(narrow, lines[0])) is (not is_narrow), lines[0]
    if other is None:
        assert lines[0].count("; with") == 1
    else:
        assert re.search(rf"{other} [\d.]+ m?s to exchange", lines[0]), lines[0]
    assert "expected" not in lines[1]


def test_the_expected_cost_is_that_of_the_rates() -> None:
    plan = Plan(2, (LayerCost("a", 10**6, 10**5, 10**8),), 0, frozenset({"a"}))
    # Sends 1e5 bytes in 1 ms and computes 1e8 FLOPs more in 2.5 ms; all-reduce sends 1e6 in 10 ms.
    words = plan.describe_cost(Rates(40e9, 100e6), {"--option value": plan.all_reduce_only()})
    assert words == (
        "expected per step: 3.5 ms to exchange, 7.5 ms or more to compute (measured: 100 MB/s and "
        "40 GFLOP/s per replica); with --option value 10 ms to exchange"
    )


@pytest.mark.parametrize("excess", [0.9, 1.1, 1.2])
def test_what_takes_about_as_long_sends_less(excess: float) -> None:
    inputs = keras.Input((4, 4, 64))
    model = keras.Model(inputs, keras.layers.Conv2D(64, 3, name="deep")(inputs))
    (cost,) = plan_of(model, 1.0).costs
    # All-reduce between two replicas sends a weight once; the ratio makes gathering take `excess`
    # times as long.
    assert cost.factor_bytes < cost.weight_bytes
    ratio = cost.flops / (excess * cost.weight_bytes - cost.factor_bytes)
    assert (plan_of(model, ratio).gathered == {"deep"}) is (excess < 1.15)


STEP = """
import sys
import keras, tensorflow as tf
from job.config import OptimizerConfig
from job.distributed.exchange_plan import Plan
from job.distributed.replica_sums import Criterion
from job.losses import make_loss
from job.optimization.optimizer import Adam
from job.training.step import StepOptions, make_train_step

inputs = keras.Input((4, 4, 1))
model = keras.Model(inputs, keras.layers.Conv2D(2, 1)(inputs))
adam = Adam(OptimizerConfig(), model.trainable_variables)
loss = make_loss("categorical_crossentropy", num_classes=2)
for plan in (None, Plan(2, (), 0, frozenset())):
    make_train_step(
        tf.distribute.get_strategy(), model, adam, Criterion(loss, {}), StepOptions(plan)
    )
print("job.distributed.gradient_exchange" in sys.modules)
"""


def test_a_step_that_all_reduces_everything_does_not_load_the_exchange() -> None:
    done = commands.run("tests.script", "-c", STEP)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
