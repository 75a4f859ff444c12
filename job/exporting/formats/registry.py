"""Lists the formats: their files, the packages that they need, how they are written and read."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flexunet.errors import UsageError
from job.exporting.options import Format
from job.exporting.parity import Predict

# In an export, by format. SavedModel is a folder.
PATHS: dict[Format, str] = {
    "savedmodel": "savedmodel",
    "keras": "model.keras",
    "onnx": "model.onnx",
}
_PACKAGES: dict[Format, tuple[str, ...]] = {"onnx": ("onnx", "onnxruntime", "tf2onnx")}
_ONNX_BYTES = 1_900_000_000  # one file of protobuf holds less than 2 GiB, with the graph


@dataclass(frozen=True)
class FormatFunctions:
    """How a format is written and read.

    Attributes:
        write: called with the model of `serving_model` and a new path; checks what it wrote.
        open: called with that path; returns what the file computes.
    """

    write: Callable[[Any, str], None]
    open: Callable[[str], Predict]


def check_installed(formats: Sequence[Format]) -> None:
    """Refuses formats that need packages which are not installed; imports none.

    Raises:
        UsageError: names the packages, and how to install them.
    """
    for name in formats:
        missing = [
            each for each in _PACKAGES.get(name, ()) if importlib.util.find_spec(each) is None
        ]
        if missing:
            raise UsageError(
                f"--format {name}: not installed: {', '.join(missing)}; run "
                f"`pip install 'flexunet[{name}]'`, or leave out this format"
            )


def check_size(formats: Sequence[Format], num_parameters: int) -> None:
    """Refuses formats that cannot hold a model with so many float32 parameters.

    Raises:
        UsageError: names the formats that can.
    """
    num_bytes = 4 * num_parameters
    if "onnx" in formats and num_bytes > _ONNX_BYTES:
        raise UsageError(
            f"--format onnx: the weights of all runs have {num_bytes / 1e9:.2f} GB, and an ONNX "
            f"file holds {_ONNX_BYTES / 1e9:.1f} GB; give --format savedmodel or keras"
        )


def functions_of(name: Format) -> FormatFunctions:
    """Returns how format `name` is written and read; imports TensorFlow and the format's own."""
    if name == "savedmodel":
        from job.exporting.formats.savedmodel import open_savedmodel, write_savedmodel

        return FormatFunctions(write_savedmodel, open_savedmodel)
    if name == "keras":
        from job.exporting.formats.keras_file import open_keras_file, write_keras_file

        return FormatFunctions(write_keras_file, open_keras_file)
    from job.exporting.formats.onnx_file import open_onnx_file, write_onnx_file

    return FormatFunctions(write_onnx_file, open_onnx_file)
