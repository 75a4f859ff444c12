"""Decides whether XLA compiles the network of a training step, the same in all processes."""

import logging
from typing import Any

import tensorflow as tf

from flexunet.errors import UsageError
from job.config import TrainConfig
from job.distributed.process_group import ProcessGroup
from job.distributed.runtime import import_tensorflow

logger = logging.getLogger(__name__)


def uses_xla(config: TrainConfig, process_group: ProcessGroup) -> bool:
    """Returns whether XLA compiles the network of a training step, the same in all processes.

    Raises:
        UsageError: --xla=on, but XLA does not work in one of the processes.
    """
    if config.xla == "off":
        return False
    # Batch normalisation sums over the replicas in the middle of the network.
    may = not config.model.exchanges_statistics and not config.deterministic

    def look() -> dict[str, Any]:
        has_gpu = bool(tf.config.list_logical_devices("GPU"))
        is_wanted = config.xla == "on" or (has_gpu and may)
        return {"is_wanted": is_wanted, "reason": why_not_xla() if is_wanted else None}

    found = process_group.all_gather_object(look)
    reason = next((each["reason"] for each in found if each["reason"] is not None), None)
    if reason is not None and config.xla == "on":
        raise UsageError(f"--xla=on: XLA does not work on this machine ({reason}); leave --xla out")
    if reason is not None:
        logger.warning(
            "XLA does not work on this machine (%s): training continues without it", reason
        )
    return reason is None and all(each["is_wanted"] for each in found)


def why_not_xla() -> str | None:
    """Returns why XLA cannot compile a network for the devices of this machine; None: it can.

    On GPUs, XLA needs parts of CUDA that TensorFlow itself does not need.
    """
    tf = import_tensorflow()

    @tf.function(jit_compile=True, autograph=False)
    def convolution(images: Any, kernel: Any) -> Any:
        return tf.nn.softplus(tf.nn.conv2d(images, kernel, 1, "SAME"))

    kernel = tf.ones((3, 3, 8, 8))
    try:
        with tf.GradientTape() as tape:
            tape.watch(kernel)
            value = convolution(tf.ones((1, 8, 8, 8)), kernel)
        tape.gradient(value, kernel).numpy()
    except tf.errors.OpError as error:
        return str(error.message).splitlines()[0]
    return None
