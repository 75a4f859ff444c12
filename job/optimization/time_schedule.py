"""Fits a training into a given time: the part of the time that each step has used.

No two runs read the same clock. So the part is kept in thousandths, and each change is recorded
with the step from which it holds. The record is in every checkpoint and in
`metrics/time_schedule.csv`: it tells what the clock has decided, and a run that follows the record
of another computes the same.
"""

import bisect
import csv
import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from flexunet.errors import UsageError
from flexunet.storage import NotFound, open_store
from flexunet.tables import csv_table

RECORD_NAME = "metrics/time_schedule.csv"
_PARTS = 1000
_COLUMNS = ("step", "time_fraction")

Record: TypeAlias = list[list[float]]  # [step, part of the time from this step on], in order


def seconds_of(minutes: float) -> float:
    """Returns a time budget in seconds."""
    return minutes * 60


class TrainingClock:
    """Measures the training time of a run over all its attempts, in seconds."""

    def __init__(self, before_s: float, now: Callable[[], float] = time.monotonic) -> None:
        """Starts now.

        Args:
            before_s: training time of the attempts before.
            now: returns the time, s.
        """
        self._before_s, self._now = before_s, now
        self._started_s = now()

    def used_s(self) -> float:
        """Returns the training time of the run until now."""
        return self._before_s + self._now() - self._started_s


@dataclass
class TimeSchedule:
    """Holds the training time of a run, and the record of its parts; JSON types only.

    Attributes:
        budget_s: training time that the run may use, with validation and checkpoints.
        used_s: training time used until the last reading of the clock, or checkpoint.
        reserve_s: time that the end of the last epoch took, kept for that of the last one.
        record: of the parts of the time.
    """

    budget_s: float
    used_s: float = 0.0
    reserve_s: float = 0.0
    record: Record = field(default_factory=list)

    def __post_init__(self) -> None:
        """Starts without a record to follow, which no checkpoint has."""
        self._followed: Record | None = None

    def follow(self, record: Record) -> None:
        """Takes the parts from the record of another run from now on, not from the clock."""
        self._followed = record

    def begin(self, budget_s: float, step: int) -> None:
        """Continues a run with a budget, which may differ from that of the attempt before.

        Args:
            step: the next.
        """
        if budget_s != self.budget_s:
            self.budget_s = budget_s
            self._set(self._measured(step), step)

    def note(self, used_s: float, step: int) -> None:
        """Takes a reading of the clock, the same in all processes.

        The part never falls, though the reserve may: else the learning rate would rise again.

        Args:
            step: the first that the reading concerns.
        """
        self.used_s = used_s
        fraction = self._measured(step)
        self._set(fraction if self._followed else max(fraction, self.fraction_at(step)), step)

    def _measured(self, step: int) -> float:
        if self._followed is not None:
            return _value_at(self._followed, step)
        return _fraction(self.used_s, self.budget_s - self.reserve_s)

    def _set(self, fraction: float, step: int) -> None:
        if self.record and self.record[-1][0] == step:
            self.record[-1][1] = fraction
        elif fraction != self.fraction_at(step):
            self.record.append([step, fraction])

    def note_epoch_end(self, used_s: float, step: int) -> None:
        """Takes the reading after an epoch and its validation.

        The last reading before was that of the epoch's last step.
        """
        self.reserve_s = max(0.0, used_s - self.used_s)
        self.note(used_s, step)

    def fraction_at(self, step: int) -> float:
        """Returns the part of the time that was used before `step`, 0 to 1."""
        return _value_at(self.record, step)

    @property
    def is_over(self) -> bool:
        """Whether the time for training steps is used up."""
        return bool(self.record) and self.record[-1][1] >= 1

    def table(self) -> str:
        """Returns the record as CSV."""
        return csv_table(list(_COLUMNS), ((int(step), value) for step, value in self.record))


def _fraction(used_s: float, available_s: float) -> float:
    """Returns the used part in thousandths, rounded down; 1 if nothing is available."""
    if used_s >= available_s:
        return 1.0
    return math.floor(max(0.0, used_s) / available_s * _PARTS) / _PARTS


def _value_at(record: Sequence[Sequence[float]], step: int) -> float:
    number = bisect.bisect_right([entry[0] for entry in record], step)
    return float(record[number - 1][1]) if number else 0.0


def read_record(run: str) -> Record:
    """Returns the record of a finished run.

    Args:
        run: folder or URL of the run.

    Raises:
        UsageError: it has none, or did not end by its time.
    """
    store = open_store(run)
    where = f"--time-schedule: {store.url}/{RECORD_NAME}"
    try:
        text = store.get(RECORD_NAME).decode()
        rows = list(csv.DictReader(io.StringIO(text)))
        record = [[int(row[_COLUMNS[0]]), float(row[_COLUMNS[1]])] for row in rows]
    except NotFound as error:
        raise UsageError(
            f"{where} does not exist; give a run that was trained with --time-budget"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{where} is damaged ({error}); restore it") from error
    if not record or record[-1][1] < 1:
        raise UsageError(f"{where} does not reach 1; give a run that used its whole time")
    return record
