"""Opens a trained run for use: its config, its dataset's manifest and its weights.

Reads a run without owning it, so that masks can be predicted while it is still being trained.
"""

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.shards.manifest import MANIFEST_NAME, Manifest, parse_manifest
from flexunet.errors import UsageError
from flexunet.progress import Heartbeat, no_heartbeat
from flexunet.settings import read_yaml
from flexunet.storage import NotFound, ObjectStore, open_store
from job.config import TrainConfig, stored_config
from job.models.compatibility import image_shape, num_outputs
from job.runs import serialization
from job.runs.checkpoints import (
    Checkpoint,
    download_checkpoint,
    download_newest,
    find_checkpoints,
    read_checkpoint,
)
from job.runs.layout import CROSS_VALIDATION_NAME, CheckpointRef, checkpoint_prefix
from job.runs.status import run_status

WEIGHT_FILES = (".h5", ".hdf5")  # endings of files to start from; anything else is a run


@dataclass(frozen=True)
class TrainedRun:
    """A run that has a checkpoint."""

    store: ObjectStore  # the run's folder
    config: TrainConfig
    manifest: Manifest  # of the dataset it was trained on
    dataset_digest: str


def open_run(run_url: str) -> TrainedRun:
    """Returns the run at `run_url`; neither weights nor TensorFlow are loaded.

    Raises:
        UsageError: no run, or no checkpoint yet.
    """
    store = open_store(run_url)
    try:
        text = store.get("config.yaml").decode()
    except NotFound as error:
        raise _no_run(store) from error
    where = f"{store.url}/config.yaml"
    config = stored_config(read_yaml(text, where), where)
    if not find_checkpoints(store):
        raise _no_checkpoint(store)
    data = store.get(MANIFEST_NAME)  # a copy of the dataset's, byte by byte
    manifest = parse_manifest(data, f"{store.url}/{MANIFEST_NAME}")
    return TrainedRun(store, config, manifest, hashlib.sha256(data).hexdigest())


def _no_run(store: ObjectStore) -> UsageError:
    if store.stat(CROSS_VALIDATION_NAME) is not None:
        return UsageError(
            f"{store.url}: a cross-validation, which has no weights of its own; give the run of a "
            f"fold, {store.url}-fold-0 and so on"
        )
    return UsageError(
        f"{store.url}: no run here: config.yaml is missing; give the folder RUNS/NAME"
    )


@dataclass(frozen=True)
class EnsembleMember:
    """Weights that predict: a checkpoint of a run, by its folder there and its COMMIT.json."""

    run: str
    checkpoint: str
    commit_sha256: str


def open_ensemble(urls: Sequence[str]) -> tuple[TrainedRun, ...]:
    """Returns runs whose probabilities can be averaged: they see the same pixels and classes.

    Their precisions may differ: each computes in its own, and gives logits of float32 or wider.

    Raises:
        UsageError: two differ in them, or one has no checkpoint.
    """
    runs = tuple(open_run(url) for url in urls)
    first = runs[0]
    for run in runs[1:]:
        for name in _SHARED:
            theirs, ours = getattr(run.manifest, name), getattr(first.manifest, name)
            if theirs != ours:
                raise UsageError(
                    f"{run.store.url}: {name} {_shown(theirs)}, but {first.store.url} has "
                    f"{_shown(ours)}; only runs that are alike in it can predict together"
                )
        if num_outputs(run.config, run.manifest) != num_outputs(first.config, first.manifest):
            raise UsageError(
                f"{run.store.url}: another --model.num-classes than {first.store.url} has; only "
                "runs that are alike in it can predict together"
            )
    return runs


# What makes pixels and probabilities of two runs mean the same.
_SHARED = (
    *("image_height", "image_width", "classes", "ignore_id", "channels", "bit_depth"),
    *("value_max", "geometry", "crop", "flip"),
)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(each.name for each in value)
    return str(value)


def load_model(run: TrainedRun, *, which: str) -> tuple[Any, Checkpoint]:
    """Returns the model of `run` with the weights of a checkpoint, and the commit of these.

    It computes in the precision of the training; of float16, which CPUs only emulate, in float32
    where there is no GPU.

    Args:
        which: "best", "last", or the folder of a checkpoint.

    Raises:
        UsageError: no checkpoint is the best yet.
        ContentError: the checkpoint is damaged.
        NotFound: that folder has none any more.
    """
    from job.distributed.precision import predicting_precision

    with tempfile.TemporaryDirectory(prefix="flexunet-") as folder:
        commit, members = fetch_checkpoint(run.store, folder, which=which)
        precision = predicting_precision(run.config.precision)
        config = run.config.model_copy(update={"precision": precision})
        model = model_for(config, run.manifest)
        serialization.read_weights(model, members[serialization.WEIGHTS_NAME])
    return model, commit


