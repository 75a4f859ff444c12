"""Writes an ONNX file with sizes left open, and checks it with the full checker of ONNX."""

import logging
from typing import Any

import keras
import numpy as np

from flexunet.errors import ContentError
from job.exporting.parity import CLASS_IDS, INPUT, PROBABILITIES, Predict

_OPSET = 18  # tf2onnx 1.17 converts no later one
_SIZES = ("batch", "height", "width")


def write_onnx_file(model: keras.Model, path: str) -> None:
    """Writes `model` to the new file `path`.

    Raises:
        ContentError: ONNX does not accept the file.
    """
    import onnx
    import tensorflow as tf
    import tf2onnx

    logging.getLogger("tf2onnx").setLevel(logging.ERROR)
    image = model.inputs[0]
    signature = [tf.TensorSpec(image.shape, image.dtype, name=INPUT)]

    @tf.function(input_signature=signature, autograph=False)
    def serve(image: tf.Tensor) -> Any:
        return model(image, training=False)

    found, _ = tf2onnx.convert.from_function(serve, signature, opset=_OPSET)
    _name_sizes(found.graph)
    try:
        onnx.checker.check_model(found, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ContentError(f"ONNX: the converted model is not valid: {error}") from error
    onnx.save(found, path)


def _name_sizes(graph: Any) -> None:
    """Names the sizes that are open, for people and for programs that set them."""
    del graph.value_info[:]  # has other names
    for value in (*graph.input, *graph.output):
        dimensions = value.type.tensor_type.shape.dim
        for dimension, name in zip(dimensions, _SIZES, strict=False):
            dimension.dim_param = name


def open_onnx_file(path: str) -> Predict:
    """Returns a function that computes what onnxruntime computes from the file."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def predict(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        probabilities, ids = session.run([PROBABILITIES, CLASS_IDS], {INPUT: pixels})
        return probabilities, ids

    return predict
