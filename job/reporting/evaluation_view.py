"""Collects what the report says of an evaluation: its metrics, cases, failures and weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexunet.json_files import read_table
from flexunet.storage import ObjectStore
from flexunet.text import pluralize
from job.optimization.schedule import stopped_early_words
from job.reporting.phrases import (
    checkpoint_words,
    counted_cases,
    has_foreground,
    lesion_words,
    measure_rows,
    no_foreground_words,
    size_notes,
    summarized_words,
    titled_sizes,
)
from job.reporting.view_parts import (
    Figure,
    Table,
    cell_value,
    read_bytes,
    read_config,
    small_figure,
)
from job.runs.layout import evaluate_again
from job.runs.status import run_status

_FAILED_DICE = 0.5  # a case below is listed as a failure
_MAX_FAILURES = 100
_STATUS_PHRASES = {"open": "not finished", "stopped": "stopped before its end"}
_PRESENCES = ("neither", "both", "truth_only", "missed", "prediction_only")
_LESION_COUNTS = ("lesions", "lesions_found", "false_positives", "specks")

Origins = list[tuple[str, str]]  # (source, "yes" | "no" | "unknown": it has seen the cases)


@dataclass(frozen=True)
class Foreground:
    """The mean foreground Dice of a split, and of predicting nothing."""

    dice: float | None
    all_background: float | None
    cases: str
    split: str


@dataclass(frozen=True)
class Headline:
    """How a run stands.

    Attributes:
        weights: by which it was evaluated, in words, or nothing.
        no_foreground: what is said where no case has any.
    """

    status: str
    weights: str = ""
    foreground: Foreground | None = None
    no_foreground: str | None = None


@dataclass(frozen=True)
class Regions:
    """Which small regions are removed, and the split that this was fitted on."""

    num_cases: int
    split: str
    table: Table


@dataclass(frozen=True)
class Prediction:
    """How cases were predicted, where that is not one plain pass of the run.

    Attributes:
        runs: where several predict together.
        flips: of pictures, where there are some.
    """

    is_by_tile: bool
    runs: Sequence[str]
    flips: str | None
    regions: Regions | None


@dataclass(frozen=True)
class Size:
    """The measures of all cases at one size."""

    title: str
    measures: Table
    counts: Table
    num_groups: int
    min_groups: int
    tolerance: str
    lesion_words: str
    notes: Sequence[str]


@dataclass(frozen=True)
class Metrics:
    """What was measured on a split; `thresholds` are others than the one that is used."""

    prediction: Prediction
    pixels: Table
    sizes: Sequence[Size]
    thresholds: Table | None


@dataclass(frozen=True)
class Failures:
    """The cases and classes with a low Dice, worst first; `table` has the first of them."""

    limit: float
    num_pairs: int
    num_failed: int
    num_shown: int
    table: Table


def headline_of(
    store: ObjectStore, summary: Mapping[str, Any] | None, outcome: Mapping[str, Any] | None
) -> Headline:
    """Returns how the run stands and its mean Dice."""
    found = run_status(store)
    status = _STATUS_PHRASES.get(found, found)
    if outcome and outcome.get("stopped_early"):
        status += f" ({stopped_early_words(outcome['epochs'], outcome['best']['epoch'])})"
    if outcome and outcome.get("skipped_steps"):
        number = pluralize(outcome["skipped_steps"], "training step")
        status += f" ({number} skipped, whose gradients overflowed float16)"
    if summary is None:
        return Headline(status)
    used = summary.get("checkpoint")
    weights = f", by {checkpoint_words(used)}" if used else ""
    if not has_foreground(summary):
        return Headline(status, weights, no_foreground=no_foreground_words(summary))
    mean, nothing = summary["foreground_mean"], summary["all_background"]["foreground_mean"]
    foreground = Foreground(
        dice=mean["dice"],
        all_background=nothing["dice"],
        cases=counted_cases(summary),
        split=summarized_words(summary),
    )
    return Headline(status, weights, foreground)


def origins_of(store: ObjectStore, summary: Mapping[str, Any] | None) -> Origins | None:
    """Returns where the weights of a run came from; None where that is not recorded."""
    if summary is not None and "init_from" in summary:
        return distinct_origins(summary["init_from"])
    source = read_config(store).get("init_from")
    return distinct_origins([{"source": source, "seen": "unknown"}] if source else [])


def distinct_origins(origins: Sequence[Mapping[str, Any]] | None) -> Origins | None:
    """Returns each source once, and whether it has seen the cases."""
    if origins is None:
        return None
    return sorted({(str(each["source"]), str(each["seen"])) for each in origins})


def metrics_of(store: ObjectStore, summary: Mapping[str, Any] | None) -> Metrics | None:
    """Returns what the page shows of the newest evaluation of a run."""
    if summary is None:
        return None
    nothing = summary["all_background"]
    pixels = Table(
        ("pixels", "value", "all background"),
        [
            (
                "pixel accuracy (hides what is missed)",
                summary["pixel_accuracy"],
                nothing["pixel_accuracy"],
            ),
            ("loss", summary["loss"], None),
        ],
    )
    return Metrics(
        prediction=_prediction(summary),
        pixels=pixels,
        sizes=[
            size_of(title, measures) for title, measures in titled_sizes(summary.get("sizes", {}))
        ],
        thresholds=_thresholds(store),
    )


def _prediction(summary: Mapping[str, Any]) -> Prediction:
    protocol = summary.get("prediction") or {}
    runs = protocol.get("runs", ())
    flips = protocol.get("flips", "none")
    return Prediction(
        is_by_tile=summary.get("case") == "tile",
        runs=[each["run"] for each in runs] if len(runs) > 1 else [],
        flips=flips if flips != "none" else None,
        regions=_regions(protocol["small_regions"]) if protocol.get("small_regions") else None,
    )


def _regions(regions: Mapping[str, Any]) -> Regions:
    where = regions["fitted_on"]
    rows = [
        (each["name"], each["min_pixels"], each["dice_before"], each["dice"])
        for each in regions["classes"]
    ]
    columns = ("class", "smallest region, pixels", "Dice there before", "Dice there with it")
    return Regions(where["num_cases"], where["split"], Table(columns, rows))


def _thresholds(store: ObjectStore) -> Table | None:
    sweep = read_table(store, "evaluation/thresholds.csv", evaluate_again(store))
    if not sweep:
        return None
    rows = [
        [row["class"], row["threshold"], *map(cell_value, list(row.values())[2:])] for row in sweep
    ]
    return Table(list(sweep[0]), rows)


def size_of(title: str, measures: Mapping[str, Any]) -> Size:
    """Returns the measures that `summarize_cases` made of all cases at one size."""
    tolerance = " or ".join(
        f"{value:g} {unit}" for unit, value in measures["nsd_tolerance"].items()
    )
    return Size(
        title=title,
        measures=_measures(measures),
        counts=_counts(measures),
        num_groups=measures["num_groups"],
        min_groups=measures["interval"]["min_groups"],
        tolerance=tolerance,
        lesion_words=lesion_words(measures),
        notes=size_notes(title, measures),
    )


def _measures(measures: Mapping[str, Any]) -> Table:
    columns = (
        "measure",
        "value",
        "95 % interval",
        "cases",
        "groups",
        "all background",
        "over cases",
    )
    rows = [
        (
            label,
            each["value"],
            _interval(each),
            each["num_cases"],
            each["num_groups"],
            each["all_background"],
            each["all_background_num_cases"],
        )
        for label, each in measure_rows(measures)
    ]
    return Table(columns, rows)


def _interval(measure: Mapping[str, Any]) -> str | None:
    if measure["low"] is None:
        return None
    return f"{measure['low']:.4f} to {measure['high']:.4f}"


def _counts(measures: Mapping[str, Any]) -> Table:
    columns = (
        "class",
        "in neither mask",
        "in both",
        "nothing predicted",
        "not a pixel found",
        "false alarm",
        "lesions",
        "found",
        "false positives",
        "specks",
    )
    keys = [f"num_{key}" for key in (*_PRESENCES, *_LESION_COUNTS)]
    rows = [(each["name"], *(each[key] for key in keys)) for each in measures["classes"]]
    return Table(columns, rows)


def cases_of(store: ObjectStore) -> list[tuple[str, list[Figure]]] | None:
    """Returns (title, figures) of the best, middle and worst cases; None where there are none."""
    rows = read_table(store, "evaluation/examples.csv", evaluate_again(store))
    if not rows:
        return None
    kinds = (("best", "Best"), ("middle", "Median"), ("worst", "Worst"))
    found = [
        (title, [_case(store, row) for row in rows if row["picture"].startswith(f"{kind}-")])
        for kind, title in kinds
    ]
    return [(title, figures) for title, figures in found if figures]


def _case(store: ObjectStore, row: Mapping[str, str]) -> Figure:
    dice = cell_value(row["foreground_dice"])
    score = "no foreground" if dice is None else f"Dice {dice:.3f}"
    data = read_bytes(store, f"evaluation/overlays/{row['picture']}.png")
    return small_figure(data, f"{row['filename']}: {score}")


def failures_of(store: ObjectStore) -> Failures | None:
    """Returns the cases and classes with a low Dice; None where nothing was measured."""
    rows = read_table(store, "evaluation/measures_network.csv", evaluate_again(store))
    if not rows:
        return None
    classes = [key.removeprefix("presence_") for key in rows[0] if key.startswith("presence_")]
    num_pairs = sum(bool(row[f"dice_{name}"]) for row in rows for name in classes)
    failed = [
        (float(row[f"dice_{name}"]), row, name)
        for row in rows
        for name in classes
        if row[f"dice_{name}"] and float(row[f"dice_{name}"]) < _FAILED_DICE
    ]
    failed.sort(key=lambda each: each[0])
    shown = failed[:_MAX_FAILURES]
    columns = (
        "case",
        "group",
        "class",
        "what",
        "Dice",
        "HD95",
        "unit",
        "lesions found",
        "false positives",
    )
    table = Table(columns, [_failure_row(*each) for each in shown])
    return Failures(_FAILED_DICE, num_pairs, len(failed), len(shown), table)


def _failure_row(dice: float, row: Mapping[str, str], name: str) -> tuple[Any, ...]:
    return (
        row["id"],
        row["group"],
        name,
        _failure(row, name),
        dice,
        cell_value(row[f"hd95_{name}"]),
        row["unit"],
        f"{row[f'found_lesions_{name}']} of {row[f'lesions_{name}']}",
        int(row[f"false_positives_{name}"]),
    )


def _failure(row: Mapping[str, str], name: str) -> str:
    if row[f"presence_{name}"] != "both":
        words = {"truth_only": "nothing predicted", "prediction_only": "false alarm"}
        return words.get(row[f"presence_{name}"], "")
    return "poor overlap" if int(row[f"tp_px_{name}"]) else "not a pixel found"
