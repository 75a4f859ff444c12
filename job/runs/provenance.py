"""Finds the origin of a run's initial weights, and checks it for leakage.

Weights leak a case if they were trained on it, or if it selected their best epoch, however the new
run divides its dataset. The initial weights of the source count, too.

The origin is determined when the weights are read, and stored in the run as `origin.json`, since
the source may later be deleted or replaced.

Datasets of the same files have the same names and groups, whatever else differs. Otherwise images
are compared by their stored pixels.
"""

import hashlib
import json
import logging
import subprocess
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.shards.sample_table import read_samples
from flexunet.errors import FlexUNetError, UsageError
from flexunet.json_files import read_json
from flexunet.progress import Heartbeat, no_heartbeat
from flexunet.storage import ObjectStore, open_store
from job.config import TrainConfig
from job.data.dataset import Dataset
from job.data.folds import evaluated_words, open_folded
from job.models.encoders.pretrained import IMAGENET, check_pretrained, set_pretrained_encoder
from job.runs.checkpoints import find_checkpoints
from job.runs.layout import ORIGIN_NAME, RESTORE, run_url
from job.runs.loading import WEIGHT_FILES, TrainedRun, initialize_from, open_run

logger = logging.getLogger(__name__)

# Model options that determine the weights and their meaning.
_MODEL_FIELDS = (
    *("name", "num_layers", "base_filters", "max_filters", "base_kernels", "dilation"),
    *("residual_blocks", "encoder", "normalization", "activation", "input_scaling"),
)

Seen = Literal["no", "yes", "unknown"]


@dataclass(frozen=True)
class Origin:
    """Describes the initial weights of a run.

    Attributes:
        run: name of the run.
        source: its `--init-from`; empty if only its encoder has weights of others.
        ids: samples of the run's dataset that trained or validated these weights, sorted.
        groups: groups of these samples, sorted; for datasets of the same files, all groups that
            trained or validated the weights.
        lacks: why there may be more samples; empty if all are known.
        encoder: origin of the pretrained weights of its encoder, also by way of `source`; empty if
            there are none.
    """

    run: str
    source: str
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    lacks: str
    encoder: str = ""

    def seen(self, dataset: Dataset, evaluated: str = "test") -> Seen:
        """Returns whether the weights have seen groups of the split `evaluated`."""
        split = dataset.splits.get(evaluated)
        if split is None:
            return "no"
        if set(split.groups) & set(self.groups) or set(split.ids) & set(self.ids):
            return "yes"
        return "unknown" if self.lacks else "no"


def as_record(
    origins: Iterable[Origin | None], dataset: Dataset, evaluated: str = "test"
) -> list[dict[str, str]]:
    """Returns the origins that are not None as JSON values, for the evaluation summary."""
    records = []
    for each in origins:
        if each is None:
            continue
        seen = each.seen(dataset, evaluated)
        if each.source:
            records.append({"run": each.run, "source": each.source, "seen": seen})
        if each.encoder:
            records.append(
                {"run": each.run, "source": each.encoder, "seen": _seen_by_encoder(each)}
            )
    return records


def _seen_by_encoder(origin: Origin) -> Seen:
    # ImageNet has photographs; the training of a weight file is not recorded.
    return "no" if origin.encoder.startswith(IMAGENET) else "unknown"


def find_origin(config: TrainConfig, dataset: Dataset) -> Origin | None:
    """Returns the origin of the weights of a new run; None: random weights.

    Args:
        dataset: dataset of `config`, with the splits of its fold.
    """
    if config.init_from is None:
        return None
    encoder = ""
    try:
        ids, groups, lacks = _trained_by(config.init_from, dataset)
        encoder = _encoder_of(config.init_from)
    except FlexUNetError as error:  # deleted or unreadable
        ids, groups, lacks = set[str](), set[str](), str(error)
    return Origin(
        run=str(config.name),
        source=config.init_from,
        ids=tuple(sorted(ids)),
        groups=tuple(sorted(groups)),
        lacks=lacks,
        encoder=encoder,
    )


