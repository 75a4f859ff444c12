"""Reads what a comparison needs of runs, and checks that they were evaluated on the same cases."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.shards.manifest import Manifest
from flexunet.errors import ContentError, UsageError
from flexunet.json_files import read_json, read_table
from flexunet.storage import ObjectStore, join_url, open_store
from flexunet.text import join_truncated, pluralize
from job.config import TrainConfig, stored_config
from job.evaluation.artifacts import evaluation_folder
from job.metrics.per_case import SIZES, CaseMetrics, parse_case_metrics
from job.reporting.views.parts import read_config, read_dataset_copy
from job.runs.layout import CROSS_VALIDATION_NAME, no_run

_PRESENCE = "presence_"  # prefix of a column that each foreground class has
_MOST_NAMED = 3  # cases in a message
# Truths at original size are other masks above all of these: part of the larger area of all
# classes, pixels, and pixels of the network size.
_OTHER_SHARE, _OTHER_PIXELS, _OTHER_STORED_PIXELS = 0.5, 50, 16


@dataclass(frozen=True)
class ComparedRun:
    """An evaluated run, or a cross-validation.

    Attributes:
        name: short, and different for each run of a comparison.
        classes: names of the foreground classes.
        groups: of each case by its id, sorted by id.
        cases: by size, in the order of `groups`.
        summary: of the evaluation; None for a cross-validation.
        manifest: the copy of the dataset's, if there is one.
    """

    store: ObjectStore
    name: str
    classes: tuple[str, ...]
    groups: Mapping[str, str]
    cases: Mapping[str, Sequence[CaseMetrics]]
    summary: Mapping[str, Any] | None
    manifest: Manifest | None

    @property
    def url(self) -> str:
        """Folder or gs:// URL."""
        return self.store.url


def read_runs(urls: Sequence[str], split: str) -> list[ComparedRun]:
    """Reads the evaluations of a split.

    Raises:
        UsageError: fewer than two runs, one twice, or one without such an evaluation.
        ContentError: an evaluation is damaged.
    """
    stores = [open_store(url) for url in urls]
    if len(stores) < 2:
        raise UsageError("a comparison needs two runs or more: flexunet compare RUN RUN")
    found = [store.url.rstrip("/") for store in stores]
    twice = next((url for url in found if found.count(url) > 1), None)
    if twice is not None:
        raise UsageError(f"{twice}: given twice; give different runs")
    return [
        _read_run(store, name, split)
        for store, name in zip(stores, _short_names(found), strict=True)
    ]


def _short_names(urls: Sequence[str]) -> list[str]:
    """Returns the last parts of the URLs, as many as make them different."""
    parts = [url.split("/") for url in urls]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return list(urls)


def _read_run(store: ObjectStore, name: str, split: str) -> ComparedRun:
    remedy = f"evaluate the run again: flexunet evaluate {store.url} --split {split}"
    folder, summary = evaluation_folder(store, split), None
    if store.stat("config.yaml") is None and store.stat(CROSS_VALIDATION_NAME) is not None:
        if split != "test":
            raise UsageError(f"{store.url}: a cross-validation has only the pooled test folds")
        folder = store
    else:
        summary = read_json(folder, "summary.json", remedy)
        if summary is None and store.stat("config.yaml") is None:
            raise no_run(store.url)
        if summary is None:
            raise UsageError(
                f"{store.url}: no evaluation of the {split} split; run flexunet evaluate "
                f"{store.url} --split {split}"
            )
    tables = {size: _read_table(folder, size, remedy) for size in SIZES}
    columns = next(iter(tables["network"]), {})
    classes = tuple(key.removeprefix(_PRESENCE) for key in columns if key.startswith(_PRESENCE))
    return ComparedRun(
        store=store,
        name=name,
        classes=classes,
        groups={row["id"]: row["group"] for row in tables["network"]},
        cases={size: _cases(folder, size, rows, classes) for size, rows in tables.items()},
        summary=summary,
        manifest=read_dataset_copy(store),
    )


def _read_table(folder: ObjectStore, size: str, remedy: str) -> list[dict[str, str]]:
    name = f"measures_{size}.csv"
    rows = read_table(folder, name, remedy)
    if not rows:
        raise ContentError(f"{folder.url}/{name} is missing or has no case; {remedy}")
    return sorted(rows, key=lambda row: row["id"])


def _cases(
    folder: ObjectStore, size: str, rows: Sequence[Mapping[str, str]], classes: Sequence[str]
) -> list[CaseMetrics]:
    try:
        return [parse_case_metrics(row, classes) for row in rows]
    except ValueError as error:
        raise ContentError(
            f"{folder.url}/measures_{size}.csv: damaged ({error}); evaluate the run again"
        ) from error


