"""Model and optimizer state as the members of a commit, and back.

Weights are HDF5 and moments are arrays: data that is read without running anything.
"""

import contextlib
import json
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.errors import ContentError, StorageError

if TYPE_CHECKING:
    import keras

    from job.optimizer import Adam

WEIGHTS_NAME = "model.weights.h5"
OPTIMIZER_NAME = "optimizer.npz"
STATE_NAME = "state.json"


# Arrays that checkpoints are copied into, kept from one to the next: to touch new memory takes
# several times as long as the copy.
Memory = list[dict[str, np.ndarray]]


def take(
    folder: str,
    model: "keras.Model",
    optimizer: "Adam",
    state: Mapping[str, Any],
    memory: Memory | None = None,
) -> Callable[[], dict[str, str]]:
    """Takes a checkpoint of the weights, moments and state as they are now.

    Args:
        memory: of earlier checkpoints of this model; what is returned puts this one's back.

    Returns:
        What writes its members into `folder` and returns their paths by name; training may go on
        before it is called.

    Raises:
        StorageError: the folder is too full; the returned function also where it cannot be written.
    """
    paths = {
        name: os.path.join(folder, name) for name in (WEIGHTS_NAME, OPTIMIZER_NAME, STATE_NAME)
    }
    text = json.dumps(state)
    with disk_errors(folder):
        _check_space(folder, model)
    memory = [] if memory is None else memory
    layers, variables = _layers(model), optimizer.named_variables()
    moments = list(variables)
    for *_, weights in layers:
        variables |= weights
    arrays = _copied(variables, memory.pop() if memory else {})

    def finish() -> dict[str, str]:
        with disk_errors(folder):
            _write_weights(paths[WEIGHTS_NAME], layers, arrays)
            with open(paths[OPTIMIZER_NAME], "wb") as file:
                np.savez(file, allow_pickle=False, **{name: arrays[name] for name in moments})
            with open(paths[STATE_NAME], "w", encoding="utf-8") as file:
                file.write(text)
        memory.append(arrays)
        return paths

    return finish


def _copied(variables: Mapping[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Copies `variables` into `arrays`, which are made where missing, and returns these."""
    for name, variable in variables.items():
        values = np.asarray(memoryview(variable.read_value().cpu()))
        if name not in arrays:
            arrays[name] = np.empty_like(values)
        np.copyto(arrays[name], values)
    return arrays


def _layers(model: "keras.Model") -> list[tuple[str, str, dict[str, Any]]]:
    """Returns (name, group, variables by place) of each layer, as in a weight file of Keras.

    Keras numbers the layers of each class. Its own writer is not used because it reads the
    variables while it writes, and training would have to wait for the disk.
    """
    num_seen: dict[str, int] = {}
    found = []
    for layer in model.layers:
        kind = _snake_case(type(layer).__name__)
        index = num_seen[kind] = num_seen.get(kind, -1) + 1
        group = f"layers/{kind}_{index}/vars" if index else f"layers/{kind}/vars"
        variables: dict[str, Any] = {}
        layer.save_own_variables(variables)
        found.append((layer.name, group, {f"{group}/{n}": v.value for n, v in variables.items()}))
    return found


def _snake_case(name: str) -> str:
    """Returns a class name as Keras writes it in files: Conv2DTranspose is conv2d_transpose."""
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def _write_weights(
    path: str, layers: Sequence[tuple[str, str, Iterable[str]]], arrays: Mapping[str, np.ndarray]
) -> None:
    """Writes weights as a file that `keras.Model.load_weights` reads."""
    import h5py

    with h5py.File(path, "w") as file:
        for layer_name, group, names in layers:
            file.create_group(group).attrs["name"] = layer_name
            for name in names:
                file[name] = arrays[name]


@contextlib.contextmanager
def disk_errors(folder: str) -> Iterator[None]:
    """Turns errors of the operating system inside the block into a StorageError of one line."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{folder}: checkpoint could not be written: {error}") from error


def _check_space(folder: str, model: "keras.Model") -> None:
    """Refuses a folder that is too full: HDF5 ends the process when a write of its own fails."""
    weights = sum(_num_bytes(weight) for weight in model.non_trainable_weights)
    needed = weights + 3 * sum(_num_bytes(weight) for weight in model.trainable_weights)
    free = shutil.disk_usage(folder).free
    if free < needed * 1.05 + 2**20:
        raise StorageError(
            f"{folder}: No space left on device: a checkpoint needs {needed / 2**20:.0f} MiB, "
            f"{free / 2**20:.0f} MiB are free; make room or set TMPDIR to a larger disk"
        )


def _num_bytes(weight: Any) -> int:
    return int(np.prod(weight.shape)) * np.dtype(weight.dtype).itemsize


def read_weights(model: "keras.Model", path: str) -> None:
    """Sets the weights of `model` from a member that `take` wrote.

    Raises:
        ContentError: not weights of this model.
    """
    try:
        # Keras passes over what the model has no place for.
        found, wanted = _num_arrays(path), len(model.weights)
        if found != wanted:
            raise ValueError(f"it holds {found} arrays, the model has {wanted}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a page of them before the error
            model.load_weights(path)
    except (OSError, KeyError, ValueError) as error:
        problem = str(error).strip().splitlines()[0]
        raise ContentError(
            f"{path}: does not fit this model: {problem}; use the model options it was saved with"
        ) from error


def _num_arrays(path: str) -> int:
    """Returns how many arrays an HDF5 file holds."""
    import h5py

    names: list[str] = []

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            names.append(name)

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    return len(names)


def read_optimizer(optimizer: "Adam", path: str) -> None:
    """Sets the moments of `optimizer` from a member that `take` wrote."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            optimizer.load_state(arrays, source=path)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ContentError(f"{path}: not an optimizer state: {error}") from error


def read_state(path: str) -> dict[str, Any]:
    """Returns the training state that `take` wrote."""
    try:
        with open(path, encoding="utf-8") as file:
            state = json.load(file)
    except (OSError, ValueError) as error:
        raise ContentError(f"{path}: not a training state: {error}") from error
    if not isinstance(state, dict):
        raise ContentError(f"{path}: expected an object, found {type(state).__name__}")
    return state
