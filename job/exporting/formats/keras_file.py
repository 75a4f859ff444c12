"""Writes a `.keras` file that Keras alone can load, and checks that it names no other class."""

import json
import zipfile
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from flexunet.errors import ContentError
from job.exporting.parity import CLASS_IDS, PROBABILITIES, Predict


def write_keras_file(model: keras.Model, path: str) -> None:
    """Writes `model` to the new file `path`, which ends with `.keras`.

    Raises:
        ContentError: the file names a class or function that is not of Keras.
    """
    model.save(path)
    with zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read("config.json"))
    refused = sorted({name for name in names_of(config) if not name.startswith("keras.")})
    if refused:
        raise ContentError(
            f".keras file: names classes that are not of Keras: {', '.join(refused)}"
        )


def names_of(config: Any) -> Iterator[str]:
    """Yields the module and name of each class and function of a stored model.

    A name that a package has registered is yielded as it was registered, `package>name`.
    """
    if isinstance(config, list):
        for each in config:
            yield from names_of(each)
    elif isinstance(config, dict):
        name = config.get("class_name")
        registered = config.get("registered_name")
        if name is not None and not str(name).startswith("__"):  # a tensor or an array, as data
            is_own = registered is not None and registered != name
            yield str(registered) if is_own else f"{config.get('module')}.{name}"
        for each in config.values():
            yield from names_of(each)


def open_keras_file(path: str) -> Predict:
    """Returns a function that computes what the file computes; loads it in safe mode."""
    model = keras.saving.load_model(path, compile=False, safe_mode=True)

    def predict(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = model(pixels, training=False)
        return found[PROBABILITIES].numpy(), found[CLASS_IDS].numpy()

    return predict
