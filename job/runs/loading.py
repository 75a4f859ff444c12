"""Opens a trained run: config, manifest of its dataset, and weights.

Reads a run without owning it, so that it can predict masks while training continues.
"""

import hashlib
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.shards.manifest import MANIFEST_NAME, Manifest, parse_manifest
from flexunet.errors import ContentError, UsageError
from flexunet.progress import Heartbeat, no_heartbeat
from flexunet.settings import read_yaml
from flexunet.storage import NotFound, ObjectStore, open_store
from flexunet.text import pluralize
from job.config import TrainConfig, stored_config
from job.data.dataset import Dataset
from job.models.compatibility import image_shape, num_outputs
from job.runs import serialization
from job.runs.checkpoints import (
    Checkpoint,
    download_checkpoint,
    download_newest,
    find_checkpoints,
    read_checkpoint,
)
from job.runs.layout import CROSS_VALIDATION_NAME, CheckpointRef, checkpoint_prefix, no_run
from job.runs.status import member_urls, run_status

logger = logging.getLogger(__name__)

WEIGHT_FILES = (".h5", ".hdf5")  # suffixes of weight files; any other source is a run


@dataclass(frozen=True)
class TrainedRun:
    """Holds a run that has a checkpoint."""

    store: ObjectStore  # the run's folder
    config: TrainConfig
    manifest: Manifest  # of its training dataset
    dataset_digest: str


def open_run(run_url: str) -> TrainedRun:
    """Returns the run at `run_url`; loads neither weights nor TensorFlow.

    Raises:
        UsageError: there is no run, or no checkpoint yet.
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
    data = store.get(MANIFEST_NAME)  # an exact copy of that of the dataset
    manifest = parse_manifest(data, f"{store.url}/{MANIFEST_NAME}")
    return TrainedRun(store, config, manifest, hashlib.sha256(data).hexdigest())


def check_dataset(run: TrainedRun, dataset: Dataset, remedy: str) -> None:
    """Refuses a dataset on which `run` was not trained.

    Args:
        remedy: what to do instead, for the error message.

    Raises:
        UsageError: names both digests.
    """
    if dataset.digest != run.dataset_digest:
        raise UsageError(
            f"{dataset.url}: not the dataset of this run (sha256 of the manifest "
            f"{dataset.digest[:12]}, of the run {run.dataset_digest[:12]}); {remedy}"
        )


def _no_run(store: ObjectStore) -> UsageError:
    if store.stat(CROSS_VALIDATION_NAME) is not None:
        return UsageError(
            f"{store.url}: a cross-validation has no weights of its own; give the run of one fold, "
            f"such as {store.url}-fold-0"
        )
    return no_run(store.url)


@dataclass(frozen=True)
class EnsembleMember:
    """Identifies the weights of a prediction: run, checkpoint folder, digest of COMMIT.json."""

    run: str
    checkpoint: str
    commit_sha256: str


def open_ensemble(urls: Sequence[str]) -> tuple[TrainedRun, ...]:
    """Returns runs whose probabilities can be averaged: same pixel format and classes.

    The folder of a cross-validation stands for the runs of all its folds. Each run computes in its
    own precision and returns logits of float32 or wider.

    Raises:
        UsageError: two runs differ, one has no checkpoint, or a fold is not finished.
    """
    runs = tuple(open_run(member) for url in urls for member in member_urls(url))
    first = runs[0]
    for run in runs[1:]:
        for name in _SHARED:
            theirs, ours = getattr(run.manifest, name), getattr(first.manifest, name)
            if theirs != ours:
                raise UsageError(
                    f"{run.store.url}: {name} is {_shown(theirs)}, but {_shown(ours)} in "
                    f"{first.store.url}; an ensemble needs runs with the same {name}"
                )
        if num_outputs(run.config, run.manifest) != num_outputs(first.config, first.manifest):
            raise UsageError(
                f"{run.store.url}: --model.num-classes differs from {first.store.url}; an ensemble "
                "needs runs with the same number"
            )
    return runs


# Fields that must be equal so that pixels and probabilities of runs have the same meaning.
_SHARED = (
    *("image_height", "image_width", "classes", "ignore_id", "channels", "bit_depth"),
    *("value_max", "geometry", "crop", "flip"),
)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(each.name for each in value)
    return str(value)


def load_model(run: TrainedRun, *, which: str) -> tuple[Any, Checkpoint]:
    """Returns the model of `run` with the weights of a checkpoint, and that checkpoint.

    The model computes in the precision of its training, but in float32 instead of float16 if there
    is no GPU, since CPUs only emulate float16.

    Args:
        which: "best", "last", or the folder of a checkpoint.

    Raises:
        UsageError: there is no best checkpoint yet.
        ContentError: the checkpoint is damaged.
        NotFound: the checkpoint of that folder was deleted.
    """
    from job.distributed.precision import predicting_precision
    from job.models.heads import exclude_class, main_model

    with tempfile.TemporaryDirectory(prefix="flexunet-") as folder:
        commit, members = fetch_checkpoint(run.store, folder, which=which)
        precision = predicting_precision(run.config.precision)
        config = run.config.model_copy(update={"precision": precision})
        model = model_for(config, run.manifest)
        serialization.read_weights(model, members[serialization.WEIGHTS_NAME])
    if not run.manifest.has_background:  # class 0 is padding, which no prediction is about
        exclude_class(model, 0)
    return main_model(model), commit


def ensemble_member(run: TrainedRun, commit: Checkpoint) -> EnsembleMember:
    """Returns the ensemble member of a checkpoint."""
    return EnsembleMember(run.store.url, commit.prefix, commit.sha256)


def find_checkpoint(store: ObjectStore, *, which: str) -> Checkpoint:
    """Returns a run's "best" or "last" checkpoint.

    "last" is the newest with undamaged weights, so this reads the weights.

    Raises:
        UsageError: there is no such checkpoint yet.
        ContentError: all are damaged.
    """
    if which == "best":
        return read_checkpoint(store, _find_best(store).prefix)
    with tempfile.TemporaryDirectory(prefix="flexunet-") as folder:
        return fetch_checkpoint(store, folder, which=which)[0]


def fetch_checkpoint(
    store: ObjectStore, folder: str, *, which: str
) -> tuple[Checkpoint, dict[str, str]]:
    """Downloads the weights of a checkpoint; returns it and local paths by name.

    Args:
        which: as for `load_model`.

    Raises:
        UsageError: there is no such checkpoint yet.
        ContentError: it is damaged.
        NotFound: the checkpoint of the named folder was deleted.
    """
    # The moments, twice as large as the weights, are never downloaded.
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
            f"{store.url}: no epoch has ended yet, so there is no best checkpoint; give "
            "--checkpoint last"
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
        "diverged": "it diverged; start a run with another --name",
        "stopped": "it was stopped before its first one; the same train command resumes",
        "open": "wait for the end of the first epoch; if its process is dead, the same train "
        "command resumes",
    }
    remedy = remedies.get(run_status(store), "its checkpoints were deleted")
    return UsageError(f"{store.url}: no checkpoint yet; {remedy}")


def model_for(config: TrainConfig, manifest: Manifest) -> Any:
    """Returns the untrained model of `config` for images of `manifest`.

    Raises:
        UsageError: channels or classes of the two do not fit.
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
    """Sets the weights of `model` from the best checkpoint of another run, or from a `.h5` file.

    The file is a `best_model.h5` of the reference implementation or Keras weights of this package.
    It is read as data; nothing in it is executed. Heads for deep supervision keep the weights that
    they have.

    If the run has other classes, channels or heads for deep supervision, layers that do not fit
    keep the weights that they have; the log names them.

    Args:
        heartbeat: called while bytes of a run move.

    Raises:
        ContentError: the weights do not fit, or no layer of the run does.
    """
    from job.compat.weights_h5 import load_reference_weights
    from job.models.heads import main_model

    if source.endswith(".weights.h5"):
        serialization.read_weights(main_model(model), source)
    elif source.endswith(WEIGHT_FILES):
        load_reference_weights(main_model(model), source)
    else:
        with tempfile.TemporaryDirectory(prefix="flexunet-") as folder:
            store = open_store(source).watched(heartbeat)
            _, members = fetch_checkpoint(store, folder, which="best")
            _take_weights(model, open_run(source), members[serialization.WEIGHTS_NAME])


