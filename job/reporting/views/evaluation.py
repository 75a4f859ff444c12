"""Collects the summary of an evaluation for the report: headline, weights, protocol, metrics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    measure_label,
    no_foreground_words,
    summarized_words,
    titled_sizes,
)
from job.reporting.views.measures import Size, sizes_of
from job.reporting.views.parts import Rgb, Table, read_config
from job.runs.status import run_status

_STATUS_PHRASES = {"open": "not finished", "stopped": "stopped before its end"}

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
class Metrics:
    """The measures of a split.

    Attributes:
        everything: the Dice of each class beside that of predicting it on every pixel.
        warnings: on classes that are predicted no better.
    """

    split: str
    prediction: Prediction
    pixels: Table
    everything: Table
    warnings: Sequence[str]
    sizes: Sequence[Size]


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


def metrics_of(summary: Mapping[str, Any] | None, colors: Mapping[str, Rgb]) -> Metrics | None:
    """Returns the metrics of the newest evaluation of a run.

    Args:
        colors: of classes by name.
    """
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
        everything=_everything(summary, colors),
        warnings=baseline_warnings(summary),
        sizes=sizes_of(titled_sizes(summary.get("sizes", {})), colors),
    )


def _everything(summary: Mapping[str, Any], colors: Mapping[str, Rgb]) -> Table:
    columns = ("class, network size", measure_label("dice_mean"), EVERYTHING)
    return Table(columns, everything_rows(summary), colors)


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
