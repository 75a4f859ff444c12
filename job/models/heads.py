"""Makes the output layers of a network, and selects the one that predicts.

Deep supervision (arXiv:1409.5185): besides the main head, coarser levels of the decoder have heads
of their own. They count in the training loss alone, see `job.deep_supervision`. Predictions,
evaluations and exports use the main head.
"""

from collections.abc import Sequence
from typing import Any

import keras

from job.models.blocks import BlockFactory

_MAIN_HEAD = "head"
_NEVER = -1e4  # a logit whose softmax is 0


def segmentation_heads(block: BlockFactory, decoder: Sequence[Any], num_classes: int) -> Any:
    """Returns the logits of the main head, or those of all heads as a list with the main one first.

    Args:
        decoder: outputs of the decoder by level, (B, H / 2^level, W / 2^level, C) each.
        num_classes: logits per pixel.

    Returns:
        (B, H, W, num_classes), or also (B, H / 2^level, W / 2^level, num_classes) for each of the
        levels 1 to `deep_supervision`.
    """
    main = _head(block, decoder[0], num_classes, _MAIN_HEAD)
    # After the main head, which keeps its seed.
    coarser = [
        _head(block, decoder[level], num_classes, f"head_level_{level}")
        for level in range(1, 1 + block.config.deep_supervision)
    ]
    return [main, *coarser] if coarser else main


def _head(block: BlockFactory, x: Any, num_classes: int, name: str) -> Any:
    return keras.layers.Conv2D(
        num_classes,
        1,
        kernel_initializer=block.initializer("glorot_uniform"),
        # Softmax and its gradient need more than the 8 bits of bfloat16.
        dtype="float64" if block.policy.compute_dtype == "float64" else "float32",
        name=name,
    )(x)


def exclude_class(model: keras.Model, class_id: int) -> None:
    """Changes the weights of the main head so that a class has the probability 0 everywhere."""
    head = model.get_layer(_MAIN_HEAD)
    kernel, bias = head.get_weights()
    kernel[..., class_id], bias[class_id] = 0, _NEVER
    head.set_weights([kernel, bias])


def main_model(model: keras.Model) -> keras.Model:
    """Returns the part of `model` that predicts: (B, H, W, C) -> logits (B, H, W, K).

    It shares the weights of `model`, and is `model` itself if that has no other heads.
    """
    if len(model.outputs) == 1:
        return model
    return keras.Model(model.inputs[0], model.outputs[0], name=model.name)


def outputs_of(found: Any) -> list[Any]:
    """Returns the outputs of a call of a model as a list, the main head's first."""
    return list(found) if isinstance(found, list | tuple) else [found]
