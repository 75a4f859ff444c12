"""The dynamic loss scale: its rule, steps that it skips, and training in float16."""

import csv
import inspect
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from flexunet.errors import ContentError, DivergedError
from flexunet.storage import open_store
from flexunet.text import pluralize
from job.config import LossName, ModelConfig, OptimizerConfig, TrainConfig
from job.distributed.exchange_plan import make_plan
from job.distributed.replica_sums import Criterion
from job.losses import is_mean, make_loss
from job.models.registry import build_model
from job.optimization import loss_scale
from job.optimization.loss_scale import LossScale, loss_scale_for
from job.optimization.optimizer import Adam
from job.reporting.html_report import render
from job.runs import serialization
from job.runs.checkpoints import find_checkpoints
from job.runs.run import Run
from job.training.loop import train_and_evaluate
from job.training.setup import Callbacks
from job.training.step import SKIPPED, StepOptions, make_train_step
from tests import commands
from tests.job.discs import prepare_discs
from tests.job.processes import finish, start_cluster, weights_of
from tests.job.setups import one_process_setup

SIDE, BATCH = 16, 4
MODEL = ModelConfig(num_layers=2, base_filters=4, base_kernels=(3, 3), dropout_rate=0.0)
NEAR = 0.03  # of a gradient in float16, of the length of that in float32
TOO_LARGE = 2.0**100  # gradients in float16 overflow


def rule(scale: float, good: int, skipped: int, is_finite: bool) -> tuple[float, int, int]:
    """Returns scale and counters after a step, as PyTorch and Keras count."""
    if not is_finite:
        return max(scale / 2, 1.0), 0, skipped + 1
    good += 1
    if good == loss_scale.GROWTH_STEPS:
        return min(scale * 2, 2.0**24), 0, 0
    return scale, good, 0


def values_of(scale: LossScale) -> tuple[float, int, int]:
    found = scale.named_variables()
    names = ("scale", "good_steps", "skipped_in_row")
    scale_value, good, skipped = (found[f"loss_scale/{name}"].numpy() for name in names)
    return float(scale_value), int(good), int(skipped)


@pytest.mark.parametrize("first", [1.0, 2.0, 2.0**15, 2.0**23, 2.0**24])
@settings(max_examples=15, deadline=None)
@given(steps=st.lists(st.sampled_from([True, True, True, False]), max_size=12))
def test_scale_grows_and_halves_by_the_rule(first: float, steps: list[bool]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_scale, "GROWTH_STEPS", 3)
        scale, expected, updates = LossScale(), (first, 0, 0), []
        load(scale, first)
        for is_finite in steps:
            # The gradient of the scaled loss; one of its numbers may overflow.
            gradient = expected[0] * np.array([3.0, 1.0 if is_finite else np.inf], np.float32)
            skipped = scale.apply([tf.constant(gradient)], updates.append)
            expected = rule(*expected, is_finite)
            assert values_of(scale) == expected
            assert int(skipped) == expected[2]
        # The gradients of the loss itself, of the good steps alone.
        assert [found[0].numpy().tolist() for found in updates] == [[3.0, 1.0]] * sum(steps)


def test_a_nan_is_no_number_either() -> None:
    scale, updates = LossScale(), []
    scale.apply([tf.constant([1.0]), tf.constant([np.nan])], updates.append)
    assert (updates, values_of(scale)) == ([], (2.0**14, 0, 1))


def load(scale: LossScale, value: float) -> None:
    """Sets the scale; its counters are 0 then."""
    state = {"scale": np.float32(value), "good_steps": np.int64(0), "skipped_in_row": np.int64(0)}
    arrays = {f"loss_scale/{name}": np.asarray(each) for name, each in state.items()}
    scale.load_state(arrays, source="test")


