"""Describes the encoders EfficientNet-Lite0 and MobileNetV2; needs no TensorFlow."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """Describes blocks of the same number of channels.

    Attributes:
        expansion: channels inside of a block / channels of its input.
        side: of the depthwise kernel, pixels.
        strides: of the first block.
        filters: channels of the output.
        repeats: number of blocks.
    """

    expansion: int
    side: int
    strides: int
    filters: int
    repeats: int


@dataclass(frozen=True)
class Encoder:
    """Describes an encoder, which takes (pixel - offset) / scale for pixels of 0 to 255.

    Attributes:
        stem: channels of the first convolution, which halves the sides.
    """

    stem: int
    stages: tuple[Stage, ...]
    offset: float
    scale: float


ENCODERS = {
    # Tan and Le 2019, arXiv:1905.11946; Lite: github.com/tensorflow/tpu, efficientnet/lite.
    "efficientnet-lite0": Encoder(
        32,
        (
            Stage(1, 3, 1, 16, 1),
            Stage(6, 3, 2, 24, 2),
            Stage(6, 5, 2, 40, 2),
            Stage(6, 3, 2, 80, 3),
            Stage(6, 5, 1, 112, 3),
            Stage(6, 5, 2, 192, 4),
            Stage(6, 3, 1, 320, 1),
        ),
        offset=127.0,
        scale=128.0,
    ),
    # Sandler et al. 2018, arXiv:1801.04381.
    "mobilenet-v2": Encoder(
        32,
        (
            Stage(1, 3, 1, 16, 1),
            Stage(6, 3, 2, 24, 2),
            Stage(6, 3, 2, 32, 3),
            Stage(6, 3, 2, 64, 4),
            Stage(6, 3, 1, 96, 3),
            Stage(6, 3, 2, 160, 3),
            Stage(6, 3, 1, 320, 1),
        ),
        offset=127.5,
        scale=127.5,
    ),
}
