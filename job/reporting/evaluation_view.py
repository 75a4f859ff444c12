"""Collects the data of an evaluation for the report: metrics, cases, failures and weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexunet.json_files import read_table
from flexunet.storage import ObjectStore
from flexunet.text import pluralize
from job.optimization.schedule import stopped_early_words
from job.reporting.phrases import (
    BASELINE,
    EVERYTHING,
    baseline_warnings,
    checkpoint_words,
    counted_cases,
    everything_dice,
    everything_rows,
    has_foreground,
    left_out_words,
    lesion_words,
    measure_label,
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
    interval_words,
    name_once,
    read_bytes,
    read_config,
    small_figure,
)
from job.runs.layout import evaluate_again
from job.runs.status import run_status

_FAILED_DICE = 0.5  # of a class in an image; a lower one is listed as a failure
_MAX_FAILURES = 100
_STATUS_PHRASES = {"open": "not finished", "stopped": "stopped before its end"}
_PRESENCES = ("neither", "both", "truth_only", "missed", "prediction_only")
_LESION_COUNTS = ("lesions", "lesions_found", "false_positives", "specks")

# (source, whether it was trained on the cases: "yes", "no" or "unknown")
Origins = list[tuple[str, str]]


@dataclass(frozen=True)
class Foreground:
    """The foreground Dice of a split, mean over images, and those of two baselines.

    Attributes:
        all_foreground: of predicting each class on every pixel; None if it is not recorded.
        cases: how many images have it, in words.
        left_out: how many images have no Dice, and why; None if there are none.
    """

    dice: float | None
    all_background: float | None
    all_foreground: float | None
    cases: str
    split: str
    left_out: str | None


@dataclass(frozen=True)
class Headline:
    """The status of a run and its first number.

    Attributes:
        weights: the evaluated checkpoint, in words, or nothing.
        no_foreground: the sentence for a split without any foreground.
    """

    status: str
    weights: str = ""
    foreground: Foreground | None = None
    no_foreground: str | None = None


@dataclass(frozen=True)
class Regions:
    """The smallest kept region per class, and the split on which it was fitted."""

    num_cases: int
    split: str
    table: Table


@dataclass(frozen=True)
class Prediction:
    """The protocol of an evaluation: runs, flips, windows, removed regions.

    Attributes:
        runs: of an ensemble; empty for one run.
        flips: mirrored images over which the mean is taken, None without them.
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
    """The measures of a split.

    Attributes:
        everything: the Dice of each class beside that of predicting it on every pixel.
        warnings: on classes that are predicted no better.
        thresholds: scores at other thresholds than the one in use.
    """

    split: str
    prediction: Prediction
    pixels: Table
    everything: Table
    warnings: Sequence[str]
    sizes: Sequence[Size]
    thresholds: Table | None


@dataclass(frozen=True)
class Failures:
    """The (image, class) pairs with a low Dice, worst first; `table` has the first of them."""

    limit: float
    num_pairs: int
    num_failed: int
    num_shown: int
    table: Table


def headline_of(
    store: ObjectStore, summary: Mapping[str, Any] | None, outcome: Mapping[str, Any] | None
) -> Headline:
    """Returns the status of a run and its foreground Dice."""
    found = run_status(store)
    status = _STATUS_PHRASES.get(found, found)
    if outcome and outcome.get("stopped_early"):
        status += f" ({stopped_early_words(outcome['epochs'], outcome['best']['epoch'])})"
    if outcome and outcome.get("skipped_steps"):
        number = pluralize(outcome["skipped_steps"], "training step")
        status += f" ({number} skipped because gradients overflowed float16)"
    if summary is None:
        return Headline(status)
    used = summary.get("checkpoint")
    weights = f", with {checkpoint_words(used)}" if used else ""
    if not has_foreground(summary):
        return Headline(status, weights, no_foreground=no_foreground_words(summary))
    mean, nothing = summary["foreground_mean"], summary["all_background"]["foreground_mean"]
    foreground = Foreground(
        dice=mean["dice"],
        all_background=nothing["dice"],
        all_foreground=everything_dice(summary),
        cases=counted_cases(summary),
        split=summarized_words(summary),
        left_out=left_out_words(summary),
    )
    return Headline(status, weights, foreground)