def _take_weights(model: Any, source: TrainedRun, path: str) -> None:
    """Sets the weights of `model` from the file `path` of a run, where they fit."""
    config, manifest = source.config, source.manifest
    theirs = (image_shape(config, manifest)[-1], num_outputs(config, manifest))
    is_same_depth = config.model.deep_supervision == len(model.outputs) - 1
    if is_same_depth and theirs == (model.input_shape[-1], model.outputs[0].shape[-1]):
        serialization.read_weights(model, path)
        return
    trained = model_for(config, manifest)
    serialization.read_weights(trained, path)
    take_fitting(model, trained, source.store.url)


def take_fitting(model: Any, trained: Any, source: str) -> None:
    """Copies each layer of `trained` that has the shapes of the layer of that name in `model`.

    Logs the layers that do not fit, with their shapes.

    Args:
        source: the origin of `trained`, for messages.

    Raises:
        ContentError: no layer fits.
    """
    ours, theirs = (_variables_by_layer(each) for each in (model, trained))
    fitting = [name for name in ours if _shapes_of(ours[name]) == _shapes_of(theirs.get(name, {}))]
    if not fitting:
        raise ContentError(f"--init-from {source}: no layer of its network fits this network")
    for name in fitting:
        for key, variable in ours[name].items():
            variable.assign(theirs[name][key].numpy())
    anew = [
        f"{name} {_shape_words(ours[name])} (there: {_shape_words(theirs.get(name, {}))})"
        for name in ours
        if name not in fitting
    ]
    unused = [f"{name} {_shape_words(theirs[name])}" for name in theirs if name not in ours]
    words = f"--init-from {source}: took {len(fitting)} of {pluralize(len(ours), 'layer')}"
    if anew:
        words += f"; these start anew: {', '.join(anew)}"
    if unused:
        words += f"; these are not used: {', '.join(unused)}"
    logger.info("%s", words)


def _variables_by_layer(model: Any) -> dict[str, dict[str, Any]]:
    """Returns the variables of each layer by their last name."""
    layers: dict[str, dict[str, Any]] = {}
    for path, variable in serialization.weights_by_path(model).items():
        layer, _, name = path.rpartition("/")
        layers.setdefault(layer, {})[name] = variable
    return layers


def _shapes_of(variables: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(each.shape) for name, each in variables.items()}


def _shape_words(variables: Mapping[str, Any]) -> str:
    shapes = _shapes_of(variables).items()
    return ", ".join(f"{n} {'x'.join(map(str, shape))}" for n, shape in shapes) or "none"
