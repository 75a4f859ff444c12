"""Where a run's first weights come from, and whether these have seen what the run is evaluated on.

Weights that were trained on a case, or whose epoch was chosen by it, give it away, however the run
that starts from them divides its dataset. What a source was started from counts as well.
"""

import logging
from dataclasses import asdict, dataclass
from typing import Literal

from data_prep.errors import FlexUNetError, UsageError
from data_prep.storage import join_url, open_store
from job.config import TrainConfig
from job.data import Dataset
from job.run import find_commits
from job.splits import open_folded
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
    """

    run: str
    source: str
    seen: Seen


def origin_of(config: TrainConfig, dataset: Dataset, evaluated: str = "test") -> Origin | None:
    """Returns what a run started from; None: from the seed.

    Args:
        dataset: of `config`, its splits those of its fold.
        evaluated: the split whose cases are evaluated.
    """
    if config.init_from is None:
        return None
    try:
        seen = _has_seen(config.init_from, dataset, evaluated)
    except FlexUNetError:  # it is gone, or cannot be read any more
        seen = "unknown"
    return Origin(str(config.name), config.init_from, seen)


def as_record(*origins: Origin | None) -> list[dict[str, str]]:
    """Returns those that are not None as JSON values, for what an evaluation keeps."""
    return [asdict(origin) for origin in origins if origin is not None]


def refuse_seen(config: TrainConfig, dataset: Dataset) -> Origin | None:
    """Refuses weights that have seen the cases which a run is evaluated on; returns their origin.

    Args:
        dataset: as for `origin_of`.

    Raises:
        UsageError: they have.
    """
    origin = origin_of(config, dataset)
    if origin is not None and origin.seen == "yes":
        cases = "the test split"
        if config.fold is not None:
            cases = f"fold {config.fold} of {config.folds}"
        raise UsageError(
            f"--init-from {origin.source}: its weights come from training or validation on groups "
            f"of {cases}, on which {config.name} is evaluated; leave it out, or give a run of the "
            "same splits or of the same fold"
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
            "--init-from %s: which cases these weights were trained on is not known; if cases of "
            "the test split are among them, its metrics are too good",
            config.init_from,
        )


def _has_seen(source: str, dataset: Dataset, evaluated: str) -> Seen:
    split = dataset.splits.get(evaluated)
    if split is None:
        return "no"
    own = {g for name, each in dataset.splits.items() if name != evaluated for g in each.groups}
    # Of a dataset with accepted leaks the run itself has other pictures of a group.
    groups, ids = set(split.groups) - own, set(split.ids)
    is_known, passed = True, set[str]()
    while source not in passed:
        passed.add(source)
        if source.endswith(WEIGHT_FILES):
            return "unknown"
        run = open_trained(source)
        known = _dataset_of(run, dataset)
        is_known &= known is not None
        for name in ("train", "valid"):
            trained = known.splits.get(name) if known is not None else None
            if trained is not None and (groups & set(trained.groups) or ids & set(trained.ids)):
                return "yes"
        if run.config.init_from is None:
            break
        source = run.config.init_from
    return "no" if is_known else "unknown"


def _dataset_of(run: TrainedRun, dataset: Dataset) -> Dataset | None:
    """Returns what `run` was trained on; None where its cases cannot be compared with ours."""
    if run.dataset_digest == dataset.digest:
        return open_folded(run.config, dataset.url)
    digest = dataset.manifest.source_sha256
    if not digest or run.manifest.source_sha256 != digest:
        return None
    # The same files in another form: names and groups are the same.
    found = open_folded(run.config)
    return found if found.digest == run.dataset_digest else None
