"""Writes a SavedModel, and checks that its graph only computes.

A SavedModel may hold operations that run Python code, or read and write files. A file of this
package has none of them: its operations are those of `_ALLOWED`.
"""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from flexunet.errors import ContentError
from job.exporting.parity import CLASS_IDS, INPUT, PROBABILITIES, Predict

# What networks of this package compute with.
_COMPUTES = frozenset((
    "Add", "AddN", "AddV2", "AvgPool", "BatchToSpaceND", "BiasAdd", "Cast", "ConcatV2", "Const",
    "Conv2D", "Conv2DBackpropInput", "DepthwiseConv2dNative", "Equal", "ExpandDims", "Fill",
    "FloorMod", "FusedBatchNormV3", "GatherV2", "Greater", "GreaterEqual", "Identity", "IdentityN",
    "Max", "MaxPool", "Mean", "Min", "Mul", "NoOp", "Pack", "PartitionedCall", "Placeholder",
    "Prod", "ReadVariableOp", "RealDiv", "Relu", "Relu6", "Reshape", "Rsqrt", "SelectV2", "Shape",
    "Sigmoid", "Softmax", "Softplus", "SpaceToBatchND", "Split", "Square", "SquaredDifference",
    "Squeeze", "StatefulPartitionedCall", "StridedSlice", "Sub", "Sum", "Tanh", "Tile",
    "Transpose", "VarHandleOp",
))  # fmt: skip
# How TensorFlow stores the variables of a SavedModel and reads them again.
_STORES = frozenset((
    "AssignVariableOp", "DisableCopyOnRead", "MergeV2Checkpoints", "RestoreV2", "SaveV2", "Select",
    "ShardedFilename", "StaticRegexFullMatch", "StringJoin", "VarIsInitializedOp",
))  # fmt: skip
_ALLOWED = _COMPUTES | _STORES


def write_savedmodel(model: keras.Model, folder: str) -> None:
    """Writes `model` as a SavedModel to the new `folder`.

    Raises:
        ContentError: its graph has an operation that is not allowed.
    """
    model.export(folder, format="tf_saved_model", verbose=False)
    refused = sorted(operations_of(folder) - _ALLOWED)
    if refused:
        raise ContentError(
            f"SavedModel: its graph has operations that are not on the list of allowed ones: "
            f"{', '.join(refused)}"
        )


def operations_of(folder: str) -> set[str]:
    """Returns the names of all operations in the graphs of a SavedModel, functions included."""
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    found = SavedModel()
    with open(f"{folder}/saved_model.pb", "rb") as file:
        found.ParseFromString(file.read())
    return {node.op for graph in found.meta_graphs for node in _nodes_of(graph.graph_def)}


def _nodes_of(graph: Any) -> Iterator[Any]:
    yield from graph.node
    for function in graph.library.function:
        yield from function.node_def


def open_savedmodel(folder: str) -> Predict:
    """Returns a function that computes what the SavedModel in `folder` computes."""
    import tensorflow as tf

    model = tf.saved_model.load(folder)  # holds the variables

    def predict(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = model.signatures["serving_default"](**{INPUT: tf.constant(pixels)})
        return found[PROBABILITIES].numpy(), found[CLASS_IDS].numpy()

    return predict
