"""Cross-validation: every case of train and valid is predicted by a run that never saw its group.

One run for each fold, in a process of its own, named NAME-fold-0 and so on; each resumes as any
run. Fold k is evaluated, fold k + 1 validates (it chooses the epoch), the others train; the test
split is not touched. At the end the cases of all folds are pooled: one interval over all groups,
where a single fold would have few.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from data_prep.shards.manifest import MANIFEST_NAME, parse_manifest
from data_prep.shards.sample_table import read_samples
from data_prep.splits.leaks import classes_missing
from data_prep.splits.split import assign_folds
from flexunet.errors import ContentError, UsageError
from flexunet.json_files import evaluate_again, read_json, read_table
from flexunet.python_path import safe_environment
from flexunet.settings import write_yaml
from flexunet.storage import Store, join_url, open_store
from flexunet.tables import csv_table
from job.config import TrainConfig
from job.data.cases import pictures_of
from job.data.dataset import open_dataset
from job.data.folds import evaluated_words, open_folded
from job.metrics.per_case import (
    SIZES,
    Case,
    case_cells,
    case_columns,
    lesion_words,
    measure_rows,
    read_case,
    size_notes,
    summarize_cases,
    titled_sizes,
)
from job.reporting.terminal import measures_table
from job.runs.layout import CROSS_VALIDATION_NAME, checked_run_name
from job.runs.provenance import as_record, read_origin, refuse_seen

logger = logging.getLogger(__name__)

_TICK_S = 0.2
_FOLDS_BESIDE = 4  # of a table that fits 80 columns

Command = Callable[[TrainConfig, str], list[str]]  # a fold's config, its file -> arguments


def is_cross_validation(config: TrainConfig) -> bool:
    """Returns whether `config` is of all folds, and not of a run that trains one of them."""
    return config.folds is not None and config.fold is None


def fold_configs(config: TrainConfig) -> list[TrainConfig]:
    """Returns the config of every fold's run.

    Raises:
        UsageError: the names would be too long.
    """
    return [
        config.model_copy(update={"fold": k, "name": checked_run_name(f"{config.name}-fold-{k}")})
        for k in range(config.folds or 0)
    ]


def own_process(module: str, *arguments: str) -> Command:
    """Returns the command line of a process that trains one fold by `module`."""

    def command(config: TrainConfig, file: str) -> list[str]:
        return [sys.executable, "-m", module, *arguments, "--config", file]

    return command


def cross_validate(
    config: TrainConfig, command: Command, num_parallel: int, should_stop: Callable[[], bool]
) -> int:
    """Trains all folds, `num_parallel` at a time, pools their cases; returns the exit code.

    A fold that is finished is not trained again. At the first that fails, or when `should_stop`
    answers yes, the others are stopped, which saves them.

    Raises:
        UsageError: too few groups, a name that is too long, or a fold would start from weights
            that have seen its cases.
    """
    configs = fold_configs(config)
    for each in configs:
        dataset = open_folded(each)
        for name in ("train", "valid"):
            dataset.split(name)
        refuse_seen(each, dataset)
    _tell_missing_classes(config)
    with tempfile.TemporaryDirectory(prefix="flexunet-folds-") as folder, _processes() as running:
        waiting = list(configs)
        code, is_told = 0, False
        while running or (waiting and not code):
            if should_stop() and not is_told:
                code, is_told = code or 6, True
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


def _tell_missing_classes(config: TrainConfig) -> None:
    """Warns of folds without a pixel of a class, whose figures then say nothing of it."""
    dataset = open_dataset(str(config.data))
    rows = read_samples(open_store(dataset.url), dataset.manifest).to_pylist()
    pool = [row for row in rows if row["split"] != "test"]
    folds = assign_folds(
        {row["id"]: row["group"] for row in pool},
        num_folds=int(config.folds or 0),
        seed=dataset.manifest.seed,
    )
    places = [(f"fold {folds[row['id']]}", row["pixels_per_class"]) for row in pool]
    for line in classes_missing(places, [each.name for each in dataset.manifest.classes]):
        logger.warning("%s", line)


@contextmanager
def _processes() -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Yields a list whose processes are ended with the block."""
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
        file.write(write_yaml(config))
    # A session of its own: Ctrl-C reaches this process alone, which passes it on once.
    return subprocess.Popen(  # noqa: S603 - ours
        command(config, path), env=safe_environment(), start_new_session=True
    )


