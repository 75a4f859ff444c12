"""Stop requests of several processes, which the sums of training steps carry."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.distributed.process_group import ProcessGroup
from job.training import step as module
from job.training.step import StepMessages


class Group:
    """Processes that train together, with a clock for each; stands for their collectives."""

    def __init__(self, size: int, patch: pytest.MonkeyPatch) -> None:
        self.size = size
        self.num_exchanges = 0
        self.now = [0.0] * size
        self.rank = 0
        self.flags: Sequence[bool] = ()
        patch.setattr(module.time, "monotonic", lambda: self.now[self.rank])
        self.messages = [StepMessages(self) for _ in range(size)]  # type: ignore[arg-type]

    def any(self, flag: bool) -> bool:
        assert flag == self.flags[self.rank]
        self.num_exchanges += 1
        return any(self.flags)

    def step(self, seconds: Sequence[float], flags: Sequence[bool]) -> bool:
        """Trains a step that takes `seconds` in each process; returns the common answer."""
        sent = []
        for rank, messages in enumerate(self.messages):
            self.rank = rank
            sent.append(messages.outgoing())
            self.now[rank] += seconds[rank]
        self.flags = flags
        num_exchanges = self.num_exchanges
        answers = []
        for rank, messages in enumerate(self.messages):
            self.rank = rank
            messages.receive(*(sum(column) for column in zip(*sent, strict=True)), self.size)
            answers.append(messages.any(flags[rank]))
        # If only some processes took part in an exchange, they would wait for ever.
        assert self.num_exchanges - num_exchanges in (0, self.size)
        assert len(set(answers)) == 1
        return answers[0]


@pytest.fixture
def patch() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


_SECONDS = st.floats(0.001, 1.0)
_STEPS = st.integers(2, 4).flatmap(
    lambda size: st.tuples(
        st.lists(st.lists(_SECONDS, min_size=size, max_size=size), min_size=8, max_size=8),
        st.integers(0, size - 1),
        st.integers(0, 5),
    )
)


@given(_STEPS)
def test_a_request_of_one_process_ends_all_after_the_next_step_at_the_latest(
    case: tuple[list[list[float]], int, int],
) -> None:
    seconds, asking, at = case
    with pytest.MonkeyPatch.context() as patch:
        group = Group(len(seconds[0]), patch)
        for step, durations in enumerate(seconds):
            flags = [rank == asking and step >= at for rank in range(group.size)]
            if group.step(durations, flags):
                assert step in (at, at + 1)
                return
    raise AssertionError("no process stopped")


@pytest.mark.parametrize(("seconds", "delay", "exchanges"), [(0.01, 1, 0), (2.0, 0, 3 * 2)])
def test_short_steps_exchange_nothing_more_and_long_ones_end_at_once(
    patch: pytest.MonkeyPatch, seconds: float, delay: int, exchanges: int
) -> None:
    group = Group(3, patch)
    for _ in range(3):  # the first steps have no duration yet, or that of the compilation
        assert not group.step([seconds] * 3, [False] * 3)
    group.num_exchanges = 0
    assert not group.step([seconds] * 3, [False] * 3)
    answers = [group.step([seconds] * 3, [False, True, False]) for _ in range(1 + delay)]
    assert answers == [False] * delay + [True]
    assert group.num_exchanges == exchanges


def test_one_process_stops_at_once_and_sends_nothing() -> None:
    messages = StepMessages(ProcessGroup(None))
    assert not messages.is_used
    assert not messages.any(False)
    assert messages.any(True)
