"""Trains the folds of a cross-validation, and pools their cases.

Each fold is a run in its own process, named NAME-fold-0 and so on, and resumes like any run. The
run of fold k is evaluated on fold k, validates on fold k + 1 (which selects the best epoch) and
trains on the others. So no run trains on the groups of its evaluation. The test split is not used.
At the end the cases of all folds are pooled, for one interval over all groups.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from data_prep.shards.sample_table import read_samples
from data_prep.splits.leaks import classes_missing
from data_prep.splits.split import assign_folds
from flexunet.python_path import safe_environment
from flexunet.settings import write_yaml
from flexunet.storage import open_store
from job.config import TrainConfig
from job.data.dataset import open_dataset
from job.data.folds import evaluated_words, fold_configs, fold_words, open_folded
from job.evaluation.fold_pooling import pool_folds
from job.runs.provenance import check_no_leakage

logger = logging.getLogger(__name__)

_TICK_S = 0.2

Command = Callable[[TrainConfig, str], list[str]]  # a fold's config, its file -> arguments


def separate_process(module: str, *arguments: str) -> Command:
    """Returns a function that makes the command line of a fold's process, running `module`."""

    def command(config: TrainConfig, file: str) -> list[str]:
        return [sys.executable, "-m", module, *arguments, "--config", file]

    return command


def cross_validate(
    config: TrainConfig, command: Command, num_parallel: int, should_stop: Callable[[], bool]
) -> int:
    """Trains all folds, `num_parallel` at a time, pools their cases; returns the exit code.

    Skips finished folds. After the first failure, or when `should_stop` returns true, stops the
    other folds, which save their state.

    Raises:
        UsageError: too few groups, a name is too long, or the initial weights of a fold have seen
            its evaluated cases.
    """
    configs = fold_configs(config)
    for each in configs:
        dataset = open_folded(each)
        for name in ("train", "valid"):
            dataset.split(name)
        check_no_leakage(each, dataset)
    _warn_of_missing_classes(config)
    with tempfile.TemporaryDirectory(prefix="flexunet-folds-") as folder, _processes() as running:
        waiting = list(configs)
        code, is_reported = 0, False
        while running or (waiting and not code):
            if should_stop() and not is_reported:
                code, is_reported = code or 6, True
                _terminate(running)
            while waiting and not code and len(running) < num_parallel:
                each = waiting.pop(0)
                logger.info("%s: %s/%s", evaluated_words(each), each.output, each.name)
                running.append(_start(each, command, folder))
            time.sleep(_TICK_S)
            for process in [each for each in running if each.poll() is not None]:
                running.remove(process)
                if process.returncode and not code:
                    code = process.returncode if process.returncode > 0 else 1
                    _terminate(running)
    if code == 0:
        pool_folds(config)
    return code


def _warn_of_missing_classes(config: TrainConfig) -> None:
    """Warns of folds without a pixel of a class, whose values do not cover that class."""
    dataset = open_dataset(str(config.data))
    rows = read_samples(open_store(dataset.url), dataset.manifest).to_pylist()
    pool = [row for row in rows if row["split"] != "test"]
    folds = assign_folds(
        {row["id"]: row["group"] for row in pool},
        num_folds=int(config.folds or 0),
        seed=dataset.manifest.seed,
    )
    places = [
        (fold_words((folds[row["id"]], config.folds or 0)), row["pixels_per_class"]) for row in pool
    ]
    for line in classes_missing(places, [each.name for each in dataset.manifest.classes]):
        logger.warning("%s", line)


@contextmanager
def _processes() -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Yields a list of processes that are killed at the end of the block."""
    running: list[subprocess.Popen[bytes]] = []
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


def _start(config: TrainConfig, command: Command, folder: str) -> "subprocess.Popen[bytes]":
    path = os.path.join(folder, f"{config.name}.yaml")
    with open(path, "w", encoding="utf-8") as file:
        file.write(write_yaml(config, only_set=True))  # the rest is planned
    # A new session: only this process gets Ctrl-C, and passes it on once.
    return subprocess.Popen(  # noqa: S603 - ours
        command(config, path), env=safe_environment(), start_new_session=True
    )


def _terminate(running: Sequence["subprocess.Popen[bytes]"]) -> None:
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
