"""Collects the data of a run itself for the report: curves, dataset, attempts, environment."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.imaging.arrays import has_planes
from data_prep.shards.manifest import Manifest, ReducedInfo
from flexunet.json_files import read_json
from flexunet.storage import ObjectStore
from flexunet.text import pluralize
from job.distributed.watchdog import STACKS_FOLDER
from job.planning.plan_file import read_plan
from job.planning.plan_words import COLUMNS, plan_rows, summary_rows
from job.reporting.csv_tables import CURVE_TITLES
from job.reporting.views.parts import Figure, Table, missing_groups, png_figure, read_bytes
from job.runs.layout import LEASE_NAME, RESTORE
from job.runs.status import read_ends


@dataclass(frozen=True)
class FoldedSplits:
    """The folds of train and valid together, in words, and their number of samples."""

    folds: str
    num_samples: int
    samples: str


@dataclass(frozen=True)
class DatasetCard:
    """The properties of a dataset, its splits, and whether splits share groups or images.

    Attributes:
        splits: those of the dataset, or the samples from which folds are drawn.
        missing_groups: see `missing_groups`.
    """

    table: Table
    splits: Table | FoldedSplits
    is_leaky: bool
    missing_groups: str | None


@dataclass(frozen=True)
class Attempts:
    """The attempts of a run, and the stack dumps of stalled processes."""

    num_restarts: int
    table: Table
    stacks: Sequence[str]


def curves_of(store: ObjectStore) -> list[Figure]:
    """Returns the curves that training drew."""
    found = [
        (read_bytes(store, f"metrics/{stem}.png"), title) for stem, title in CURVE_TITLES.items()
    ]
    return [png_figure(data, title) for data, title in found if data is not None]


def dataset_card(manifest: Manifest | None, folds: str | None) -> DatasetCard | None:
    """Returns the card of a dataset.

    Args:
        folds: the folds of train and valid, in words; None: the splits of the dataset are used.
    """
    if manifest is None:
        return None
    size = f"{manifest.image_width} x {manifest.image_height}"
    channels = pluralize(manifest.channels, "channel")
    if has_planes(manifest.channels):
        channels += " (figures show channel 1)"
    rows = [
        ("name", manifest.name),
        ("images", f"{size}, {channels}, {manifest.bit_depth} bits, {manifest.geometry}"),
        ("classes", ", ".join(each.name for each in manifest.classes)),
        ("splits", f"{manifest.split_rule}, seed {manifest.seed}"),
        ("groups", manifest.group_rule),
        ("made by version", manifest.tool_version),
    ]
    return DatasetCard(
        table=Table(("dataset", ""), rows),
        splits=_splits(manifest, folds),
        # Folds consist of whole groups, even if the splits of the dataset share groups.
        is_leaky=manifest.leaky and folds is None,
        missing_groups=missing_groups(manifest),
    )


def _splits(manifest: Manifest, folds: str | None) -> Table | FoldedSplits:
    samples = "tiles" if manifest.geometry == "tile" else "images"
    if folds is None:
        rows = [(name, info.num_samples, info.num_groups) for name, info in manifest.splits.items()]
        return Table(("split", samples, "groups"), rows)
    of_both = [manifest.splits[name] for name in ("train", "valid") if name in manifest.splits]
    return FoldedSplits(folds, sum(info.num_samples for info in of_both), samples)


def lost_regions(manifest: Manifest | None, *, is_folded: bool) -> Table | None:
    """Returns the mask regions that downscaling removed from the dataset, or None.

    Args:
        is_folded: folds use train and valid together, and leave out test.
    """
    if manifest is None or not manifest.reduced:
        return None
    of_splits: dict[str, list[ReducedInfo]] = {}
    for split, info in manifest.reduced.items():
        if not (is_folded and split == "test"):
            of_splits.setdefault("all folds" if is_folded else split, []).append(info)
    rows = [
        (
            cases,
            each.name,
            sum(info.num_pictures for info in infos),
            sum(info.num_regions[each.id] for info in infos),
            sum(info.num_vanished[each.id] for info in infos),
            sum(info.num_emptied for info in infos),
        )
        for cases, infos in of_splits.items()
        for each in manifest.classes
        if each.id
    ]
    columns = (
        "split",
        "class",
        "images",
        "source regions",
        "lost regions",
        "images that lost all foreground",
    )
    return Table(columns, rows)


def attempts_of(store: ObjectStore, outcome: Mapping[str, Any] | None) -> Attempts | None:
    """Returns the attempts of a run that trained, or None before its start."""
    lease = read_json(store, LEASE_NAME, RESTORE)
    if lease is None:
        return None
    ends = read_ends(store)
    bases = {
        int(attempt): base
        for attempt, base in lease["bases"].items()
        # These trained nothing: a status check of the launcher, a command on a finished run.
        if ends.get(int(attempt), {}).get("end") != "looked"
        and not (outcome and int(attempt) > outcome["attempt"])
    }
    last = max(bases, default=0)
    rows = [
        (attempt, base or "new run", _end_of(attempt, last, outcome, ends.get(attempt)))
        for attempt, base in sorted(bases.items())
    ]
    return Attempts(
        num_restarts=max(len(bases) - 1, 0),
        table=Table(("attempt", "started from", "end"), rows),
        stacks=[stat.name for stat in store.list(f"{STACKS_FOLDER}/")],
    )


def _end_of(
    attempt: int, last: int, outcome: Mapping[str, Any] | None, end: Mapping[str, Any] | None
) -> str:
    if end is not None:
        return f"stopped and saved at epoch {end['epoch']}, step {end['step']}"
    if attempt < last:
        return "killed, or ended by an error"
    return str(outcome["status"]) if outcome else "still running, or killed"


@dataclass(frozen=True)
class PlanView:
    """The plan of a run: what it rests on, its choices, and its notes."""

    summary: Table
    choices: Table
    notes: Sequence[str]


def plan_of(store: ObjectStore) -> PlanView | None:
    """Returns the plan of a run or a cross-validation; None if it was not planned."""
    plan = read_plan(store)
    if plan is None:
        return None
    return PlanView(
        Table(("planned from", ""), summary_rows(plan)), Table(COLUMNS, plan_rows(plan)), plan.notes
    )


def environment_of(store: ObjectStore) -> Table | None:
    """Returns the environment of the last attempt, or None before the start."""
    values = read_json(store, "environment.json", RESTORE)
    if values is None:
        return None
    rows = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {version}" for name, version in value.items())
        elif isinstance(value, list):
            value = ", ".join(str(each) for each in value)
        rows.append((key, str(value)))
    return Table(("environment of the last attempt", ""), rows)
