"""Model and optimizer state as the members of a commit, and back.

Weights are HDF5 and moments are arrays: data that is read without running anything.
"""

import contextlib
import json
import os
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
        What writes the rest of its members into `folder` and returns their paths by name; training
        may go on before it is called.

    Raises:
        StorageError: the folder is full or cannot be written; the returned function too.
    """
    paths = {
        name: os.path.join(folder, name) for name in (WEIGHTS_NAME, OPTIMIZER_NAME, STATE_NAME)
    }
    text = json.dumps(state)
    with disk_errors(folder):
        _check_space(folder, model)
        model.save_weights(paths[WEIGHTS_NAME])
    moments = optimizer.state()  # copies

    def finish() -> dict[str, str]:
        with disk_errors(folder):
            with open(paths[OPTIMIZER_NAME], "wb") as file:
                np.savez(file, allow_pickle=False, **moments)
            with open(paths[STATE_NAME], "w", encoding="utf-8") as file:
                file.write(text)
        moments.clear()
        return paths

    return finish


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
