"""Renders `MODEL_CARD.md` of an export: data, measures with intervals, intended use, limits.

It has no names of images, groups or patients.
"""

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flexunet.json_files import read_json
from flexunet.storage import ObjectStore
from job.data.folds import fold_words
from job.exporting.options import ExportConfig
from job.exporting.source import ExportSource
from job.postprocessing.masks import Postprocessing
from job.reporting.phrases import (
    BASELINE,
    baseline_warnings,
    checkpoint_words,
    everything_dice,
    has_foreground,
    measure_rows,
    no_foreground_words,
    summarized_words,
    titled_sizes,
)
from job.reporting.views.parts import interval_words, missing_groups, number
from job.runs.layout import CROSS_VALIDATION_NAME, evaluate_again
from job.runs.provenance import read_origin

if TYPE_CHECKING:
    from jinja2 import Environment

Rows = list[tuple[str, ...]]


def render_card(source: ExportSource, config: ExportConfig, metadata: Mapping[str, Any]) -> str:
    """Returns the text of the model card.

    Args:
        metadata: the content of `metadata.json`.

    Raises:
        ContentError: an evaluation of the run is damaged.
    """
    manifest = source.manifest
    summary = summary_of(source)
    return (
        _environment()
        .get_template("MODEL_CARD.md.j2")
        .render(
            metadata=metadata,
            manifest=manifest,
            source=source,
            config=config,
            runs=[_run_words(source, index) for index in range(len(source.runs))],
            origins=_origins_of(source),
            fold=_fold_of(source),
            missing_groups=missing_groups(manifest),
            summary=summary,
            headline=_headline_of(summary) if summary else [],
            sizes=_sizes_of(summary) if summary else [],
            pooled=_pooled_of(source),
            baseline=BASELINE,
        )
    )


def summary_of(source: ExportSource) -> dict[str, Any] | None:
    """Returns the newest evaluation of what is exported, on unseen cases; None: there is none.

    Other weights, mirrored images, another overlap or other masks have other numbers.
    """
    if source.store.stat("evaluation/summary.json") is None:
        return None
    again = evaluate_again(source.store)
    summary = read_json(source.store, "evaluation/summary.json", again)
    if summary is None or summary.get("split") != "test":
        return None
    protocol = summary.get("prediction") or {}
    if protocol.get("flips", "none") != "none" or not _is_predicted_alike(source, summary):
        return None
    members = protocol.get("runs")
    if members:
        is_same = {each["commit_sha256"] for each in members} == {
            each.sha256 for each in source.checkpoints
        }
    else:  # written by the training, of the run alone
        used = (summary.get("checkpoint") or {}).get("epochs")
        is_same = used == [each.epoch for each in source.checkpoints]
    return summary if is_same else None


def _is_predicted_alike(source: ExportSource, summary: Mapping[str, Any]) -> bool:
    """Returns whether the evaluated masks are made as the export's: whole, with its values."""
    protocol = summary.get("prediction") or {}
    # Earlier versions wrote neither the kind of case nor a record of the defaults.
    record = protocol.get("postprocessing") or {}
    values = source.postprocessing.values
    evaluated = Postprocessing(
        tuple(record.get("thresholds", ())), tuple(record.get("min_region", ())), values.temperature
    )
    return (
        protocol.get("small_regions") is None
        and summary.get("case", "picture") == "picture"
        and summary.get("overlap") == source.overlap
        and evaluated.simplified() == values.simplified()
    )


def _run_words(source: ExportSource, index: int) -> str:
    run, checkpoint = source.runs[index], source.checkpoints[index]
    model, config = run.config.model, run.config
    words = f"{model.name} of {model.levels} levels, {config.precision}"
    fold = "" if config.fold is None else f", {fold_words((config.fold, config.folds or 0))}"
    return (
        f"{words}{fold}; epoch {checkpoint.epoch}, step {checkpoint.step}; loss "
        f"{config.loss.name}, seed {config.seed}"
    )


def _origins_of(source: ExportSource) -> list[str]:
    """Returns the origins of all weights that did not start from random numbers."""
    found = []
    for run in source.runs:
        origin = read_origin(run.store, run.config)
        if origin is not None:
            found += [each for each in (origin.source, origin.encoder) if each]
    return sorted(set(found))


def _fold_of(source: ExportSource) -> str | None:
    """Returns the fold of a single run in words; None if it has the splits of its dataset."""
    config = source.runs[0].config
    if len(source.runs) > 1 or config.fold is None:
        return None
    return fold_words((config.fold, config.folds or 0))


def _headline_of(summary: Mapping[str, Any]) -> list[str]:
    """Returns sentences on the foreground Dice and its baselines."""
    used = summary.get("checkpoint")
    weights = f", with {checkpoint_words(used)}" if used else ""
    if not has_foreground(summary):
        return [no_foreground_words(summary)]
    dice, nothing = (
        values["foreground_mean"]["dice"] for values in (summary, summary["all_background"])
    )
    words = (
        f"Foreground Dice {number(dice)} on {summary['num_cases']} cases of "
        f"{summarized_words(summary)}{weights}. Predicting nothing gives {number(nothing)}"
    )
    everything = everything_dice(summary)
    if everything is not None:
        words += f", predicting each class on every pixel {number(everything)}"
    return [f"{words}.", *baseline_warnings(summary)]


def _sizes_of(summary: Mapping[str, Any]) -> list[tuple[str, Rows]]:
    """Returns (title, rows of measures) at network and original size."""
    return [(title, _rows_of(each)) for title, each in titled_sizes(summary.get("sizes", {}))]


def _rows_of(size: Mapping[str, Any]) -> Rows:
    return [
        (
            owner,
            label,
            number(each["value"]),
            interval_words(each) or "-",
            number(each["all_background"]),
            str(each["num_cases"]),
            str(each["num_groups"]),
        )
        for owner, label, each in measure_rows(size)
    ]


def _pooled_of(source: ExportSource) -> list[tuple[str, Rows]]:
    """Returns the measures of all folds, each on cases that its run has not seen."""
    store: ObjectStore = source.store
    if len(source.runs) == 1 or store.stat(CROSS_VALIDATION_NAME) is None:
        return []
    found = read_json(store, CROSS_VALIDATION_NAME, "pool the folds again") or {}
    return [
        (title, _rows_of(each["pooled"])) for title, each in titled_sizes(found.get("sizes", {}))
    ]


@functools.cache
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("job.exporting"),
        autoescape=False,  # noqa: S701 - the page is Markdown
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = _cell
    return environment


def _cell(text: object) -> str:
    """Returns text for a cell of a Markdown table, or for a line."""
    return " ".join(str(text).replace("|", "\\|").split())