class Trained:
    """A small network, and steps of its training on pseudo-random pictures."""

    def __init__(
        self,
        strategy: Any,
        *,
        precision: str = "mixed_float16",
        loss_name: LossName = "bce_dice",
        optimizer: OptimizerConfig = OptimizerConfig(name="adamw", clipvalue=None),  # noqa: B008 - frozen
        num_micro_batches: int = 1,
        gathers: bool = False,
        uses_xla: bool = False,
        loss_factor: float = 1.0,
    ) -> None:
        self.strategy = strategy
        with strategy.scope():
            self.model = build_model(
                MODEL, image_shape=(SIDE, SIDE, 1), num_classes=2, seed=5, precision=precision
            )
            self.scale = loss_scale_for(precision)
            self.optimizer = Adam(optimizer, self.model.trainable_variables, self.scale)
        num_replicas = strategy.num_replicas_in_sync
        plan = make_plan(
            self.model,
            batch_size=BATCH // num_replicas,
            num_replicas=num_replicas,
            flops_per_byte=1e12 if gathers else 0.0,
        )
        whole = make_loss(loss_name, num_classes=2)

        def loss(*arguments: Any) -> tf.Tensor:
            return loss_factor * whole(*arguments)

        self.step = make_train_step(
            strategy,
            self.model,
            self.optimizer,
            Criterion(loss, {}),
            StepOptions(plan, num_micro_batches, is_mean(loss_name), uses_xla),
        )
        self._variables = [*self.model.weights, *self.optimizer.named_variables().values()]
        self._untrained = [np.array(each.numpy()) for each in self._variables]

    def restart(self) -> None:
        """Gives weights, moments and scale their first values; the step stays compiled."""
        for variable, value in zip(self._variables, self._untrained, strict=True):
            variable.assign(value)

    def train(
        self, seed: int, *, step: int = 0, scale: float | None = None, rate: float = 1e-3
    ) -> float:
        """Does a step on the batch of `seed`, all of it on the first replica but padding.

        Returns the loss.
        """
        if scale is not None and self.scale is not None:
            load(self.scale, scale)
        random = np.random.default_rng(seed)
        images = random.integers(0, 256, (BATCH, SIDE, SIDE, 1), dtype=np.uint8)
        whole = {
            "image": images,
            "mask": (images[..., 0] > 160).astype(np.uint8),
            "weight": np.array([1, 1, 0, 0] if seed % 2 else [1, 1, 1, 1], np.float32),
            "key": np.arange(BATCH, dtype=np.int64),
        }
        size = BATCH // self.strategy.num_replicas_in_sync

        def part(context: Any) -> dict[str, Any]:
            first = size * context.replica_id_in_sync_group
            return {name: tf.constant(each[first : first + size]) for name, each in whole.items()}

        batch = self.strategy.experimental_distribute_values_from_function(part)
        sums = self.step(batch, tf.constant(step, tf.int64), tf.constant(rate, tf.float64))
        self.skipped = int(sums[SKIPPED][0] / sums[SKIPPED][1]) if SKIPPED in sums else 0
        return float(sums["loss"][0] / sums["loss"][1])

    def arrays(self) -> list[np.ndarray]:
        """Returns weights and moments."""
        moments = [
            value
            for name, value in self.optimizer.named_variables().items()
            if not name.startswith("loss_scale/")
        ]
        return [np.array(each.numpy()) for each in [*self.model.weights, *moments]]

    def gradient(self) -> np.ndarray:
        """Returns the gradient of all weights, if one step was made: of it 0.1 is the moment."""
        moments = self.optimizer.named_variables()
        return 10 * np.concatenate(
            [v.numpy().reshape(-1) for name, v in moments.items() if name.startswith("first/")]
        )


@pytest.fixture(scope="module")
def one_cpu() -> Any:
    return tf.distribute.OneDeviceStrategy("CPU:0")


_POOL: dict[str, list[Trained]] = {}


