"""Estimates parameters, arithmetic, memory and receptive field of the FlexUNet network.

Other networks of the same shape cost about as much; the dry step measures them.
"""

from dataclasses import dataclass

from job.config import ModelConfig


@dataclass(frozen=True)
class NetworkCost:
    """Holds the size of a network.

    Attributes:
        num_parameters: trainable numbers.
        flops: floating-point operations of one image, forward; the backward pass takes twice as
            many.
        num_values: numbers per image that the backward pass needs again.
        receptive_field: pixels, side of the square that one output pixel depends on.
    """

    num_parameters: int
    flops: float
    num_values: float
    receptive_field: int


@dataclass
class _Sum:
    """Adds up the layers of a network."""

    num_parameters: int = 0
    flops: float = 0.0
    num_values: float = 0.0

    def convolve(self, area: int, inputs: int, outputs: int, pixels: float) -> None:
        """Adds a convolution with a kernel of `area` pixels."""
        self.num_parameters += (area * inputs + 1) * outputs
        self.flops += 2.0 * area * inputs * outputs * pixels
        self.num_values += outputs * pixels

    def normalize(self, model: ModelConfig, channels: int) -> None:
        """Adds the parameters of a normalisation."""
        self.num_parameters += 0 if model.normalization == "none" else 2 * channels


def network_cost(model: ModelConfig, shape: tuple[int, int, int], num_outputs: int) -> NetworkCost:
    """Returns the cost of the FlexUNet network for images of `shape` (H, W, C)."""
    height, width, channels = shape
    cost = _Sum()
    for level in range(model.num_layers):
        filters, pixels = model.base_filters * 2**level, height * width / 4**level
        area = _kernel_side(model, level, 0) * _kernel_side(model, level, 1)
        inputs = channels if level == 0 else filters // 2
        for each in (inputs, filters):
            cost.convolve(area, each, filters, pixels)
            cost.normalize(model, filters)
        if level == model.num_layers - 1:
            continue
        cost.convolve(4, 2 * filters, filters, pixels / 4)  # a transposed convolution, stride 2
        cost.num_values += filters * pixels * (2 + 0.75)  # joined with the skip; all upsampled
        for each in (2 * filters, filters):
            cost.convolve(area, each, filters, pixels)
            cost.normalize(model, filters)
    cost.convolve(1, model.base_filters, num_outputs, height * width)
    return NetworkCost(cost.num_parameters, cost.flops, cost.num_values, receptive_field(model))


def receptive_field(model: ModelConfig) -> int:
    """Returns the side of the square that one output pixel depends on, in pixels."""
    side = 1
    for level in range(model.num_layers):
        kernel = max(_kernel_side(model, level, axis) for axis in (0, 1))
        reach = (kernel - 1) * max(max(step - level, 1) for step in model.dilation)
        is_deepest = level == model.num_layers - 1
        side += (2 if is_deepest else 4) * reach * 2**level + (0 if is_deepest else 2**level)
    return side


def _kernel_side(model: ModelConfig, level: int, axis: int) -> int:
    return max(model.base_kernels[axis] - 2 * level, 3)
