"""Reads the weights of an encoder from a weight file of Keras, as data.

Three forms: the HDF5 files of `keras.applications` with names in attributes (`.h5`), the files of
`save_weights` of Keras 3 (`.weights.h5`), and whole models of Keras 3 (`.keras`), of which only the
weights are read.
"""

import io
import zipfile
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from flexunet.errors import ContentError
from job.compat.h5 import check_array, entry_at

_MAX_BYTES = 1 << 30  # of the weights inside of a .keras file
_INSIDE = "model.weights.h5"
_MAX_ARRAYS = 100_000_000  # values of one array
# Kind of a layer -> its group in a file of Keras 3, and its number of arrays.
_GROUPS = {
    "Conv2D": ("conv2d", 1),
    "DepthwiseConv2D": ("depthwise_conv2d", 1),
    "BatchNormalization": ("batch_normalization", 4),
    "FixedBatchNormalization": ("batch_normalization", 4),
}


def read_keras_weights(data: bytes, kinds: Sequence[str], where: str) -> list[np.ndarray]:
    """Returns the arrays of the first layers in the file that have weights, in order.

    Args:
        data: the whole file.
        kinds: class names of these layers.
        where: origin of `data`, for error messages.

    Raises:
        ContentError: `data` is no such file, or it has fewer layers.
    """
    import h5py

    try:
        if data[:2] == b"PK":
            data = _unpacked(data)
        with h5py.File(io.BytesIO(data), "r") as file:
            root = entry_at(file, "model_weights") if "model_weights" in file else file
            if "layer_names" in root.attrs:
                return _by_names(root, sum(_GROUPS[kind][1] for kind in kinds))
            layers = next(
                (each for each in ("layers", "_layer_checkpoint_dependencies") if each in file),
                "layers",
            )
            return _by_order(entry_at(file, layers), kinds)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        raise ContentError(
            f"{where}: not a weight file of Keras for this encoder ({error}); give a .h5, "
            ".weights.h5 or .keras file of the same network"
        ) from error


def _unpacked(data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive, archive.open(_INSIDE) as file:
        found = file.read(_MAX_BYTES + 1)
    if len(found) > _MAX_BYTES:
        raise ValueError(f"{_INSIDE} has more than {_MAX_BYTES >> 20} MiB")
    return found


def _by_names(root: Any, number: int) -> list[np.ndarray]:
    """Returns the first `number` arrays, in the order of the file's lists of names."""
    arrays: list[np.ndarray] = []
    for layer in root.attrs["layer_names"]:
        group = entry_at(root, _text(layer))
        for name in group.attrs["weight_names"]:
            if len(arrays) < number:
                arrays.append(_array(entry_at(group, _text(name))))
    if len(arrays) < number:
        raise ValueError(f"it has {len(arrays)} arrays, the encoder {number}")
    return arrays


def _by_order(layers: Any, kinds: Sequence[str]) -> list[np.ndarray]:
    """Returns the arrays of layers that Keras 3 numbers by class: conv2d, conv2d_1, ..."""
    numbers: Counter[str] = Counter()
    arrays = []
    for kind in kinds:
        stem, number = _GROUPS[kind]
        name = f"{stem}_{numbers[stem]}" if numbers[stem] else stem
        numbers[stem] += 1
        arrays += [_array(entry_at(layers, f"{name}/vars/{index}")) for index in range(number)]
    return arrays


def _array(entry: Any) -> np.ndarray:
    check_array(entry)
    if entry.size > _MAX_ARRAYS:
        raise ValueError(f"{entry.name} has shape {entry.shape}, too large for an encoder")
    return np.asarray(entry)


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)
