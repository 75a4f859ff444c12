"""Training in a given time: the schedule, its record, and what the clock of the primary decides."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexunet.errors import UsageError
from flexunet.settings import parse_settings
from job.config import TrainConfig, identity_of
from job.optimization.schedule import timed_rate_factor
from job.optimization.time_schedule import (
    RECORD_NAME,
    TimeSchedule,
    TrainingClock,
    read_record,
)
from job.training.state import TrainState
from job.training.step import CLOCK, MESSAGES, StepMessages


def config_of(**values: Any) -> TrainConfig:
    return parse_settings(TrainConfig, values, "test")


def state_of(config: TrainConfig) -> TrainState:
    state = TrainState(learning_rate=1.0)
    state.begin(config, None)
    return state


def test_the_clock_adds_the_time_of_earlier_attempts() -> None:
    now = [100.0]
    clock = TrainingClock(25.0, lambda: now[0])
    now[0] = 107.5
    assert clock.used_s() == 32.5


def test_the_rate_follows_the_time_and_the_warm_up_is_short() -> None:
    schedule = {"warmup_epochs": 2.0, "cosine": True, "reduce_on_plateau": False}
    config = config_of(time_budget=10, schedule=schedule)  # 600 s
    state = state_of(config)
    num_steps = 100  # an epoch takes longer than the time
    rates = []
    for step in range(60):
        rates.append(state.rate(config, num_steps))
        state.end_step(10.0 * step)
    assert rates[:2] == [1 / 200, 2 / 200]  # by steps
    # Step 10 sees the reading of step 9: 90 s are 0.15 of the time, and the warm-up is over.
    for step in (10, 31, 59):
        used = math.floor(10 * (step - 1) / 600 * 1000) / 1000
        assert rates[step] == pytest.approx((1 + math.cos(math.pi * used)) / 2, rel=1e-12)
    # Before, it follows the time, which is faster than its two epochs.
    used = math.floor(10 * 4 / 600 * 1000) / 1000
    assert rates[5] == pytest.approx((used / 0.1) * (1 + math.cos(math.pi * used)) / 2)
    assert not state.is_finished(config)
    state.end_step(600.0)
    assert state.is_time_over()
    assert not state.is_finished(config)  # before its validation
    state.step_in_epoch = 0
    assert state.is_finished(config)
    assert state.rate(config, num_steps) == pytest.approx(0.0, abs=1e-12)
    assert state.rate(config, num_steps, offset=-1) > 0  # that of the step which was trained
    plain = timed_rate_factor(0, 0.9, steps_per_epoch=1, warmup_epochs=0.0, is_cosine=False)
    assert plain == 1.0


def test_the_end_of_an_epoch_is_kept_free_and_epochs_may_end_first() -> None:
    config = config_of(time_budget=1, epochs=4, foreground_share=0.8, foreground_share_end=0.2)
    state = state_of(config)
    for used_s in (0.0, 2.0, 4.0):
        state.end_step(used_s)
    state.note_epoch_end(14.0)  # a step and the validation took 10 s
    assert state.time is not None
    assert state.time.reserve_s == 10.0
    assert state.time.fraction_at(state.step) == 0.28  # 14 of 50 s
    state.epoch, state.step_in_epoch = 1, 0
    assert state.foreground_share(config) == pytest.approx(0.8 - 0.6 / 3)  # epoch 2 of 4
    state.end_step(49.9)
    # An epoch keeps its share, whatever the clock says within it.
    assert state.foreground_share(config) == pytest.approx(0.8 - 0.6 / 3)
    assert not state.is_time_over()
    state.end_step(50.0)
    assert state.is_time_over()
    # Of 2 epochs of 2 steps, 3 steps are 3/4, and the time ends later.
    config = config_of(
        time_budget=1000, epochs=2, schedule={"cosine": True, "reduce_on_plateau": False}
    )
    late = state_of(config)
    for _ in range(3):
        late.end_step(0.0)
    assert state.time is not None
    before = state.time.fraction_at(state.step)
    state.note_epoch_end(50.0)  # nothing to keep free any more: the part stays
    assert (state.time.reserve_s, state.time.fraction_at(state.step)) == (0.0, before)
    assert late.rate(config, 2) == pytest.approx((1 + math.cos(math.pi * 3 / 4)) / 2)


def test_an_epoch_keeps_its_share_when_a_later_attempt_has_more_epochs_or_time() -> None:
    shares = {"foreground_share": 0.8, "foreground_share_end": 0.2}
    config = config_of(epochs=4, **shares)
    state = state_of(config)
    state.epoch = 1
    assert state.foreground_share(config) == pytest.approx(0.6)
    state.end_step(None)
    stored = json.loads(json.dumps(state.as_values()))
    later = TrainState(**stored)
    for longer in (config_of(epochs=7, **shares), config_of(epochs=7, time_budget=9, **shares)):
        later.begin(longer, None)
        assert later.foreground_share(longer) == pytest.approx(0.6)
    later.epoch, later.step_in_epoch = 2, 0
    assert later.foreground_share(config_of(epochs=7, **shares)) == pytest.approx(0.6)
    later.epoch = 3
    assert later.foreground_share(config_of(epochs=7, **shares)) == pytest.approx(0.5)
    # A checkpoint of an earlier version within an epoch has no share of it.
    del stored["epoch_share"]
    earlier = TrainState(**stored)
    assert earlier.foreground_share(config_of(epochs=7, **shares)) == pytest.approx(0.7)
    constant = state_of(config_of(epochs=4, foreground_share=0.5))
    assert constant.foreground_share(config_of(epochs=4, foreground_share=0.5)) == 0.5
    assert "epoch_share" not in constant.as_values()


@given(st.lists(st.floats(0, 50), min_size=1, max_size=30), st.data())
def test_a_resumed_run_and_one_that_follows_the_record_have_the_same_parts(
    durations: list[float], data: st.DataObject
) -> None:
    readings = np.cumsum([0.0, *durations]).tolist()
    cut = data.draw(st.integers(0, len(readings) - 1))
    config = config_of(time_budget=data.draw(st.floats(0.1, 20)))
    whole, resumed = state_of(config), state_of(config)
    for step, used_s in enumerate(readings):
        if step == cut:
            resumed = TrainState(**json.loads(json.dumps(resumed.as_values())))
            resumed.begin(config, None)
        for each in (whole, resumed):
            each.end_step(used_s)
            if step % 3 == 2:
                each.note_epoch_end(used_s + step % 2)
    assert dataclasses.asdict(resumed) == dataclasses.asdict(whole)
    assert whole.time is not None
    followed = TrainState(learning_rate=1.0)
    followed.begin(config, json.loads(json.dumps(whole.time.record)))
    for _ in readings:
        followed.end_step(0.0)  # its own clock does not count
    assert followed.time is not None
    assert followed.time.record == whole.time.record
    assert len(whole.time.record) <= 1000
    parts = [part for _, part in whole.time.record]
    assert parts == sorted(parts)


def test_a_longer_budget_goes_on_and_the_values_of_other_runs_stay() -> None:
    state = state_of(config_of(time_budget=1))
    state.end_step(60.0)
    assert state.is_time_over()
    again = TrainState(**json.loads(json.dumps(state.as_values())))
    again.begin(config_of(time_budget=2), None)
    assert again.time is not None
    assert (again.is_time_over(), again.time.fraction_at(again.step)) == (False, 0.5)
    again.begin(config_of(), None)
    assert "time" not in again.as_values()  # as earlier versions wrote it


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    schedule = TimeSchedule(60.0)
    for step in range(1, 5):
        schedule.note(17.0 * step, step)
    path = tmp_path / "run" / RECORD_NAME
    path.parent.mkdir(parents=True)
    path.write_text(schedule.table())
    assert read_record(str(tmp_path / "run")) == schedule.record
    assert schedule.record[-1] == [4, 1.0]
    for text, problem in (
        ("step,time_fraction\n1,0.5\n", "does not reach 1"),
        ("step,time_fraction\n1,x\n", "damaged"),
        ("step\n1\n", "damaged"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=problem):
            read_record(str(tmp_path / "run"))
    with pytest.raises(UsageError, match="does not exist"):
        read_record(str(tmp_path / "other"))


def test_epochs_are_unlimited_with_a_budget_unless_given() -> None:
    assert config_of(time_budget=5).epochs is None
    assert config_of(time_budget=5, epochs=7).epochs == 7
    assert config_of(time_budget=5, preset="recipe").epochs is None
    assert config_of().epochs == 100
    assert identity_of(config_of(time_budget=5)) == identity_of(config_of())
    for values, problem in (
        ({"epochs": None}, "needs time_budget"),
        ({"time_schedule": "run"}, "needs time_budget"),
        ({"time_budget": 0}, "time_budget=0"),
    ):
        with pytest.raises(UsageError, match=problem):
            config_of(**values)


class _Group:
    """Stands for a process of two, each with two replicas."""

    size, num_local_replicas = 2, 2

    def __init__(self, rank: int) -> None:
        self.is_primary = rank == 0


def test_all_processes_get_the_time_of_the_primary_with_the_sums() -> None:
    messages = [StepMessages(_Group(rank)) for rank in range(2)]  # type: ignore[arg-type]
    sent: list[np.ndarray] = []
    for rank, each in enumerate(messages):
        each.run_step(lambda _, message: _sums(sent, message.numpy()), ("batch",), 40.0 + rank)
    # Each process sends its message once for each replica.
    total = 2 * np.sum(sent, axis=0)
    pairs = {MESSAGES: tuple(total[:2]), CLOCK: tuple(total[2:])}
    found = [
        each.run_step(lambda *_: {"loss": (1.0, 1.0), **pairs}, ("batch",), 99.0)
        for each in messages
    ]
    assert found == [({"loss": (1.0, 1.0)}, 40.0)] * 2


def _sums(sent: list[np.ndarray], message: np.ndarray) -> dict[str, tuple[float, float]]:
    sent.append(message)
    return {MESSAGES: (0.0, 0.0), CLOCK: (0.0, 0.0)}