def set_initial_weights(
    model: Any, config: TrainConfig, dataset: Dataset, heartbeat: Heartbeat = no_heartbeat
) -> Origin | None:
    """Sets the weights that a new run starts from, and returns their origin.

    Without `init_from` and a pretrained encoder, `model` keeps its random weights: returns None.

    Raises:
        UsageError: the weights have seen the evaluated cases, or are not on this machine.
        ContentError: the weights are damaged, or do not fit.
    """
    if config.init_from is not None:
        origin = check_no_leakage(config, dataset)
        initialize_from(model, config.init_from, heartbeat)
        return origin
    if config.model.pretrained_encoder is None:
        return None
    return encoder_origin(config, set_pretrained_encoder(model, config.model))


def encoder_origin(config: TrainConfig, encoder: str) -> Origin:
    """Returns the origin of a run of which only the encoder has weights of others.

    Args:
        encoder: result of `job.models.encoders.pretrained.set_pretrained_encoder`.
    """
    is_known = encoder.startswith(IMAGENET)
    lacks = "" if is_known else f"the weight file {encoder} has no record of it"
    return Origin(str(config.name), "", (), (), lacks, encoder)


def _encoder_of(source: str) -> str:
    """Returns the origin of the pretrained encoder of a run; empty if it has none."""
    if source.endswith(WEIGHT_FILES):
        return ""
    run = open_run(source)
    earlier = read_origin(run.store, run.config)
    return earlier.encoder if earlier is not None else ""


def origin_json(origin: Origin) -> str:
    """Returns the text of `origin.json`."""
    values = asdict(origin)
    if not origin.encoder:
        del values["encoder"]  # earlier versions had none
    return json.dumps(values, indent=1) + "\n"


def read_origin(run: ObjectStore, config: TrainConfig) -> Origin | None:
    """Returns the stored origin of the weights of a run; None: random weights.

    Raises:
        ContentError: its file is damaged.
    """
    if config.init_from is None and config.model.pretrained_encoder is None:
        return None
    values = read_json(run, ORIGIN_NAME, RESTORE)
    if values is None:
        lacks = f"{run.url} has no {ORIGIN_NAME}"
        encoder = config.model.pretrained_encoder or ""
        return Origin(str(config.name), config.init_from or "", (), (), lacks, encoder)
    return Origin(
        run=values["run"],
        source=values["source"],
        ids=tuple(values["ids"]),
        groups=tuple(values["groups"]),
        lacks=values["lacks"],
        encoder=values.get("encoder", ""),
    )


def check_no_leakage(config: TrainConfig, dataset: Dataset) -> Origin | None:
    """Refuses weights that have seen the evaluated cases of a run; returns their origin.

    Args:
        dataset: as for `find_origin`.

    Raises:
        UsageError: the weights have seen groups of these cases.
    """
    origin = find_origin(config, dataset)
    split = dataset.splits.get("test")
    if origin is None or split is None:
        return origin
    # With accepted leaks, the run itself trains on other images of evaluated groups.
    own = {g for name, each in dataset.splits.items() if name != "test" for g in each.groups}
    if (set(split.groups) - own) & set(origin.groups) or set(split.ids) & set(origin.ids):
        raise UsageError(
            f"--init-from {origin.source}: its weights come from training or validation on groups "
            f"of {evaluated_words(config)}, on which {config.name} is evaluated; leave --init-from "
            "out, or give a run with the same splits or fold"
        )
    return origin


def check_origin(config: TrainConfig, dataset: Dataset) -> None:
    """Runs `check_no_leakage` for a new run, and warns if the origin is unknown.

    A run that has a checkpoint no longer needs its source.

    Raises:
        UsageError: the weights have seen the evaluated cases, the source run does not exist, or it
            has another network.
    """
    store = open_store(run_url(config))
    if config.init_from is None or find_checkpoints(store):
        return
    source = None
    if not config.init_from.endswith(WEIGHT_FILES):
        source = open_run(config.init_from)
    origin = check_no_leakage(config, dataset)
    if source is not None:
        _check_model(config, source)
    if origin is not None and origin.seen(dataset) == "unknown":
        logger.warning(
            "--init-from %s: cannot check whether these weights were trained on cases of %s (%s); "
            "if they were, the metrics are optimistic",
            config.init_from,
            evaluated_words(config),
            origin.lacks,
        )


