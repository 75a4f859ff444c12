"""Reads the epochs of compared runs: values over epochs and over minutes of training."""

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from flexunet.errors import ContentError
from flexunet.json_files import read_table
from job.comparison.runs import ComparedRun, config_of
from job.runs.layout import RESTORE

Point = tuple[float, float]

COLUMNS = ("val_foreground_dice", "val_loss", "loss")


@dataclass(frozen=True)
class RunCurves:
    """The epochs of a run.

    Attributes:
        epochs: from 1.
        minutes: of training steps up to the end of each epoch, without validation; None: unknown.
        values: by column of `metrics/history.csv`, as long as `epochs`; None where undefined.
    """

    epochs: Sequence[int]
    minutes: Sequence[float] | None
    values: Mapping[str, Sequence[float | None]]

    def points(self, column: str, *, over_minutes: bool) -> list[Point]:
        """Returns (epoch or minutes, value) of each epoch with a finite value."""
        places: Sequence[float] = (self.minutes or []) if over_minutes else self.epochs
        values = self.values.get(column, ())
        return [
            (place, value)
            for place, value in zip(places, values, strict=False)
            if value is not None and math.isfinite(value) and math.isfinite(place)
        ]


def curves_of(run: ComparedRun) -> RunCurves | None:
    """Returns the epochs of a run; None for a cross-validation, and before the first epoch.

    Raises:
        ContentError: a table of the run is damaged.
    """
    rows = read_table(run.store, "metrics/history.csv", RESTORE)
    if not rows or run.summary is None:
        return None
    columns = [name for name in COLUMNS if name in rows[0]]
    with _damage(run, "metrics/history.csv"):
        epochs = [int(row["epoch"]) + 1 for row in rows]
        values = {
            name: [float(row[name]) if row[name] else None for row in rows] for name in columns
        }
    return RunCurves(epochs, _minutes(run, len(rows)), values)


@contextlib.contextmanager
def _damage(run: ComparedRun, name: str) -> Iterator[None]:
    """Reports a cell that is no number as damage of the table `name`."""
    try:
        yield
    except ValueError as error:
        raise ContentError(f"{run.url}/{name}: damaged ({error}); {RESTORE}") from error


def _minutes(run: ComparedRun, num_epochs: int) -> list[float] | None:
    rows = read_table(run.store, "metrics/throughput.csv", RESTORE) or []
    num_images = _num_train_images(run)
    if len(rows) < num_epochs or num_images is None:
        return None
    with _damage(run, "metrics/throughput.csv"):
        rates = [float(row["train_images_per_s"]) for row in rows[:num_epochs]]
    if not all(0 < rate < math.inf for rate in rates):
        return None
    return list(itertools.accumulate(num_images / rate / 60 for rate in rates))


def _num_train_images(run: ComparedRun) -> float | None:
    """Returns the samples of an epoch; about, if the run trains a fold."""
    config, manifest = config_of(run.store), run.manifest
    if config is None or manifest is None or "train" not in manifest.splits:
        return None
    if config.folds is None:
        return manifest.splits["train"].num_samples
    both = [manifest.splits[name] for name in ("train", "valid") if name in manifest.splits]
    return sum(each.num_samples for each in both) * (config.folds - 2) / config.folds
