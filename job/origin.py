"""Where a run's first weights come from, and whether these have seen what the run is evaluated on.

Weights that were trained on a case, or whose epoch was chosen by it, give it away, however the run
that starts from them divides its dataset. What a source was started from counts as well.

Datasets of the same files have the same names and groups, whatever else differs. Those of other
files, or of the same in other groups, have pictures in common where the stored pixels are the same.
"""

import hashlib
import logging
from dataclasses import dataclass
from typing import Literal

from data_prep.errors import FlexUNetError, UsageError
from data_prep.schema import read_samples
from data_prep.storage import join_url, open_store
from job.config import TrainConfig
from job.data import Dataset
from job.run import find_commits
from job.splits import evaluated_words, open_folded
from job.trained import WEIGHT_FILES, TrainedRun, open_trained

logger = logging.getLogger(__name__)

Seen = Literal["no", "yes", "unknown"]


@dataclass(frozen=True)
class Origin:
    """What the weights of a run started from.

    Attributes:
        run: name of the run.
        source: its `--init-from`.
        seen: whether groups of the evaluated cases were among those that trained or validated it.
        why: it is not known, in words.
    """

    run: str
    source: str
    seen: Seen
    why: str = ""


def origin_of(config: TrainConfig, dataset: Dataset, evaluated: str = "test") -> Origin | None:
    """Returns what a run started from; None: from the seed.

    Args:
        dataset: of `config`, its splits those of its fold.
        evaluated: the split whose cases are evaluated.
    """
    if config.init_from is None:
        return None
    try:
        seen, why = _has_seen(config.init_from, dataset, evaluated)
    except FlexUNetError as error:  # it is gone, or cannot be read any more
        seen, why = "unknown", str(error)
    return Origin(str(config.name), config.init_from, seen, why)


def as_record(*origins: Origin | None) -> list[dict[str, str]]:
    """Returns those that are not None as JSON values, for what an evaluation keeps."""
    return [
        {"run": each.run, "source": each.source, "seen": each.seen}
        for each in origins
        if each is not None
    ]


def refuse_seen(config: TrainConfig, dataset: Dataset) -> Origin | None:
    """Refuses weights that have seen the cases which a run is evaluated on; returns their origin.

    Args:
        dataset: as for `origin_of`.

    Raises:
        UsageError: they have.
    """
    origin = origin_of(config, dataset)
    if origin is not None and origin.seen == "yes":
        raise UsageError(
            f"--init-from {origin.source}: its weights come from training or validation on groups "
            f"of {evaluated_words(config)}, on which {config.name} is evaluated; leave it out, or "
            "give a run of the same splits or of the same fold"
        )
    return origin


def check_origin(config: TrainConfig, dataset: Dataset) -> None:
    """Refuses a new run by `refuse_seen`, and warns where nothing is known of its weights.

    A run that has a checkpoint needs its source no more.

    Raises:
        UsageError: the weights have seen its cases, or are a run that is not there.
    """
    store = open_store(join_url(config.output, str(config.name)))
    if config.init_from is None or find_commits(store):
        return
    if not config.init_from.endswith(WEIGHT_FILES):
        open_trained(config.init_from)
    origin = refuse_seen(config, dataset)
    if origin is not None and origin.seen == "unknown":
        logger.warning(
            "--init-from %s: whether these weights were trained on cases of %s is not "
            "known (%s); if they were, its metrics are too good",
            *(config.init_from, evaluated_words(config), origin.why),
        )


def _has_seen(source: str, dataset: Dataset, evaluated: str) -> tuple[Seen, str]:
    """Returns whether weights have seen the evaluated cases, and why that is not known."""
    split = dataset.splits.get(evaluated)
    if split is None:
        return "no", ""
    own = {g for name, each in dataset.splits.items() if name != evaluated for g in each.groups}
    # Of a dataset with accepted leaks the run itself has other pictures of a group.
    groups, ids = set(split.groups) - own, set(split.ids)
    why, passed = "", set[str]()
    while source not in passed:
        passed.add(source)
        if source.endswith(WEIGHT_FILES):
            return "unknown", f"a file of weights, {source}, does not say it"
        run = open_trained(source)
        found = _trained_on(run, dataset)
        if groups & found.groups or ids & found.ids:
            return "yes", ""
        why = why or found.lacks
        if run.config.init_from is None:
            break
        source = run.config.init_from
    return ("unknown" if why else "no"), why


@dataclass(frozen=True)
class _TrainedOn:
    """Samples and groups of our dataset that trained or validated a run; why some may lack."""

    ids: frozenset[str]
    groups: frozenset[str]
    lacks: str = ""


def _trained_on(run: TrainedRun, dataset: Dataset) -> _TrainedOn:
    if run.dataset_digest == dataset.digest:
        return _of_same_files(open_folded(run.config, dataset.url))
    theirs = _dataset_of(run)
    if theirs is None:
        lacks = f"the dataset {run.config.data} of {run.store.url} is gone, or another one by now"
        return _TrainedOn(frozenset(), frozenset(), lacks)
    digest = dataset.manifest.source_sha256
    if digest and theirs.manifest.source_sha256 == digest:
        return _of_same_files(theirs)
    return _of_other_files(theirs, dataset)


def _dataset_of(run: TrainedRun) -> Dataset | None:
    """Returns what `run` was trained on, None where it is not there any more."""
    try:
        found = open_folded(run.config)
    except UsageError:
        return None
    return found if found.digest == run.dataset_digest else None


def _of_same_files(theirs: Dataset) -> _TrainedOn:
    parts = [theirs.splits[name] for name in ("train", "valid") if name in theirs.splits]
    return _TrainedOn(
        frozenset(sample for part in parts for sample in part.ids),
        frozenset(group for part in parts for group in part.groups),
    )


def _of_other_files(theirs: Dataset, ours: Dataset) -> _TrainedOn:
    pixels, own_pixels = _pixels(theirs), _pixels(ours)
    trained = {pixels[sample] for sample in _of_same_files(theirs).ids}
    found = [
        (sample, group)
        for split in ours.splits.values()
        for sample, group in zip(split.ids, split.groups, strict=True)
        if own_pixels[sample] in trained
    ]
    num_other = len(trained - set(own_pixels.values()))
    lacks = (
        f"of the {len(trained)} pictures of {theirs.url} that it was trained on, {num_other} are "
        "not in this dataset, or stored in another way"
    )
    return _TrainedOn(
        frozenset(sample for sample, _ in found),
        frozenset(group for _, group in found),
        lacks if num_other else "",
    )


def _pixels(dataset: Dataset) -> dict[str, str]:
    """Returns a digest of the whole picture of each sample: tiles alone are alike in strangers."""
    table = read_samples(open_store(dataset.url), dataset.manifest)
    rows = table.select(["id", "picture", "sha256"]).to_pylist()
    parts: dict[str, list[str]] = {}
    for row in rows:
        parts.setdefault(row["picture"] or row["id"], []).append(row["sha256"])
    digests = {
        name: hashlib.sha256("".join(sorted(each)).encode()).hexdigest()
        for name, each in parts.items()
    }
    return {row["id"]: digests[row["picture"] or row["id"]] for row in rows}