def check_encoder(config: TrainConfig) -> None:
    """Refuses a new run whose pretrained encoder is not on this machine.

    A run that has a checkpoint no longer needs it. Warns if its origin is unknown.

    Raises:
        UsageError: names the package or the file.
    """
    weights = config.model.pretrained_encoder
    if config.init_from is not None or weights is None:
        return
    if find_checkpoints(open_store(run_url(config))):
        return
    check_pretrained(config.model)
    if weights != "imagenet":
        logger.warning(
            "--model.encoder-weights %s: cannot check whether these weights were trained on cases "
            "of %s; if they were, the metrics are optimistic",
            weights,
            evaluated_words(config),
        )


def _check_model(config: TrainConfig, source: TrainedRun) -> None:
    """Refuses a network in which the weights of `source` would not mean the same.

    Other classes, channels and heads for deep supervision are allowed: `initialize_from` starts
    their layers anew.

    Raises:
        UsageError: names the differences.
    """
    reported = [
        f"--model.{name.replace('_', '-')} was {theirs}, now {ours}"
        for name in _MODEL_FIELDS
        if (theirs := getattr(source.config.model, name)) != (ours := getattr(config.model, name))
    ]
    if reported:
        raise UsageError(
            f"--init-from {config.init_from}: its network differs: {'; '.join(reported)}; "
            "give the options of its training"
        )


def _trained_by(source: str, dataset: Dataset) -> tuple[set[str], set[str], str]:
    """Returns ids and groups of `dataset` that trained the weights, and why there may be more."""
    if source.endswith(WEIGHT_FILES):
        return set(), set(), f"the weight file {source} has no record of it"
    run = open_run(source)
    earlier = read_origin(run.store, run.config)
    lacks = earlier.lacks if earlier else ""
    is_same = run.dataset_digest == dataset.digest
    theirs = open_folded(run.config, dataset.url) if is_same else _dataset_of(run)
    if theirs is None:
        gone = f"the dataset {run.config.data} of {run.store.url} was deleted or replaced"
        return set(), set(), gone
    parts = [theirs.splits[name] for name in ("train", "valid") if name in theirs.splits]
    ids = {sample for part in parts for sample in part.ids}.union(earlier.ids if earlier else ())
    digest = dataset.manifest.source_sha256
    if is_same or (digest and theirs.manifest.source_sha256 == digest):
        groups = {group for part in parts for group in part.groups}
        return ids, groups.union(earlier.groups if earlier else ()), lacks
    ids, groups, num_other = _same_pixels(ids, theirs, dataset)
    if num_other:
        lacks = lacks or (
            f"{num_other} training images of {theirs.url} are not in this dataset, or are stored "
            "with other pixels"
        )
    return ids, groups, lacks


def _dataset_of(run: TrainedRun) -> Dataset | None:
    """Returns the training dataset of `run`; None if it was deleted or replaced."""
    try:
        found = open_folded(run.config)
    except UsageError:
        return None
    return found if found.digest == run.dataset_digest else None


def _same_pixels(
    ids: Collection[str], theirs: Dataset, ours: Dataset
) -> tuple[set[str], set[str], int]:
    """Returns ids and groups of `ours` that have the same images as samples `ids` of `theirs`.

    Also returns the number of those images that `ours` does not have.
    """
    pixels, own_pixels = _pixels(theirs), _pixels(ours)
    trained = {pixels[sample] for sample in ids}
    found = [
        (sample, group)
        for split in ours.splits.values()
        for sample, group in zip(split.ids, split.groups, strict=True)
        if own_pixels[sample] in trained
    ]
    num_other = len(trained - set(own_pixels.values()))
    return {sample for sample, _ in found}, {group for _, group in found}, num_other


def _pixels(dataset: Dataset) -> dict[str, str]:
    """Returns a digest of the whole image of each sample; single tiles of others may be equal."""
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


def source_commit() -> str | None:
    """Returns the git commit that this package runs from; None where it was installed."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    arguments = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        found = subprocess.run(arguments, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603 - fixed arguments
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