def ensemble_member(run: TrainedRun, commit: Checkpoint) -> EnsembleMember:
    """Returns the weights of a commit of a run."""
    return EnsembleMember(run.store.url, commit.prefix, commit.sha256)


def find_checkpoint(store: ObjectStore, *, which: str) -> Checkpoint:
    """Returns a run's "best" or "last" checkpoint.

    The last is the newest whose weights are undamaged, so these are read.

    Raises:
        UsageError: there is no such checkpoint yet.
        ContentError: none is undamaged.
    """
    if which == "best":
        return read_checkpoint(store, _find_best(store).prefix)
    with tempfile.TemporaryDirectory(prefix="flexunet-") as folder:
        return fetch_checkpoint(store, folder, which=which)[0]


def fetch_checkpoint(
    store: ObjectStore, folder: str, *, which: str
) -> tuple[Checkpoint, dict[str, str]]:
    """Returns a run's checkpoint, and the local path of its weights by name.

    Args:
        which: as for `load_model`.

    Raises:
        UsageError: there is no such checkpoint yet.
        ContentError: it is damaged.
        NotFound: it was named by its folder, which has none any more.
    """
    # Never the moments, which are twice as large as the weights.
    if which == "last":
        names = [serialization.STATE_NAME, serialization.WEIGHTS_NAME]
        newest = download_newest(store, find_checkpoints(store), folder, names=names)
        if newest is None:
            raise _no_checkpoint(store)
        return newest
    ref = _find_best(store) if which == "best" else _ref_of(store, which)
    return download_checkpoint(store, ref, folder, names=[serialization.WEIGHTS_NAME])


def _find_best(store: ObjectStore) -> CheckpointRef:
    with tempfile.TemporaryDirectory(prefix="flexunet-") as folder:
        names = [serialization.STATE_NAME]
        newest = download_newest(store, find_checkpoints(store), folder, names=names)
        if newest is None:
            raise _no_checkpoint(store)
        best = serialization.read_state(newest[1][serialization.STATE_NAME])["best"]
    if best is None:
        raise UsageError(
            f"{store.url}: no epoch has ended yet, so no checkpoint is the best; use the last"
        )
    step, attempt = best["step"], best["attempt"]
    return CheckpointRef(attempt, step, checkpoint_prefix(step, attempt))


def _ref_of(store: ObjectStore, prefix: str) -> CheckpointRef:
    for ref in find_checkpoints(store):
        if ref.prefix == prefix:
            return ref
    raise NotFound(f"{store.url}/{prefix} does not exist")


def _no_checkpoint(store: ObjectStore) -> UsageError:
    remedies = {
        "diverged": "it diverged; start a run of another name",
        "stopped": "it was stopped before it had one; the same train command goes on",
        "open": "wait for the first epoch to end, or, where its process is dead, train it again by "
        "the same command",
    }
    remedy = remedies.get(run_status(store), "its checkpoints were deleted")
    return UsageError(f"{store.url}: no checkpoint yet; {remedy}")


def model_for(config: TrainConfig, manifest: Manifest) -> Any:
    """Returns the untrained model of `config` for pictures of `manifest`.

    Raises:
        UsageError: channels or classes of the two do not go together.
    """
    from job.models.registry import build_model

    return build_model(
        config.model,
        image_shape=image_shape(config, manifest),
        num_classes=num_outputs(config, manifest),
        value_max=float(manifest.value_max),
        seed=config.seed,
        precision=config.precision,
    )


def initialize_from(model: Any, source: str, heartbeat: Heartbeat = no_heartbeat) -> None:
    """Sets the weights of `model` from another run (its best), or from a `.h5` file.

    The file is the reference family's `best_model.h5` or Keras weights of this package; it is read
    as data, nothing in it is run.

    Args:
        heartbeat: called while bytes of a run move.
    """
    from job.compat.weights_h5 import load_reference_weights

    if source.endswith(".weights.h5"):
        serialization.read_weights(model, source)
    elif source.endswith(WEIGHT_FILES):
        load_reference_weights(model, source)
    else:
        with tempfile.TemporaryDirectory(prefix="flexunet-") as folder:
            store = open_store(source).watched(heartbeat)
            _, members = fetch_checkpoint(store, folder, which="best")
            serialization.read_weights(model, members[serialization.WEIGHTS_NAME])