def _terminate(running: Sequence["subprocess.Popen[bytes]"]) -> None:
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)


# Pooling


def pool_folds(config: TrainConfig) -> dict[str, Any]:
    """Writes what all folds together score into the folder of their common name; returns it.

    Raises:
        UsageError: folds were evaluated in unequal ways, or on other cases than their own.
        ContentError: a fold's evaluation is missing or damaged, or lacks what has come since.
    """
    output = open_store(config.output)
    names = [str(each.name) for each in fold_configs(config)]
    _check_alike([output.below(name) for name in names])
    described = output.below(names[0]).get(MANIFEST_NAME)
    manifest = parse_manifest(described, MANIFEST_NAME)
    classes = [each.name for each in manifest.classes if each.id != 0]
    target = output.below(str(config.name))
    summary: dict[str, Any] = {"num_folds": len(names), "runs": names}
    summary["init_from"] = _check_cases(config, classes)
    target.put(MANIFEST_NAME, described)
    summary["sizes"] = {}
    for size in SIZES:
        folds = [_read_cases(output.below(name), size, classes) for name in names]
        cells = [
            [number, each.id, each.group, *case_cells(each.case)]
            for number, fold in enumerate(folds)
            for each in fold
        ]
        columns = ["fold", "id", "group", *case_columns(classes)]
        target.put(f"measures_{size}.csv", csv_table(columns, cells).encode())
        summary["sizes"][size] = {
            "pooled": _summarized([each for fold in folds for each in fold], classes),
            "folds": [_summarized(fold, classes) for fold in folds],
        }
    text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
    target.put(CROSS_VALIDATION_NAME, text.encode())
    return summary


def _check_cases(config: TrainConfig, classes: Sequence[str]) -> list[dict[str, str]]:
    """Refuses folds that were not evaluated on their own cases; returns what their runs began from.

    Another split of a run, and an ensemble of runs of several folds, have seen what they are
    evaluated on, or are evaluated on other cases.

    Raises:
        UsageError: names the fold, and what is wrong with it.
    """
    started: list[dict[str, str]] = []
    for fold, each in enumerate(fold_configs(config)):
        run = open_store(config.output).below(str(each.name))
        summary = read_json(run, "evaluation/summary.json", evaluate_again(run)) or {}
        dataset, where = open_folded(each), f"{run.url}/evaluation"
        if summary["split"] != "test":
            raise UsageError(
                f"{where}: of the {summary['split']} split of a run, which is no fold; "
                f"{evaluate_again(run)}"
            )
        own = pictures_of(dataset.split("test"), is_by_tile=summary["case"] == "tile")
        expected = {picture.id for picture in own}
        for size in SIZES:
            found = {case.id for case in _read_cases(run, size, classes)}
            if found != expected:
                raise UsageError(
                    f"{where}: holds {len(found - expected)} cases that are not of fold {fold} and "
                    f"lacks {len(expected - found)} of its {len(expected)}; {evaluate_again(run)}"
                )
        origins = summary.get("init_from")
        # An earlier version did not record it.
        if origins is None:
            origins = as_record([read_origin(run, each)], dataset)
        for origin in origins:
            if origin["seen"] == "yes":
                raise UsageError(
                    f"{where}: {origin['run']} was started from {origin['source']}, which has seen "
                    f"groups of fold {fold}; train the folds under another name without it"
                )
        started += origins
    return started


