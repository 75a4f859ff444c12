"""Checks model and dataset compatibility without importing TensorFlow."""

from data_prep.shards.manifest import Manifest
from flexunet.errors import UsageError
from flexunet.settings import suggestion
from job.config import MODELS, ModelConfig, TrainConfig, check_class_weights, check_ssim_sides
from job.data.dataset import Dataset

FLOAT16_MAX = 65504.0


def check_compatible(config: TrainConfig, dataset: Dataset) -> None:
    """Refuses a dataset on which `config` cannot train.

    Raises:
        UsageError: there is no such model; image sides, channels, classes, class weights, precision
            or window overlap do not fit; or a required split is empty.
    """
    name = config.model.name
    if name not in MODELS:
        raise UsageError(f"--model.name={name!r}: no such model; {suggestion(name, list(MODELS))}")
    for name in ("train", "valid"):
        dataset.split(name)
    manifest = dataset.manifest
    check_class_weights(config.loss.class_weights, num_outputs(config, manifest))
    height, width, _ = shape = image_shape(config, manifest)
    check_sides(shape, config.model)
    if config.model.normalization == "instance" and not config.model.has_encoder:
        check_coarsest(shape, config.model.num_layers)
    if config.precision == "mixed_float16":
        check_float16(input_max(config, manifest))
    if config.loss.name == "basnet_hybrid":
        check_ssim_sides(height, width)
    if manifest.geometry == "tile":
        window_overlap(manifest, config.window_overlap, flag="--window-overlap")


def image_shape(config: TrainConfig, manifest: Manifest) -> tuple[int, int, int]:
    """Returns (H, W, C) of the network's input, in pixels and channels.

    Raises:
        UsageError: the dataset does not have these channels.
    """
    channels = config.model.image_channels or manifest.channels
    if channels != manifest.channels and manifest.channels != 1:
        raise UsageError(
            f"--model.image-channels={channels}: the dataset has {manifest.channels} channels; "
            "leave --model.image-channels out, or prepare the dataset with --channels grey"
        )
    return manifest.image_height, manifest.image_width, channels


def input_max(config: TrainConfig, manifest: Manifest) -> float:
    """Returns the largest possible input of the first convolution."""
    return 1.0 if config.model.input_scaling == "unit" else float(manifest.value_max)


def num_outputs(config: TrainConfig, manifest: Manifest) -> int:
    """Returns the output channels: one per class, or 1 for a sigmoid output.

    Raises:
        UsageError: the config has another number.
    """
    found, wanted = len(manifest.classes), config.model.num_classes
    if wanted is None or wanted == found or (wanted == 1 and found == 2):
        return wanted or found
    raise UsageError(
        f"--model.num-classes={wanted}: the dataset has {found} classes "
        f"({', '.join(each.name for each in manifest.classes)}); leave --model.num-classes out"
    )


def check_float16(largest: float) -> None:
    """Refuses network inputs that are too large for float16.

    Raises:
        UsageError: `largest` is too large.
    """
    if largest > FLOAT16_MAX:
        raise UsageError(
            f"--precision=mixed_float16: pixel values of up to {largest:g} exceed the largest "
            f"float16 number, {FLOAT16_MAX:g}; give --model.input-scaling=unit or "
            "--precision=float32"
        )


def check_sides(shape: tuple[int, int, int], model: ModelConfig) -> None:
    """Refuses an image (H, W, C) whose sides cannot be halved from level to level.

    Raises:
        UsageError: names the levels and the sides.
    """
    multiple = 2 ** (model.levels - 1)
    height, width, _ = shape
    if height % multiple or width % multiple:
        option, remedy = f"--model.num-layers={model.levels}", "lower --model.num-layers or "
        if model.has_encoder:
            option, remedy = f"--model.name={model.name}", ""
        raise UsageError(
            f"{option} needs image sides divisible by {multiple}, got {height}x{width}; "
            f"{remedy}prepare another image size"
        )


def check_coarsest(shape: tuple[int, int, int], num_layers: int) -> None:
    """Refuses an image (H, W, C) of which the coarsest of `num_layers` levels is one pixel.

    Raises:
        UsageError: names the levels and the sides.
    """
    height, width, _ = shape
    if height * width == 4 ** (num_layers - 1):
        raise UsageError(
            f"--model.normalization=instance: level {num_layers} of images of {height}x{width} is "
            "one pixel, which minus its own mean is 0; lower --model.num-layers, or choose "
            "--model.normalization=group"
        )


def window_overlap(manifest: Manifest, *wanted: int | None, flag: str = "--overlap") -> int:
    """Returns the window overlap in pixels: the first of `wanted` that is set, or half a window.

    Args:
        flag: option for the overlap, for the error message.

    Raises:
        UsageError: the overlap is not smaller than a window.
    """
    side = min(manifest.image_height, manifest.image_width)
    overlap = next((each for each in wanted if each is not None), side // 2)
    if overlap >= side:
        raise UsageError(
            f"windows of {manifest.image_height}x{manifest.image_width} pixels cannot overlap by "
            f"{overlap}; give {flag} below {side}"
        )
    return overlap
