"""Pools the cases of all folds of a cross-validation: one interval over all groups."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.shards.manifest import MANIFEST_NAME, parse_manifest
from flexunet.errors import ContentError, UsageError
from flexunet.json_files import read_json, read_table
from flexunet.storage import ObjectStore, open_store
from flexunet.tables import csv_table
from job.config import TrainConfig
from job.data.cases import cases_of
from job.data.folds import fold_configs, fold_words, open_folded
from job.metrics.fold_spread import spread_of_folds
from job.metrics.per_case import (
    SIZES,
    CaseMetrics,
    case_cells,
    case_columns,
    parse_case_metrics,
    summarize_cases,
)
from job.runs.layout import CROSS_VALIDATION_NAME, evaluate_again
from job.runs.provenance import as_record, read_origin


def pool_folds(config: TrainConfig) -> dict[str, Any]:
    """Pools all folds and writes the summary to the folder of their common name; returns it.

    Raises:
        UsageError: folds were evaluated in different ways, or on cases of other folds.
        ContentError: the evaluation of a fold is missing, damaged, or of an earlier version.
    """
    output = open_store(config.output)
    names = [str(each.name) for each in fold_configs(config)]
    _check_alike([output.subpath(name) for name in names])
    described = output.subpath(names[0]).get(MANIFEST_NAME)
    manifest = parse_manifest(described, MANIFEST_NAME)
    classes = [each.name for each in manifest.classes if each.id != 0]
    target = output.subpath(str(config.name))
    summary: dict[str, Any] = {"num_folds": len(names), "runs": names}
    summary["init_from"] = _check_cases(config, classes)
    target.put(MANIFEST_NAME, described)
    summary["sizes"] = {}
    for size in SIZES:
        folds = [_read_cases(output.subpath(name), size, classes) for name in names]
        cells = [
            [number, each.id, each.group, *case_cells(each.metrics)]
            for number, fold in enumerate(folds)
            for each in fold
        ]
        columns = ["fold", "id", "group", *case_columns(classes)]
        target.put(f"measures_{size}.csv", csv_table(columns, cells).encode())
        summary["sizes"][size] = {
            "pooled": _summarized([each for fold in folds for each in fold], classes),
            "folds": [_summarized(fold, classes) for fold in folds],
        }
        of_size = summary["sizes"][size]
        of_size["over_folds"] = spread_of_folds(of_size["folds"])
    text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
    target.put(CROSS_VALIDATION_NAME, text.encode())
    return summary


def _check_cases(config: TrainConfig, classes: Sequence[str]) -> list[dict[str, str]]:
    """Checks that each fold was evaluated on its own cases; returns the origins of the weights.

    Other splits of a run, and ensembles of several folds, were trained on the evaluated cases, or
    evaluate other cases.

    Raises:
        UsageError: a fold was evaluated on other cases, or its weights were trained on them.
    """
    started: list[dict[str, str]] = []
    for fold, each in enumerate(fold_configs(config)):
        words = fold_words((fold, config.folds or 0))
        run = open_store(config.output).subpath(str(each.name))
        summary = read_json(run, "evaluation/summary.json", evaluate_again(run)) or {}
        dataset, where = open_folded(each), f"{run.url}/evaluation"
        if summary["split"] != "test":
            raise UsageError(
                f"{where}: evaluates the {summary['split']} split of a run, not its fold; "
                f"{evaluate_again(run)}"
            )
        own = cases_of(dataset.split("test"), is_by_tile=summary["case"] == "tile")
        expected = {case.id for case in own}
        for size in SIZES:
            found = {case.id for case in _read_cases(run, size, classes)}
            if found != expected:
                raise UsageError(
                    f"{where}: has {len(found - expected)} cases that are not in {words} and "
                    f"lacks {len(expected - found)} of its {len(expected)}; {evaluate_again(run)}"
                )
        origins = summary.get("init_from")
        # Earlier versions did not record it.
        if origins is None:
            origins = as_record([read_origin(run, each)], dataset)
        for origin in origins:
            if origin["seen"] == "yes":
                raise UsageError(
                    f"{where}: {origin['run']} was started from {origin['source']}, which was "
                    f"trained on groups of {words}; train the folds under another name without it"
                )
        started += origins
    return started


def _check_alike(runs: Sequence[ObjectStore]) -> None:
    """Checks that all folds were evaluated in the same way.

    Raises:
        UsageError: two folds differ.
        ContentError: an evaluation is missing or damaged.
    """
    first, *others = [_read_protocol(run) for run in runs]
    for run, other in zip(runs[1:], others, strict=True):
        different = [name for name in first if other[name] != first[name]]
        if different:
            raise UsageError(
                f"{run.url}: evaluated with another {' and '.join(different)} "
                f"({', '.join(str(other[name]) for name in different)}) than {runs[0].url} "
                f"({', '.join(str(first[name]) for name in different)}); "
                "evaluate all folds in the same way"
            )


def _read_protocol(run: ObjectStore) -> dict[str, Any]:
    """Returns how the cases of a fold were predicted; training predicts them plainly."""
    name = "evaluation/summary.json"
    summary = read_json(run, name, evaluate_again(run))
    if summary is None:
        raise _missing(run, name)
    try:
        return protocol_of(summary)
    except (TypeError, AttributeError) as error:
        raise _damaged(run, name) from error


def protocol_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns how cases were predicted, in words as keys, from the summary of an evaluation.

    Raises:
        TypeError, AttributeError: the summary is damaged.
    """
    protocol = summary.get("prediction") or {}
    return {
        "checkpoint": protocol.get("checkpoint", "best"),
        "number of runs": len(protocol.get("runs", ["itself"])),
        "flips": protocol.get("flips", "none"),
        "overlap": summary["overlap"],
        "removal of small regions": bool(protocol.get("small_regions")),
        "postprocessing": _postprocessing_kind(protocol.get("postprocessing")),
        "kind of case": summary["case"],
    }


def _postprocessing_kind(used: dict[str, Any] | None) -> str:
    """Returns how probabilities became masks; each fold may have fitted its own values."""
    if not used:
        return "none"
    if not used.get("fitted_on"):
        return f"thresholds {used['thresholds']}, smallest regions {used['min_region']}"
    # Earlier versions did not record what options had replaced.
    given = [f"{name} {used[name]}" for name in used.get("given", ())]
    return ", but ".join(["fitted", *given])


@dataclass(frozen=True)
class _FoldCase:
    """A case of a fold, from the tables of its evaluation."""

    id: str
    group: str
    metrics: CaseMetrics


def _summarized(cases: Sequence[_FoldCase], classes: Sequence[str]) -> dict[str, Any]:
    return summarize_cases(
        [each.metrics for each in cases], [each.group for each in cases], classes
    )


def _read_cases(run: ObjectStore, size: str, classes: Sequence[str]) -> list[_FoldCase]:
    name = f"evaluation/measures_{size}.csv"
    rows = read_table(run, name, evaluate_again(run))
    if rows is None:
        raise _missing(run, name)
    try:
        return [
            _FoldCase(row["id"], row["group"], parse_case_metrics(row, classes)) for row in rows
        ]
    except ValueError as error:
        raise _damaged(run, name) from error


def _missing(run: ObjectStore, name: str) -> ContentError:
    return ContentError(f"{run.url}/{name} is missing; {evaluate_again(run)}")


def _damaged(run: ObjectStore, name: str) -> ContentError:
    return ContentError(f"{run.url}/{name}: damaged; {evaluate_again(run)}")
