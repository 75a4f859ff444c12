"""Writes model and optimizer state as the files of a checkpoint, and reads them.

Weights are HDF5 with one array per variable path; moments are NumPy arrays. Reading executes
nothing.
"""

import contextlib
import json
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from flexunet.errors import ContentError, StorageError
from job.compat.h5 import check_array, entry_at

if TYPE_CHECKING:
    import keras

WEIGHTS_NAME = "model.weights.h5"  # those to predict with: averaged if the run averages
RAW_WEIGHTS_NAME = "raw.weights.h5"  # those to train on; only if the run averages its weights
OPTIMIZER_NAME = "optimizer.npz"
STATE_NAME = "state.json"
_VERSION = "flexunet_weights"  # attribute of a weight file; Keras' own files lack it
_ARRAY = ":0"  # ends the name of an array


class Average(Protocol):
    """Defines an average of weights."""

    def of(self, weight: Any) -> Any:
        """Returns the average of a TensorFlow variable."""
        ...

    def restart(self) -> None:
        """Sets the average to the current weights."""
        ...


class OptimizerState(Protocol):
    """Defines an optimizer whose state can be stored and restored."""

    @property
    def average(self) -> Average | None:
        """The average of the weights, if the run keeps one."""
        ...

    def named_variables(self) -> dict[str, Any]:
        """Returns the TensorFlow variables that hold the state, by name."""
        ...

    def load_state(self, moments: Mapping[str, np.ndarray], *, source: str) -> None:
        """Sets the state; raises ContentError if names or shapes do not fit."""
        ...


# Arrays that hold copies of checkpoints, reused from one to the next: touching new memory takes
# several times as long as the copy.
Memory = list[dict[str, np.ndarray]]


def take(
    folder: str,
    model: "keras.Model",
    optimizer: OptimizerState,
    state: Mapping[str, Any],
    memory: Memory | None = None,
) -> Callable[[], dict[str, str]]:
    """Copies the current weights, moments and state, and returns a function that writes them.

    Args:
        memory: reusable arrays of earlier checkpoints of this model; the returned function puts its
            arrays back.

    Returns:
        A function that writes the files into `folder` and returns their paths by name. Training may
        continue before it is called.

    Raises:
        StorageError: too little disk space; the returned function also if it cannot write.
    """
    text = json.dumps(state)
    average, moments = optimizer.average, optimizer.named_variables()
    with disk_errors(folder):
        _check_space(folder, model, num_copies=3 if average is None else 4)
    memory = [] if memory is None else memory
    weights = {name: variable.value for name, variable in weights_by_path(model).items()}
    files = {WEIGHTS_NAME: weights, OPTIMIZER_NAME: moments}
    if average is not None:
        averages = {name: average.of(weight) for name, weight in weights.items()}
        files = {WEIGHTS_NAME: averages, RAW_WEIGHTS_NAME: weights, OPTIMIZER_NAME: moments}
    # Prefixes, because the same name may be in several files.
    named = {f"{file}/{name}": each for file, part in files.items() for name, each in part.items()}
    arrays = _copied(named, memory.pop() if memory else {})
    paths = {name: os.path.join(folder, name) for name in (*files, STATE_NAME)}

    def finish() -> dict[str, str]:
        with disk_errors(folder):
            for file_name, part in files.items():
                values = {name: arrays[f"{file_name}/{name}"] for name in part}
                if file_name == OPTIMIZER_NAME:
                    with open(paths[file_name], "wb") as file:
                        np.savez(file, allow_pickle=False, **values)
                else:
                    _write_weights(paths[file_name], values)
            with open(paths[STATE_NAME], "w", encoding="utf-8") as file:
                file.write(text)
        memory.append(arrays)
        return paths

    return finish