def _check_alike(runs: Sequence[Store]) -> None:
    """Refuses folds whose numbers mean different things, as one was evaluated again in another way.

    Raises:
        UsageError: names two of them, and what differs.
        ContentError: an evaluation is missing or damaged.
    """
    first, *others = [_read_way(run) for run in runs]
    for run, other in zip(runs[1:], others, strict=True):
        different = [name for name in first if other[name] != first[name]]
        if different:
            raise UsageError(
                f"{run.url}: evaluated with another {' and '.join(different)} "
                f"({', '.join(str(other[name]) for name in different)}) than {runs[0].url} "
                f"({', '.join(str(first[name]) for name in different)}); evaluate all folds alike"
            )


def _read_way(run: Store) -> dict[str, Any]:
    """Returns how the cases of a fold were predicted; one that training evaluated: plainly."""
    name = "evaluation/summary.json"
    summary = read_json(run, name, evaluate_again(run))
    if summary is None:
        raise _missing(run, name)
    try:
        way = summary.get("prediction") or {}
        return {
            "checkpoint": way.get("checkpoint", "best"),
            "number of runs": len(way.get("runs", ["itself"])),
            "flips": way.get("flips", "none"),
            "overlap": summary["overlap"],
            "removal of small regions": bool(way.get("small_regions")),
            "kind of case": summary["case"],
        }
    except (TypeError, AttributeError) as error:
        raise _damaged(run, name) from error


@dataclass(frozen=True)
class _FoldCase:
    """A case of a fold, as its evaluation has stored it."""

    id: str
    group: str
    case: Case


def _summarized(cases: Sequence[_FoldCase], classes: Sequence[str]) -> dict[str, Any]:
    return summarize_cases([each.case for each in cases], [each.group for each in cases], classes)


def _read_cases(run: Store, size: str, classes: Sequence[str]) -> list[_FoldCase]:
    name = f"evaluation/measures_{size}.csv"
    rows = read_table(run, name, evaluate_again(run))
    if rows is None:
        raise _missing(run, name)
    try:
        return [_FoldCase(row["id"], row["group"], read_case(row, classes)) for row in rows]
    except ValueError as error:
        raise _damaged(run, name) from error


def _missing(run: Store, name: str) -> ContentError:
    return ContentError(f"{run.url}/{name} is missing; {evaluate_again(run)}")


def _damaged(run: Store, name: str) -> ContentError:
    return ContentError(f"{run.url}/{name}: damaged; {evaluate_again(run)}")


def show_folds(config: TrainConfig) -> None:
    """Prints the measures of every fold and of all of them together."""
    from rich.console import Console

    url = join_url(config.output, str(config.name))
    summary = json.loads(open_store(url).get(CROSS_VALIDATION_NAME))
    console = Console()
    sizes = titled_sizes(summary["sizes"])
    for title, found in sizes:
        console.print(measures_table(f"cases of all folds, {title}", found["pooled"]))
        labels = [label for label, _ in measure_rows(found["pooled"])]
        folds = [dict(measure_rows(each)) for each in found["folds"]]
        for first in range(0, len(folds), _FOLDS_BESIDE):
            beside = dict(enumerate(folds[first : first + _FOLDS_BESIDE], start=first))
            console.print(_folds_table(title, labels, beside))
        for line in size_notes(title, found["pooled"]):
            console.print(line, style="dim")
    console.print(lesion_words(sizes[0][1]["pooled"]), style="dim")
    where = f"cross-validation: {url}/{CROSS_VALIDATION_NAME}"
    console.print(where, markup=False, highlight=False, soft_wrap=True)


def _folds_table(title: str, labels: Sequence[str], folds: Mapping[int, Mapping[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title=f"fold by fold, {title}")
    table.add_column("measure", overflow="fold")
    for fold in folds:
        table.add_column(f"{fold}", justify="right", no_wrap=True)
    for label in labels:
        table.add_row(label, *(_shown(each.get(label)) for each in folds.values()))
    return table


def _shown(measure: Mapping[str, Any] | None) -> str:
    if measure is None or measure["value"] is None:
        return "-"
    return f"{measure['value']:.4f}"
