"""Model and optimizer state as the members of a commit, and back.

Weights are HDF5 and moments are arrays: data that is read without running anything.
"""

import contextlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.errors import ContentError, StorageError

if TYPE_CHECKING:
    import keras

    from job.optimizer import Adam

WEIGHTS_NAME = "model.weights.h5"
OPTIMIZER_NAME = "optimizer.npz"
STATE_NAME = "state.json"


def take(
    folder: str, model: "keras.Model", optimizer: "Adam", state: Mapping[str, Any]
) -> Callable[[], dict[str, str]]:
    """Takes a checkpoint of the weights, moments and state as they are now.

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
    # On a CPU these share memory with the variables, and the next update copies what it changes.
    weights, moments = _weights(model), optimizer.state()

    def finish() -> dict[str, str]:
        with disk_errors(folder):
            _write_weights(paths[WEIGHTS_NAME], weights)
            weights.clear()
            with open(paths[OPTIMIZER_NAME], "wb") as file:
                np.savez(file, allow_pickle=False, **moments)
            with open(paths[STATE_NAME], "w", encoding="utf-8") as file:
                file.write(text)
        moments.clear()
        return paths

    return finish


def _weights(model: "keras.Model") -> dict[str, tuple[str, dict[str, np.ndarray]]]:
    """Returns (layer name, arrays by name) of each layer, by its place in a Keras weight file.

    Keras numbers the layers of each class; its own writer is not used because it reads the
    variables while it writes, and training would have to wait for the disk.
    """
    num_seen: dict[str, int] = {}
    found = {}
    for layer in model.layers:
        kind = _snake_case(type(layer).__name__)
        index = num_seen[kind] = num_seen.get(kind, -1) + 1
        variables: dict[str, Any] = {}
        layer.save_own_variables(variables)
        arrays = {name: variable.numpy() for name, variable in variables.items()}
        found[f"layers/{kind}_{index}" if index else f"layers/{kind}"] = (layer.name, arrays)
    return found


def _snake_case(name: str) -> str:
    """Returns a class name as Keras writes it in files: Conv2DTranspose is conv2d_transpose."""
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def _write_weights(path: str, weights: Mapping[str, tuple[str, Mapping[str, np.ndarray]]]) -> None:
    """Writes what `_weights` returned as a file that `keras.Model.load_weights` reads."""
    import h5py

    with h5py.File(path, "w") as file:
        for place, (layer_name, arrays) in weights.items():
            group = file.create_group(f"{place}/vars")
            group.attrs["name"] = layer_name
            for name, array in arrays.items():
                group[name] = array


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
        model.load_weights(path)
    except (OSError, KeyError, ValueError) as error:
        problem = str(error).strip().splitlines()[0]
        raise ContentError(
            f"{path}: does not fit this model: {problem}; use the model options it was saved with"
        ) from error


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
