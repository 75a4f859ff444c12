"""The schedules against the Keras callbacks they are modelled on, and their state."""

import json
import math
from typing import Any

import keras
import numpy as np
import pytest

from job.optimization.schedule import EarlyStopping, PlateauReducer, rate_factor

NUM_SEQUENCES = 12


def test_rate_grows_then_falls_along_half_a_cosine() -> None:
    def rates(warmup_epochs: float, is_cosine: bool) -> list[float]:
        options: dict[str, Any] = {"warmup_epochs": warmup_epochs, "is_cosine": is_cosine}
        return [rate_factor(step, steps_per_epoch=4, epochs=3, **options) for step in range(12)]

    assert rates(0, False) == [1.0] * 12
    assert rates(1, False) == [0.25, 0.5, 0.75, 1.0, *[1.0] * 8]
    # Eight steps remain after the warm-up: cos(0), cos(pi / 8), ... cos(7 pi / 8).
    falling = [(1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)]
    assert rates(1, True) == pytest.approx([0.25, 0.5, 0.75, 1.0, *falling])
    assert falling[4] == pytest.approx(0.5)
    # Past the last of these epochs it stays 0.
    assert rate_factor(99, steps_per_epoch=4, epochs=3, warmup_epochs=1, is_cosine=True) == 0
    # More epochs are another cosine: where one of 4 ends, one of 8 is at half of its height.
    options: dict[str, Any] = {"steps_per_epoch": 4, "warmup_epochs": 0, "is_cosine": True}
    assert rate_factor(16, epochs=4, **options) == 0
    assert rate_factor(16, epochs=8, **options) == pytest.approx(0.5)


def values_of(seed: int) -> list[float]:
    """Returns a noisy descent with plateaus, exact ties, tiny steps and a NaN."""
    rng = np.random.default_rng(seed)
    steps = rng.choice([0.0, 1e-9, -1e-9, 5e-5, -5e-5, -2e-4, 0.02, -0.02], size=40)
    values = 1.0 + np.cumsum(steps)
    values[rng.integers(1, 40)] = math.nan
    return [float(value) for value in values]


@pytest.fixture(scope="module")
def model() -> Any:
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(optimizer=keras.optimizers.SGD(1.0), loss="mse")
    return model


def reduced_by_keras(model: Any, values: list[float], **options: Any) -> list[float]:
    callback = keras.callbacks.ReduceLROnPlateau("val_loss", mode="min", **options)
    callback.set_model(model)
    model.optimizer.learning_rate = 1.0
    callback.on_train_begin()
    rates = []
    for epoch, value in enumerate(values):
        callback.on_epoch_end(epoch, {"val_loss": value})
        rates.append(float(model.optimizer.learning_rate.numpy()))
    return rates


def stopped_by_keras(model: Any, values: list[float], **options: Any) -> tuple[int | None, int]:
    callback = keras.callbacks.EarlyStopping("val_loss", mode="min", **options)
    callback.set_model(model)
    model.stop_training = False
    callback.on_train_begin()
    for epoch, value in enumerate(values):
        callback.on_epoch_end(epoch, {"val_loss": value})
        if model.stop_training:
            return epoch, callback.best_epoch
    return None, callback.best_epoch


# Keras' own callback converts its variable in a way that numpy 2 warns about.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"factor": 0.4, "patience": 4},
        {"factor": 0.5, "patience": 1, "min_lr": 0.1},
        {"factor": 0.4, "patience": 0},
        {"factor": 0.4, "patience": 2, "cooldown": 3},
        {"factor": 0.9, "patience": 1, "cooldown": 1, "min_delta": 0.0},
    ],
)
def test_plateau_reducer_does_as_keras(model: Any, options: dict[str, Any]) -> None:
    for seed in range(NUM_SEQUENCES):
        values = values_of(seed)
        reducer, lr, rates = PlateauReducer(**options), 1.0, []
        for value in values:
            lr = reducer.update(value, lr)
            rates.append(lr)
        # Keras keeps the rate in float32.
        assert rates == pytest.approx(reduced_by_keras(model, values, **options), rel=1e-5), seed
        assert rates[-1] < 1


@pytest.mark.parametrize(
    "options",
    [{"patience": 1}, {"patience": 3}, {"patience": 6}, {"patience": 3, "min_delta": 0.01}],
)
def test_early_stopping_does_as_keras(model: Any, options: dict[str, Any]) -> None:
    stops = set()
    for seed in range(NUM_SEQUENCES):
        values = values_of(seed)
        stopping = EarlyStopping(**options)
        stop = next((i for i, value in enumerate(values) if stopping.update(value, i)), None)
        assert (stop, stopping.best_epoch) == stopped_by_keras(model, values, **options), seed
        stops.add(stop)
    assert len(stops) > 2


@pytest.mark.parametrize("patience", [0, -1])
def test_early_stopping_without_patience_never_stops_but_keeps_the_best(patience: int) -> None:
    stopping = EarlyStopping(patience)
    assert not any(stopping.update(value, i) for i, value in enumerate([3.0, 1.0, 2.0, 2.0, 2.0]))
    assert (stopping.best, stopping.best_epoch) == (1.0, 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_finite_loss_beats_one_that_is_not(bad: float) -> None:
    stopping, reducer = EarlyStopping(5), PlateauReducer(0.5, 5)
    for epoch, value in enumerate([bad, 2.0, bad]):
        stopping.update(value, epoch)
        reducer.update(value, 1.0)
    assert (stopping.best, stopping.best_epoch, stopping.wait) == (2.0, 1, 1)
    assert (reducer.best, reducer.wait) == (2.0, 1)


def test_training_whose_loss_is_never_finite_is_stopped() -> None:
    stopping = EarlyStopping(3)
    assert [stopping.update(math.nan, epoch) for epoch in range(4)] == [False, False, True, True]
    assert stopping.best is None


@pytest.mark.parametrize("stop_at", [0, 1, 7, 20])
def test_schedules_continue_from_their_json_state(stop_at: int) -> None:
    values = values_of(3)

    def run(stop: int | None) -> list[Any]:
        reducer, stopping = PlateauReducer(0.4, 2, cooldown=2), EarlyStopping(4)
        lr, seen = 1.0, []
        for epoch, value in enumerate(values):
            if epoch == stop:
                state = json.loads(json.dumps([reducer.state(), stopping.state()]))
                reducer, stopping = PlateauReducer(0.4, 2, cooldown=2), EarlyStopping(4)
                reducer.load_state(state[0])
                stopping.load_state(state[1])
            lr = reducer.update(value, lr)
            seen.append((lr, stopping.update(value, epoch), stopping.best_epoch))
        return seen

    assert run(stop_at) == run(None)