@pytest.fixture
def network() -> Iterator[Callable[..., Trained]]:
    """Returns a function that takes the arguments of `Trained` and returns an untrained network.

    It returns networks of earlier tests again, because compiling a step takes a second.
    """
    in_use: list[tuple[str, Trained]] = []

    def take(strategy: Any, **options: Any) -> Trained:
        whole = inspect.signature(Trained).bind(strategy, **options)
        whole.apply_defaults()
        key = f"{strategy.num_replicas_in_sync} {list(whole.arguments.items())[1:]!r}"
        free = _POOL.setdefault(key, [])
        trained = free.pop() if free else Trained(strategy, **options)
        in_use.append((key, trained))
        return trained

    yield take
    for key, trained in in_use:
        trained.restart()
        _POOL[key].append(trained)


def distance(trained: Trained, exact: Trained) -> float:
    """Returns how far the gradient is from another, of whose length."""
    difference = trained.gradient() - exact.gradient()
    return float(np.linalg.norm(difference) / np.linalg.norm(exact.gradient()))


def assert_same_bits(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> None:
    for a, b in zip(first, second, strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("devices", ["one_cpu", "two_cpus"])
def test_a_skipped_step_changes_nothing_and_counts_nowhere(
    request: pytest.FixtureRequest, network: Callable[..., Trained], devices: str
) -> None:
    broken = network(request.getfixturevalue(devices))
    broken.train(0)
    broken.train(2, step=1)
    straight = broken.arrays()
    broken.restart()
    broken.train(0)
    before = broken.arrays()
    # On two replicas the second holds padding: its own gradient is 0, and finite.
    loss = broken.train(1, step=1, scale=TOO_LARGE)
    assert np.isfinite(loss) and loss > 0
    assert broken.skipped == 1
    assert_same_bits(before, broken.arrays())
    assert broken.scale is not None
    assert values_of(broken.scale) == (TOO_LARGE / 2, 0, 1)
    # The next update is that of a run without the step.
    broken.train(2, step=1, scale=2.0**15)
    assert_same_bits(broken.arrays(), straight)
    assert any(np.any(a != b) for a, b in zip(before, broken.arrays(), strict=True))


@pytest.mark.parametrize("gathers", [False, True])
def test_two_replicas_have_the_gradient_of_one_device_and_the_same_state(
    network: Callable[..., Trained], one_cpu: Any, two_cpus: Any, gathers: bool
) -> None:
    exact, one = network(one_cpu, precision="float32"), network(one_cpu)
    two = network(two_cpus, gathers=gathers)
    for trained in (exact, one, two):
        trained.train(0)
    assert 0 < distance(one, exact) < NEAR
    assert 0 < distance(two, exact) < NEAR
    two.train(1, step=1, scale=TOO_LARGE)
    two.train(2, step=1, scale=2.0**10)
    for variable in [*two.optimizer.variables, *(w.value for w in two.model.weights)]:
        first, second = two_cpus.experimental_local_results(variable)
        assert first.numpy().tobytes() == second.numpy().tobytes()
    assert two.scale is not None
    assert values_of(two.scale) == (2.0**10, 1, 0)


@pytest.mark.parametrize("changes", [{"num_micro_batches": 2}, {"uses_xla": True}])
def test_micro_batches_and_xla_give_the_same_gradient(
    network: Callable[..., Trained], one_cpu: Any, changes: dict[str, Any]
) -> None:
    whole, other = network(one_cpu), network(one_cpu, **changes)
    losses = [trained.train(0) for trained in (whole, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert distance(other, whole) < NEAR
    # What overflows in one part is skipped as a whole.
    before = other.arrays()
    other.train(1, step=1, scale=TOO_LARGE)
    assert other.skipped == 1
    assert_same_bits(before, other.arrays())


def test_gradients_too_small_for_float16_are_kept(
    network: Callable[..., Trained], one_cpu: Any
) -> None:
    # As of pictures with 2**17 times as many pixels.
    exact, half = (
        network(one_cpu, precision=precision, loss_factor=2.0**-17)
        for precision in ("float32", "mixed_float16")
    )
    exact.train(0)
    half.train(0, scale=1.0)
    assert distance(half, exact) > 0.5
    half.restart()
    half.train(0)
    assert distance(half, exact) < NEAR


def test_training_is_that_in_float32(network: Callable[..., Trained], one_cpu: Any) -> None:
    exact, half = network(one_cpu, precision="float32"), network(one_cpu)
    losses: list[tuple[float, float]] = []
    for step in range(40):
        losses.append(
            (exact.train(step, step=step, rate=1e-2), half.train(step, step=step, rate=1e-2))
        )
        assert half.skipped == 0
    first, last = np.mean(losses[:5], axis=0), np.mean(losses[-5:], axis=0)
    assert np.all(last < 0.7 * first)
    for expected, found in losses:
        assert found == pytest.approx(expected, rel=0.05)


def test_a_checkpoint_holds_the_scale_and_its_counters(
    network: Callable[..., Trained], one_cpu: Any, tmp_path: Path
) -> None:
    trained = network(one_cpu)
    trained.train(0)
    trained.train(2, step=1, scale=TOO_LARGE)
    assert trained.scale is not None
    expected = values_of(trained.scale)
    assert expected == (TOO_LARGE / 2, 0, 1)
    finish_checkpoint = serialization.take(str(tmp_path), trained.model, trained.optimizer, {})
    load(trained.scale, 1.0)
    path = finish_checkpoint()[serialization.OPTIMIZER_NAME]
    again = network(one_cpu)
    serialization.read_optimizer(again.optimizer, path)
    assert again.scale is not None
    assert values_of(again.scale) == expected
    # Other precisions pass over it, and have none of it.
    serialization.read_optimizer(network(one_cpu, precision="float32").optimizer, path)


def test_a_checkpoint_without_a_scale_is_refused_in_float16_alone(
    network: Callable[..., Trained], one_cpu: Any, tmp_path: Path
) -> None:
    exact = network(one_cpu, precision="float32")
    path = serialization.take(str(tmp_path), exact.model, exact.optimizer, {})()
    name = path[serialization.OPTIMIZER_NAME]
    with np.load(name) as arrays:
        assert not any(each.startswith("loss_scale/") for each in arrays)
    serialization.read_optimizer(exact.optimizer, name)
    with pytest.raises(ContentError, match=r"scale is missing, but a run in mixed_float16"):
        serialization.read_optimizer(network(one_cpu).optimizer, name)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    # 6 train, 2 valid, 2 test: 3 steps of 2.
    return prepare_discs(tmp_path_factory.mktemp("discs"), num_images=10, side=16)


def config_for(dataset: str, output: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "data": dataset,
        "output": str(output),
        "name": "run",
        "epochs": 2,
        "global_batch_size": 2,
        "precision": "mixed_float16",
        "tensorboard": False,
        "prediction_images": 0,
        "model": MODEL,
    }
    return TrainConfig(**(values | changes))


def train(config: TrainConfig, strategy: Any) -> dict[str, Any]:
    with Run.open(config.output, str(config.name)) as run:
        return train_and_evaluate(
            one_process_setup(config, run, strategy),
            Callbacks(lambda event: None, lambda: False),
        )


def history_of(run: Path) -> list[dict[str, str]]:
    with (run / "metrics" / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_skipped_steps_do_not_count_for_the_schedule_and_are_reported(
    dataset: str,
    one_cpu: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(loss_scale, "FIRST", 2.0**22)
    schedule = {"warmup_epochs": 2.0}  # 6 steps
    config = config_for(dataset, tmp_path, schedule=schedule)
    skipped = train(config, one_cpu)["skipped_steps"]
    assert 0 < skipped < 6
    # The rate of the last update: the n-th of the warm-up has n sixths of it.
    (*_, last) = history_of(tmp_path / "run")
    rate = config.optimizer.learning_rate * (6 - skipped) / 6
    assert float(last["learning_rate"]) == pytest.approx(rate)
    assert "because gradients overflowed float16; the loss scale is now" in caplog.text
    text = f"{pluralize(skipped, 'training step')} skipped because gradients overflowed float16"
    assert text in render(open_store(str(tmp_path / "run")))


def test_gradients_that_no_scale_keeps_finite_end_the_run(
    dataset: str, one_cpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_scale, "FIRST", TOO_LARGE)
    monkeypatch.setattr("job.training.trainer.MOST_SKIPPED", 4)
    config = config_for(dataset, tmp_path)
    with pytest.raises(DivergedError, match="not finite in 4 steps in a row in epoch 2, step 1;"):
        train(config, one_cpu)
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert (outcome["status"], outcome["exit_code"]) == ("diverged", 7)
    assert "--precision float32" in outcome["reason"]


# The real command, whose first scales are too large, and which is stopped after so many steps.
COMMAND = """
from job.optimization import loss_scale

loss_scale.FIRST, loss_scale.GROWTH_STEPS = 2.0**24, 3
from tests.job import stopping

raise SystemExit(stopping.main())
"""


def command_options(dataset: str, output: Path, name: str) -> list[str]:
    return [
        *("--data", dataset, "--output", str(output), "--name", name, "--epochs", "4"),
        *("--global-batch-size", "2", "--precision", "mixed_float16", "--deterministic"),
        *("--preset", "reference"),
        *("--model.num-layers", "2", "--model.base-filters", "4", "--model.base-kernels", "3,3"),
        *("--no-tensorboard", "--no-progress", "--prediction-images", "0", "--threads", "1"),
    ]


def run_command(dataset: str, output: Path, name: str, *, stop_after: int) -> None:
    """Trains on discs by the command, stopped after so many steps."""
    options = command_options(dataset, output, name)
    done = commands.run("tests.script", "-c", COMMAND, str(stop_after), "--local", *options)
    assert done.returncode == (6 if stop_after < NEVER else 0), done.stderr


NEVER = 1000


def state_of(run: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the state of the newest checkpoint, and all of its arrays by name."""
    folder = run / max(find_checkpoints(open_store(str(run)))).prefix
    with np.load(folder / "optimizer.npz") as arrays:
        state = json.loads((folder / "state.json").read_text())
        return state, dict(arrays) | weights_of(run)


@pytest.mark.cluster
def test_a_run_that_is_stopped_among_skipped_steps_resumes_bit_by_bit(
    dataset: str, tmp_path: Path
) -> None:
    run_command(dataset, tmp_path, "whole", stop_after=NEVER)
    run_command(dataset, tmp_path, "parts", stop_after=2)
    runs = tmp_path / "whole", tmp_path / "parts"
    state, arrays = state_of(runs[1])
    assert state["skipped"] == arrays["loss_scale/skipped_in_row"] == 2
    assert arrays["loss_scale/scale"] == 2.0**22
    run_command(dataset, tmp_path, "parts", stop_after=NEVER)
    (whole, expected), (parts, found) = map(state_of, runs)
    assert whole["step"] == parts["step"] == 12
    assert 2 < whole["skipped"] == parts["skipped"] < 12
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        assert values.tobytes() == found[name].tobytes(), name
    first, second = ((run / "metrics" / "history.csv").read_text() for run in runs)
    assert first == second


@pytest.mark.cluster
def test_processes_of_a_cluster_skip_the_same_steps(dataset: str, tmp_path: Path) -> None:
    options = command_options(dataset, tmp_path, "two")
    processes = start_cluster(2, [str(NEVER), *options], code=COMMAND)
    errors = finish(processes)
    # The weights of both are compared bit by bit after every epoch.
    assert [process.returncode for process in processes] == [0, 0], errors
    outcome = json.loads((tmp_path / "two" / "outcome.json").read_text())
    assert 0 < outcome["skipped_steps"] < 12