def _copied(variables: Mapping[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Copies `variables` into `arrays`, adds missing arrays, and returns `arrays`."""
    import tensorflow as tf

    def on_host(variable: Any) -> Any:
        with tf.device("CPU:0"):
            return tf.identity(variable.read_value())

    for name, variable in variables.items():
        values = np.asarray(memoryview(on_host(variable)))
        if name not in arrays:
            arrays[name] = np.empty_like(values)
        np.copyto(arrays[name], values)
    return arrays


def weights_by_path(model: "keras.Model") -> dict[str, Any]:
    """Returns the variables of a model by path, the same in every process.

    Keras numbers unnamed layers over all models of a process: `conv2d_8`. Here they are numbered
    within their parent, in the order of the model's variables: `conv2d`, `conv2d_1`. Explicit names
    stay. If variables share a path, the later ones get a number.
    """
    automatic = {_snake_case(type(layer).__name__) for layer in model._flatten_layers()}
    automatic.add("seed_generator")  # part of layers that draw random numbers; not a layer itself
    seen: dict[tuple[str, str], dict[str, int]] = {}

    def renamed(parent: str, name: str) -> str:
        stem = re.sub(r"_\d+$", "", name)
        if stem not in automatic:
            return name
        numbers = seen.setdefault((parent, stem), {})
        number = numbers.setdefault(name, len(numbers))
        return f"{stem}_{number}" if number else stem

    found: dict[str, Any] = {}
    for variable in model.variables:
        *layers, last = variable.path.split("/")
        parent = ""
        for layer in layers:
            parent += f"{renamed(parent, layer)}/"
        path, number = f"{parent}{last}", 0
        while path in found:
            number += 1
            path = f"{parent}{last}_{number}"
        found[path] = variable
    return found


def _snake_case(name: str) -> str:
    """Returns a class name in the form of Keras: Conv2DTranspose is conv2d_transpose."""
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def _write_weights(path: str, weights: Mapping[str, np.ndarray]) -> None:
    """Writes arrays by the path of their variable.

    Raises:
        StorageError: the written file does not have exactly these arrays.
    """
    import h5py

    with h5py.File(path, "w") as file:
        file.attrs[_VERSION] = 2
        for name, values in weights.items():
            file[_entry_name(name)] = values
    expected = {name: values.shape for name, values in weights.items()}
    with h5py.File(path, "r") as file:
        problem = _difference(_shapes(file), expected)
    if problem:
        raise StorageError(f"{path}: does not have the weights that were written: {problem}")


def _entry_name(path: str) -> str:
    # A layer may have a variable and a layer with the same name.
    return f"{path}{_ARRAY}"


def _shapes(file: Any) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every array of an HDF5 file, by the path of its variable."""
    import h5py

    shapes: dict[str, tuple[int, ...]] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            shapes[name.removesuffix(_ARRAY)] = item.shape

    file.visititems(visit)
    return shapes


def _difference(
    found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> str | None:
    """Returns the first difference between two sets of arrays; None if there is none."""
    missing = [name for name in wanted if name not in found]
    more = [name for name in found if name not in wanted]
    if missing or more:
        lacks = f"it lacks {missing[0]}" if missing else f"the model has no {more[0]}"
        return f"it has {len(found)} arrays, the model has {len(wanted)}; {lacks}"
    for name, shape in wanted.items():
        if found[name] != shape:
            return f"{name} has shape {found[name]}, the model's {shape}"
    return None


@contextlib.contextmanager
def disk_errors(folder: str) -> Iterator[None]:
    """Converts errors of the operating system inside the block to a one-line StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{folder}: cannot write the checkpoint: {error}") from error


def _check_space(folder: str, model: "keras.Model", *, num_copies: int) -> None:
    """Refuses a folder with too little space: HDF5 ends the process if a write fails.

    Args:
        num_copies: arrays of the size of each trainable weight.
    """
    weights = sum(_num_bytes(weight) for weight in model.non_trainable_variables)
    needed = weights + num_copies * sum(_num_bytes(weight) for weight in model.trainable_weights)
    free = shutil.disk_usage(folder).free
    if free < needed * 1.05 + 2**20:
        raise StorageError(
            f"{folder}: No space left on device: a checkpoint needs {needed / 2**20:.0f} MiB, "
            f"{free / 2**20:.0f} MiB are free; free space or set TMPDIR to a larger disk"
        )


def _num_bytes(weight: Any) -> int:
    return int(np.prod(weight.shape)) * np.dtype(weight.dtype).itemsize


def read_weights(model: "keras.Model", path: str) -> None:
    """Sets the weights of `model` from a file of `take`, of this version or of 0.1.0.

    Sets nothing if they do not fit. Also reads weight files of Keras.

    Raises:
        ContentError: not weights of this model.
    """
    import h5py

    try:
        with h5py.File(path, "r") as file:
            version = file.attrs.get(_VERSION)
            if version is not None:
                _set_by_path(model, file, version)
                return
            found, wanted = len(_shapes(file)), len(model.weights)
        # Keras ignores arrays that the model does not have.
        if found != wanted:
            raise ValueError(f"it has {found} arrays, the model has {wanted}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # many lines before the error
            model.load_weights(path)
    except (OSError, KeyError, TypeError, ValueError) as error:
        problem = str(error).strip().splitlines()[0]
        raise ContentError(
            f"{path}: does not fit this model: {problem}; give the model options of its training"
        ) from error


def _set_by_path(model: "keras.Model", file: Any, version: Any) -> None:
    if version != 2:
        raise ValueError(f"it has version {version} of the format, but 2 is known")
    weights = weights_by_path(model)
    problem = _difference(_shapes(file), {name: tuple(w.shape) for name, w in weights.items()})
    if problem:
        raise ValueError(problem)
    entries = {name: entry_at(file, _entry_name(name)) for name in weights}
    for entry in entries.values():
        check_array(entry, kinds="fiub")
    for name, weight in weights.items():
        weight.assign(np.asarray(entries[name]))


def read_trained_weights(
    model: "keras.Model", optimizer: OptimizerState, members: Mapping[str, str]
) -> None:
    """Sets the weights to go on training with, and their average if the run keeps one.

    Args:
        members: the files of a checkpoint, by name.

    Raises:
        ContentError: not weights of this model.
    """
    read_weights(model, members[WEIGHTS_NAME])
    if optimizer.average is not None:
        optimizer.average.restart()
        read_weights(model, members[RAW_WEIGHTS_NAME])


def read_optimizer(optimizer: OptimizerState, path: str) -> None:
    """Sets the moments of `optimizer` from a file of `take`."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            optimizer.load_state(arrays, source=path)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ContentError(f"{path}: not an optimizer state: {error}") from error


def read_state(path: str) -> dict[str, Any]:
    """Returns the training state from a file of `take`."""
    try:
        with open(path, encoding="utf-8") as file:
            state = json.load(file)
    except (OSError, ValueError) as error:
        raise ContentError(f"{path}: not a training state: {error}") from error
    if not isinstance(state, dict):
        raise ContentError(f"{path}: expected an object, found {type(state).__name__}")
    return state
