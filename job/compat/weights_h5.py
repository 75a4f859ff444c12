"""Loads a `best_model.h5` of the reference implementation into a model of this package."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flexunet.errors import ContentError
from job.compat.h5 import check_array, entry_at

if TYPE_CHECKING:
    import keras


def load_reference_weights(model: "keras.Model", path: str) -> None:
    """Sets the weights of `model` from a `best_model.h5` of the reference implementation.

    Reads the file as data: ignores its model description, executes nothing and opens no other
    file. Checks all shapes before it reads any values.

    Raises:
        ContentError: not such a file, or its shapes do not fit this model.
    """
    import h5py

    try:
        with h5py.File(path, "r") as file:
            datasets = _h5_datasets(file)
            _check_shapes(model, [each.shape for each in datasets], path)
            weights = [np.asarray(each) for each in datasets]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ContentError(
            f"{path}: not a weight file of the reference implementation ({error}); "
            "expected Keras HDF5 with layer_names and weight_names"
        ) from error
    set_weights(model, weights, source=path)


def set_weights(model: "keras.Model", weights: Sequence[np.ndarray], *, source: str) -> None:
    """Sets all weights of `model`, in creation order, from `weights` read from `source`.

    Raises:
        ContentError: their number or shapes do not fit this model.
    """
    _check_shapes(model, [each.shape for each in weights], source)
    for variable, value in zip(creation_order(model), weights, strict=True):
        variable.assign(value)


def _check_shapes(model: "keras.Model", found: Sequence[tuple[int, ...]], source: str) -> None:
    variables = creation_order(model)
    wanted = [tuple(variable.shape) for variable in variables]
    if list(found) == wanted:
        return
    at = next((i for i, (f, w) in enumerate(zip(found, wanted, strict=False)) if f != w), None)
    difference = (
        f"{len(found)} weights, the model has {len(wanted)}"
        if at is None
        else f"weight {at} has shape {found[at]}, {variables[at].path} of the model {wanted[at]}"
    )
    raise ContentError(
        f"{source}: does not fit the model: {difference}; give the model options of its training"
    )


def creation_order(model: "keras.Model") -> list[Any]:
    """Returns all weights layer by layer in creation order, as the reference saves them.

    Keras sorts the layers of a functional model by depth. In a U-Net without branches of equal
    depth this is the creation order; ties keep their order of creation.
    """
    return [weight for layer in model.layers for weight in layer.weights]


def _h5_datasets(file: Any) -> list[Any]:
    """Returns the unread datasets of all weights, in the order of the file's lists."""
    root = entry_at(file, "model_weights") if "model_weights" in file else file
    datasets = []
    for layer in root.attrs["layer_names"]:
        group = entry_at(root, _text(layer))
        for name in group.attrs["weight_names"]:
            datasets.append(entry_at(group, _text(name)))
            check_array(datasets[-1])
    return datasets


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)