def origins_of(store: ObjectStore, summary: Mapping[str, Any] | None) -> Origins | None:
    """Returns the origin of the initial weights of a run, or None if it is not recorded."""
    if summary is not None and "init_from" in summary:
        return distinct_origins(summary["init_from"])
    source = read_config(store).get("init_from")
    return distinct_origins([{"source": source, "seen": "unknown"}] if source else [])


def distinct_origins(origins: Sequence[Mapping[str, Any]] | None) -> Origins | None:
    """Returns each source once, and whether it was trained on the cases."""
    if origins is None:
        return None
    return sorted({(str(each["source"]), str(each["seen"])) for each in origins})


def metrics_of(store: ObjectStore, summary: Mapping[str, Any] | None) -> Metrics | None:
    """Returns the metrics of the newest evaluation of a run."""
    if summary is None:
        return None
    nothing = summary["all_background"]
    pixels = Table(
        ("measure", "value", BASELINE),
        [
            ("pixel accuracy", summary["pixel_accuracy"], nothing["pixel_accuracy"]),
            ("loss", summary["loss"], None),
        ],
    )
    return Metrics(
        split=summary["split"],
        prediction=_prediction(summary),
        pixels=pixels,
        everything=_everything(summary),
        warnings=baseline_warnings(summary),
        sizes=[
            size_of(title, measures) for title, measures in titled_sizes(summary.get("sizes", {}))
        ],
        thresholds=_thresholds(store),
    )


def _everything(summary: Mapping[str, Any]) -> Table:
    columns = ("class, network size", measure_label("dice_mean"), EVERYTHING)
    return Table(columns, everything_rows(summary))


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
    dice = measure_label("dice_mean")
    columns = (
        "class",
        "smallest kept region, pixels",
        f"{dice}: all regions",
        f"{dice}: kept regions",
    )
    return Regions(where["num_cases"], where["split"], Table(columns, rows))


def _thresholds(store: ObjectStore) -> Table | None:
    sweep = read_table(store, "evaluation/thresholds.csv", evaluate_again(store))
    if not sweep:
        return None
    rows = [
        [row["class"], row["threshold"], *map(cell_value, list(row.values())[2:])] for row in sweep
    ]
    return Table([measure_label(name) for name in sweep[0]], name_once(rows))


def size_of(title: str, measures: Mapping[str, Any]) -> Size:
    """Returns the measures of all cases at one size, from `summarize_cases`."""
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
        "class",
        "measure",
        "value",
        "95 % interval",
        "images",
        "groups",
        BASELINE,
        "images of the baseline",
    )
    rows = [
        (
            owner,
            label,
            each["value"],
            interval_words(each),
            each["num_cases"],
            each["num_groups"],
            each["all_background"],
            each["all_background_num_cases"],
        )
        for owner, label, each in measure_rows(measures)
    ]
    return Table(columns, name_once(rows))


def _counts(measures: Mapping[str, Any]) -> Table:
    columns = (
        "class",
        "in neither mask",
        "in both masks",
        "nothing predicted",
        "missed",
        "false alarm",
        "lesions",
        "lesions found",
        "false positives",
        "tiny regions",
    )
    keys = [f"num_{key}" for key in (*_PRESENCES, *_LESION_COUNTS)]
    rows = [(each["name"], *(each[key] for key in keys)) for each in measures["classes"]]
    return Table(columns, rows)


def cases_of(store: ObjectStore) -> list[tuple[str, list[Figure]]] | None:
    """Returns (title, figures) of the best, middle and worst cases, or None without examples."""
    rows = read_table(store, "evaluation/examples.csv", evaluate_again(store))
    if not rows:
        return None
    kinds = (("best", "Best"), ("middle", "Median (files middle-*.png)"), ("worst", "Worst"))
    found = [
        (title, [_case(store, row) for row in rows if row["picture"].startswith(f"{kind}-")])
        for kind, title in kinds
    ]
    return [(title, figures) for title, figures in found if figures]


def _case(store: ObjectStore, row: Mapping[str, str]) -> Figure:
    dice = cell_value(row["foreground_dice"])
    score = "no foreground" if dice is None else f"image Dice {dice:.3f}"
    data = read_bytes(store, f"evaluation/overlays/{row['picture']}.png")
    return small_figure(data, f"{row['filename']}: {score}")


def failures_of(store: ObjectStore) -> Failures | None:
    """Returns the (image, class) pairs with a low Dice, or None if nothing was measured."""
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
        "image",
        "group",
        "class",
        "problem",
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
    return "poor overlap" if int(row[f"tp_px_{name}"]) else "no overlap"
