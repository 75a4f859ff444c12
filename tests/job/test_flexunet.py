"""FlexUNet: parity with the reference network, its size, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest

from flexunet.errors import ContentError, UsageError
from flexunet.settings import parse_settings
from job.compat.weights_h5 import creation_order, load_reference_weights, set_weights
from job.config import MODELS, ModelConfig
from job.models.heads import main_model
from job.models.registry import BUILDERS, build_model

PARITY = Path(__file__).parent / "parity"
SMALL = ModelConfig(num_layers=3, base_filters=2, base_kernels=(5, 5))


def reference_case(name: str) -> tuple[keras.Model, list[np.ndarray], np.ndarray, np.ndarray]:
    """Returns the model, its reference weights, the input and the expected probabilities."""
    with np.load(PARITY / f"{name}.npz", allow_pickle=False) as arrays:
        config = json.loads(str(arrays["config"]))
        weights = [arrays[key] for key in arrays if "|" in key]
        images = arrays["x"].astype(np.float32) * arrays["x_scale"]
        expected = arrays["y"]
    model = build_model(
        ModelConfig(
            num_layers=config["num_layers"],
            base_filters=config["base_filters"],
            base_kernels=config["base_kernels"],
            dilation=config["dilation"],
            normalization="batch" if config["normalization"] else "none",
            activation=config["activation"],
            input_scaling="unit" if config["input_normalize"] else "none",
            dropout_rate=config["dropout_rate"],
        ),
        image_shape=(config["image_height"], config["image_width"], config["image_channels"]),
        num_classes=config["num_classes"],
    )
    return model, weights, images, expected


@pytest.mark.parametrize("name", ["plain", "norm_mish_dilated"])
def test_flexunet_gives_the_reference_probabilities(name: str) -> None:
    model, weights, images, expected = reference_case(name)
    set_weights(model, weights, source=name)
    probabilities = keras.ops.softmax(model(images)).numpy()
    assert np.abs(probabilities - expected).max() < 1e-5


def test_reference_file_is_read_as_data(tmp_path: Path) -> None:
    model, weights, images, expected = reference_case("plain")
    path = tmp_path / "best_model.h5"
    # The layout of Keras 2's HDF5 files: names in attributes, one group per layer.
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = "not even JSON: __import__('os').abort()"
        group = file.create_group("model_weights")
        names = [f"layer_{i}" for i in range(len(weights))]
        group.attrs["layer_names"] = [name.encode() for name in names]
        for name, value in zip(names, weights, strict=True):
            layer = group.create_group(name)
            layer.attrs["weight_names"] = [f"{name}/kernel:0".encode()]
            layer[f"{name}/kernel:0"] = value
    load_reference_weights(model, str(path))
    probabilities = keras.ops.softmax(model(images)).numpy()
    assert np.abs(probabilities - expected).max() < 1e-5


def test_reference_file_that_is_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "best_model.h5"
    path.write_bytes(b"\x89HDF\r\n\x1a\nbut no more")
    with pytest.raises(ContentError, match=r"best_model\.h5: not a weight file"):
        load_reference_weights(build_small(), str(path))


def test_reference_file_that_declares_huge_weights_is_not_read(tmp_path: Path) -> None:
    path = str(tmp_path / "best_model.h5")
    write_h5(path, lambda group: group.create_dataset("kernel:0", (2**20, 2**20, 64), "f4"))
    # 256 TiB of zeros in a file of a few kB.
    with pytest.raises(ContentError, match=r"weight 0 has shape \(1048576, 1048576, 64\)"):
        load_reference_weights(build_small(), path)


def external_link(group: h5py.Group) -> None:
    group["kernel:0"] = h5py.ExternalLink("other.h5", "/secret")


def soft_link(group: h5py.Group) -> None:
    group["kernel:0"] = h5py.SoftLink("/elsewhere")


def external_values(group: h5py.Group) -> None:
    group.create_dataset("kernel:0", (5, 5, 1, 2), "f4", external=[("/etc/passwd", 0, 200)])


def virtual_values(group: h5py.Group) -> None:
    layout = h5py.VirtualLayout((5, 5, 1, 2), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "secret", (5, 5, 1, 2))
    group.create_virtual_dataset("kernel:0", layout)


def text_values(group: h5py.Group) -> None:
    group.create_dataset("kernel:0", (5, 5, 1, 2), "S1000")


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (external_link, "kernel:0 is a link; only plain entries"),
        (soft_link, "kernel:0 is a link; only plain entries"),
        (external_values, "kernel:0 keeps its values in other files"),
        (virtual_values, "kernel:0 keeps its values in other files"),
        (text_values, "kernel:0 holds no floating-point numbers"),
    ],
)
def test_reference_file_leads_to_no_other_file(
    tmp_path: Path, fill: Callable[[h5py.Group], object], message: str
) -> None:
    path = str(tmp_path / "best_model.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["secret"] = np.zeros((5, 5, 1, 2), np.float32)
    write_h5(path, fill)
    with pytest.raises(ContentError, match=message):
        load_reference_weights(build_small(), path)


def write_h5(path: str, fill: Callable[[h5py.Group], object]) -> None:
    """Writes a file of one layer, whose weight `kernel:0` is made by `fill`."""
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [b"conv"]
        group = file.create_group("conv")
        group.attrs["weight_names"] = [b"kernel:0"]
        fill(group)


def test_weights_of_another_shape_name_the_weight() -> None:
    model = build_small()
    weights = [np.zeros(v.shape) for v in creation_order(model)]
    weights[2] = np.zeros((3, 3, 2, 7))
    with pytest.raises(ContentError, match=r"weight 2 has shape \(3, 3, 2, 7\)"):
        set_weights(model, weights, source="other")


def test_inbreast_network_has_its_published_size(zero_weights: None) -> None:
    model = build_model(ModelConfig(), image_shape=(512, 512, 3), num_classes=2)
    assert model.count_params() == 124_996_866


def test_kernels_shrink_to_three_and_dilations_to_one() -> None:
    config = ModelConfig(num_layers=4, base_filters=2, base_kernels=(7, 7), dilation=(2, 2))
    model = build_model(config, image_shape=(16, 24, 1), num_classes=3)
    convolutions = [layer for layer in model.layers if type(layer) is keras.layers.Conv2D]
    # Encoder levels 0..3, two convolutions each, decoder levels 2..0, then the 1x1 head.
    sides = [7, 7, 5, 5, 3, 3, 3, 3, 3, 3, 5, 5, 7, 7, 1]
    dilations = [2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 1]
    assert [layer.kernel_size[0] for layer in convolutions] == sides
    assert [layer.dilation_rate[0] for layer in convolutions] == dilations
    assert model.output_shape == (None, 16, 24, 3)


def test_group_normalisation_looks_at_one_image_and_8_groups() -> None:
    size = {"num_layers": 2, "base_filters": 12, "base_kernels": (3, 3)}
    config = ModelConfig(**size, dropout_rate=0, normalization="group")
    model = build_model(config, image_shape=(8, 8, 1), num_classes=2)
    layers = [each for each in model.layers if isinstance(each, keras.layers.GroupNormalization)]
    # 12 channels divide by 4, 24 by 8. Two convolutions at each of three places.
    assert [layer.groups for layer in layers] == [4, 4, 8, 8, 4, 4]
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1)).astype(np.float32)
    alone = model(images[:1], training=True)
    assert np.allclose(model(images, training=True)[:1], alone, atol=1e-5)


def test_same_seed_gives_same_weights() -> None:
    first, second, other = (
        build_model(SMALL, image_shape=(8, 8, 1), num_classes=2, seed=seed) for seed in (1, 1, 2)
    )
    for a, b in zip(first.weights, second.weights, strict=True):
        assert np.array_equal(a.numpy(), b.numpy())
    assert not np.array_equal(first.weights[0].numpy(), other.weights[0].numpy())


@pytest.mark.parametrize("channels", [1, 64])
def test_the_residual_unet_has_a_head_for_each_supervised_level(channels: int) -> None:
    config = ModelConfig(
        name="residual-unet", num_layers=4, base_filters=4, max_filters=8, residual_blocks=(1, 2),
        normalization="instance", activation="mish", deep_supervision=2,
    )  # fmt: skip
    model = build_model(config, image_shape=(16, 32, channels), num_classes=3, seed=1)
    assert [each.shape[1:] for each in model.outputs] == [(16, 32, 3), (8, 16, 3), (4, 8, 3)]
    main = main_model(model)
    assert main.output.shape[1:] == (16, 32, 3)
    plain = build_model(
        config.model_copy(update={"deep_supervision": 0}),
        image_shape=(16, 32, channels), num_classes=3, seed=1,
    )  # fmt: skip
    images = np.random.default_rng(0).integers(0, 256, (1, 16, 32, channels)).astype(np.float32)
    # The other heads change no weight of the main one.
    assert np.array_equal(main(images), plain(images))
    assert max(each.shape[-1] for each in plain.weights) == 8
    # Blocks by level: 1, 2, 2, 2, each with an addition.
    assert sum(isinstance(each, keras.layers.Add) for each in plain.layers) == 7


def test_sides_must_divide_by_the_levels() -> None:
    with pytest.raises(UsageError, match="divisible by 4, got 8x10"):
        build_model(SMALL, image_shape=(8, 10, 1), num_classes=2)


def test_models_that_the_config_names_are_those_that_can_be_built() -> None:
    assert set(BUILDERS) == set(MODELS)


def test_unknown_model_is_named_with_the_nearest() -> None:
    config = SMALL.model_copy(update={"name": "flexunett"})
    with pytest.raises(UsageError, match="did you mean 'flexunet'"):
        build_model(config, image_shape=(8, 8, 1), num_classes=2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base_kernels": (4, 4)}, "must be odd"),
        ({"dilation": (0, 1)}, "1 or more"),
        ({"dropout_rate": 0.3, "num_layers": 5}, "below 1"),
        ({"num_layer": 3}, "did you mean 'num_layers'"),
        ({"num_layers": 4, "deep_supervision": 3}, "has 2 coarser levels; give 2 or less"),
        ({"residual_blocks": ()}, "give one or more numbers"),
        ({"name": "residual-unet", "base_kernels": (5, 5)}, "have no effect on name=residual-unet"),
    ],
)
def test_model_options_are_checked(values: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_settings(ModelConfig, values, "test")


def test_mixed_precision_keeps_logits_in_float32() -> None:
    model = build_model(SMALL, image_shape=(8, 8, 1), num_classes=2, precision="mixed_bfloat16")
    logits = model(np.zeros((1, 8, 8, 1), np.float32))
    assert logits.dtype == "float32"
    assert model.layers[2].compute_dtype == "bfloat16"


def test_pixels_of_16_bits_are_scaled_before_float16_sees_them() -> None:
    pixels = np.random.default_rng(0).integers(0, 2**16, (1, 8, 8, 1)).astype(np.float32)
    pixels[0, 0, 0] = 65535.0  # float16 ends at 65504
    options = {"image_shape": (8, 8, 1), "num_classes": 2, "value_max": 65535.0, "seed": 1}
    exact, half = (
        build_model(SMALL, precision=precision, **options)(pixels)
        for precision in ("float32", "mixed_float16")
    )
    assert half.dtype == "float32"
    assert np.allclose(exact, half, rtol=0, atol=0.01)


def build_small() -> keras.Model:
    return build_model(SMALL, image_shape=(8, 8, 1), num_classes=2)