def config_of(store: ObjectStore) -> TrainConfig | None:
    """Returns the stored options of a run; None without them."""
    values = read_config(store)
    return stored_config(values, join_url(store.url, "config.yaml")) if values else None


def check_same_cases(runs: Sequence[ComparedRun]) -> None:
    """Checks that all runs have the classes, the cases and the groups of the first one.

    Raises:
        UsageError: some differ; the message names each of them, and how it differs.
    """
    first, *others = runs
    problems = [
        f"{other.url} {problem}"
        for other in others
        if (problem := _problem(first, other)) is not None
    ]
    if problems:
        raise UsageError(
            f"{'; '.join(problems)}; compare only runs that were evaluated on the same cases "
            f"as {first.url}"
        )


def _problem(first: ComparedRun, other: ComparedRun) -> str | None:
    """Returns how the evaluated cases of two runs differ; None: they do not."""
    if other.classes != first.classes:
        return f"has the classes {', '.join(other.classes)}, not {', '.join(first.classes)}"
    missing = [case for case in first.groups if case not in other.groups]
    added = [case for case in other.groups if case not in first.groups]
    parts = []
    if missing:
        number = pluralize(len(first.groups), "case")
        parts.append(f"lacks {len(missing)} of {number} ({_named(missing)})")
    if added:
        parts.append(f"has {pluralize(len(added), 'other case')} ({_named(added)})")
    if parts:
        return f"was evaluated on other cases: it {' and '.join(parts)}"
    moved = [case for case, group in first.groups.items() if other.groups[case] != group]
    if moved:
        return f"has another group for {pluralize(len(moved), 'case')} ({_named(moved)})"
    return None


def _named(cases: Sequence[str]) -> str:
    return join_truncated(cases, _MOST_NAMED, separator=", ")


def sizes_to_compare(runs: Sequence[ComparedRun]) -> tuple[list[str], list[str]]:
    """Returns the sizes at which the measures can be compared, and notes for people.

    At network size, all runs must have the same truth. Datasets of another size have other stored
    masks: then the original size is compared, where the truths can differ a little.

    Raises:
        UsageError: the masks of one size differ, or those of two sizes differ clearly; the message
            names the run and a case.
    """
    first, *others = runs
    notes: list[str] = []
    for other in others:
        case = _other_truth(first, other, "network")
        if case is None:
            continue
        if _network_size(first) != _network_size(other):
            case = _clearly_other_truth(first, other)
        if case is not None:
            raise UsageError(
                f"{other.url} was evaluated with other masks than {first.url}, for example of "
                f"{case}; compare only runs that were evaluated on the same cases"
            )
        notes.append(
            f"{other.name} has another network size or geometry than {first.name}: only measures "
            "at the original size are compared. Their truths are the stored masks, enlarged, and "
            "can differ a little."
        )
    if notes:
        return ["original"], notes
    if all(list(each.cases["network"]) == list(each.cases["original"]) for each in runs):
        return ["original"], []
    return list(SIZES), []


def _network_size(run: ComparedRun) -> tuple[int, int, str] | None:
    """Returns height, width and geometry: images of one size can be stretched or padded to it."""
    found = run.manifest
    return None if found is None else (found.image_height, found.image_width, found.geometry)


def _other_truth(first: ComparedRun, other: ComparedRun, size: str) -> str | None:
    """Returns a case whose truth differs; None: there is none."""
    for case, ours, theirs in zip(first.groups, first.cases[size], other.cases[size], strict=True):
        if _areas(ours) != _areas(theirs):
            return case
    return None


def _clearly_other_truth(first: ComparedRun, other: ComparedRun) -> str | None:
    """Returns a case whose truth at original size cannot be the same mask, stored at two sizes."""
    for index, case in enumerate(first.groups):
        ours, theirs = (_areas(run.cases["original"][index]) for run in (first, other))
        pairs = list(zip(ours, theirs, strict=True))
        different = sum(abs(a - b) for a, b in pairs)
        # Of all classes together: a thin class that is lost at one size is no other mask.
        share = _OTHER_SHARE * sum(map(max, pairs))
        stored = _OTHER_STORED_PIXELS * max(_stored_pixel(run, index) for run in (first, other))
        if different > max(share, _OTHER_PIXELS, stored):
            return case
    return None


def _stored_pixel(run: ComparedRun, index: int) -> float:
    """Returns the pixels of original size of a stored pixel of a case; 0 without a class."""
    stored, original = (sum(_areas(run.cases[size][index])) for size in SIZES)
    return original / stored if stored else 0.0


def _areas(case: CaseMetrics) -> list[int]:
    """Returns the pixels of each class in the truth."""
    return [each.tp + each.fn for each in case.classes]
