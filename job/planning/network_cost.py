"""Estimates parameters, arithmetic, memory and receptive field of a network."""

from dataclasses import dataclass

from job.config import ModelConfig
from job.models.encoders.stages import ENCODERS


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

    def join(self, model: ModelConfig, level: int, inputs: int, pixels: float) -> None:
        """Adds a transposed convolution to `pixels`, and the values joined with its output."""
        self.convolve(4, inputs, _filters(model, level), pixels / 4)
        self.num_values += _filters(model, level) * pixels * 0.75  # all of them, not a quarter


def network_cost(model: ModelConfig, shape: tuple[int, int, int], num_outputs: int) -> NetworkCost:
    """Returns the cost of a network for images of `shape` (H, W, C)."""
    height, width, channels = shape
    add = {"residual-unet": _add_residual, "encoder-unet": _add_encoder}
    cost = _Sum()
    add.get(model.name, _add_flexunet)(cost, model, height * width, channels)
    cost.convolve(1, _filters(model, 0), num_outputs, height * width)
    return NetworkCost(cost.num_parameters, cost.flops, cost.num_values, receptive_field(model))


def _filters(model: ModelConfig, level: int) -> int:
    doubled = model.base_filters * 2**level
    return doubled if model.max_filters is None else min(doubled, model.max_filters)


def _add_flexunet(cost: _Sum, model: ModelConfig, num_pixels: int, channels: int) -> None:
    for level in range(model.num_layers):
        filters, pixels = _filters(model, level), num_pixels / 4**level
        area = _kernel_side(model, level, 0) * _kernel_side(model, level, 1)
        inputs = _filters(model, level - 1) if level else channels
        for each in (inputs, filters):
            cost.convolve(area, each, filters, pixels)
            cost.normalize(model, filters)
        if level == model.num_layers - 1:
            continue
        cost.join(model, level, _filters(model, level + 1), pixels)
        cost.num_values += 2 * filters * pixels
        for each in (2 * filters, filters):
            cost.convolve(area, each, filters, pixels)
            cost.normalize(model, filters)


def _add_residual(cost: _Sum, model: ModelConfig, num_pixels: int, channels: int) -> None:
    inputs = _filters(model, 0)
    cost.convolve(9, channels, inputs, num_pixels)
    cost.normalize(model, inputs)
    for level in range(model.num_layers):
        filters, pixels = _filters(model, level), num_pixels / 4**level
        blocks = model.residual_blocks
        for _ in range(blocks[min(level, len(blocks) - 1)]):
            for each in (inputs, filters):
                cost.convolve(9, each, filters, pixels)
                cost.normalize(model, filters)
            cost.num_values += 2 * filters * pixels  # activations
            if inputs != filters:
                cost.convolve(1, inputs, filters, pixels)
                cost.normalize(model, filters)
            inputs = filters
        if level < model.num_layers - 1:
            cost.join(model, level, _filters(model, level + 1), pixels)
            cost.num_values += 3 * filters * pixels  # joined with the skip; activated
            cost.convolve(9, 2 * filters, filters, pixels)
            cost.normalize(model, filters)


def _add_encoder(cost: _Sum, model: ModelConfig, num_pixels: int, channels: int) -> None:
    encoder = ENCODERS[model.encoder]
    skips, inputs, pixels = [channels], encoder.stem, num_pixels / 4
    _convolve_normalized(cost, 9, channels, inputs, pixels)
    for stage in encoder.stages:
        for index in range(stage.repeats):
            inner = inputs * stage.expansion
            if stage.expansion > 1:
                _convolve_normalized(cost, 1, inputs, inner, pixels)
            if index == 0 and stage.strides > 1:
                skips.append(inputs)
                pixels /= 4
            # Each filter of a depthwise convolution sees one channel.
            _convolve_normalized(cost, stage.side**2, 1, inner, pixels)
            _convolve_normalized(cost, 1, inner, stage.filters, pixels)
            inputs = stage.filters
    for level in reversed(range(len(skips))):
        filters, pixels = _filters(model, level), num_pixels / 4**level
        cost.join(model, level, inputs, pixels)
        cost.num_values += (filters + skips[level] + 2 * filters) * pixels
        for each in (filters + skips[level], filters):
            cost.convolve(9, each, filters, pixels)
            cost.normalize(model, filters)
        inputs = filters


def _convolve_normalized(cost: _Sum, area: int, inputs: int, outputs: int, pixels: float) -> None:
    """Adds a convolution without biases, its batch normalisation and activation."""
    cost.convolve(area, inputs, outputs, pixels)
    cost.num_parameters += outputs  # two for the normalisation, instead of a bias
    cost.num_values += 2 * outputs * pixels


def receptive_field(model: ModelConfig) -> int:
    """Returns the side of the square that one output pixel depends on, in pixels."""
    if model.name == "encoder-unet":
        return _encoder_field(model)
    side = 1
    for level in range(model.num_layers):
        kernel = max(_kernel_side(model, level, axis) for axis in (0, 1))
        reach = (kernel - 1) * max(max(step - level, 1) for step in model.dilation)
        is_deepest = level == model.num_layers - 1
        num_convolutions = 2 if is_deepest else 4
        if model.name == "residual-unet":
            blocks = model.residual_blocks
            num_blocks = blocks[min(level, len(blocks) - 1)]
            reach, num_convolutions = 2, 2 * num_blocks + (level == 0) + (not is_deepest)
        side += num_convolutions * reach * 2**level + (0 if is_deepest else 2**level)
    return side


def _encoder_field(model: ModelConfig) -> int:
    side, step = 1 + 2, 2  # the stem
    for stage in ENCODERS[model.encoder].stages:
        for index in range(stage.repeats):
            side += (stage.side - 1) * step
            step *= stage.strides if index == 0 else 1
    # Two convolutions of the decoder at each level but the deepest.
    return side + sum(4 * 2**level for level in range(step.bit_length() - 1))


def _kernel_side(model: ModelConfig, level: int, axis: int) -> int:
    return max(model.base_kernels[axis] - 2 * level, 3)
