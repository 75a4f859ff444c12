"""Exported models compute what `infer` computes, for every kind of network and in every format."""

import json
import re
import resource
import signal
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from flexunet.errors import ContentError
from job.config import ModelConfig
from job.export import main
from job.exporting.formats import keras_file, savedmodel
from job.exporting.formats.keras_file import names_of
from job.exporting.formats.registry import FormatFunctions
from job.exporting.parity import CLASS_IDS, INPUT, PROBABILITIES, Expected, compare
from job.exporting.portable import portable, serving_model
from job.models.ensemble import network_of
from job.models.heads import main_model
from job.models.registry import build_model
from job.postprocessing.masks import class_ids

# (options of the network, channels of the images, outputs)
NETWORKS: dict[str, tuple[dict[str, Any], int, int]] = {
    "plain": ({"dilation": (3, 3)}, 1, 2),
    "batch norm, mish": ({"normalization": "batch", "activation": "mish"}, 3, 3),
    "group norm, heads": ({"normalization": "group", "deep_supervision": 1}, 1, 1),
    "residual, instance norm": (
        {"name": "residual-unet", "normalization": "instance", "residual_blocks": (1,)},
        1,
        4,
    ),
    "residual, group norm": (
        {"name": "residual-unet", "normalization": "group", "residual_blocks": (1, 2)},
        3,
        2,
    ),
    "encoder": (
        {
            "name": "encoder-unet",
            "encoder": "mobilenet-v2",
            "encoder_weights": "none",
            "encoder_batch_norm": "frozen",
            "normalization": "group",
            "base_filters": 4,
        },
        3,
        2,
    ),
    "unscaled, three channels of one": ({"image_channels": 3, "input_scaling": "none"}, 1, 2),
}


# Their many layers take as long as all others.
SLOW = ("residual, group norm", "encoder")


def built(options: dict[str, Any], channels: int, num_outputs: int, size: tuple[int, int]) -> Any:
    values: dict[str, Any] = {"base_filters": 8, "dropout_rate": 0.1}
    if options.get("name") != "encoder-unet":
        values["num_layers"] = 3
    if "name" not in options:
        values["base_kernels"] = (5, 5)
    config = ModelConfig.model_validate(values | options)
    shape = (*size, config.image_channels or channels)
    return main_model(build_model(config, image_shape=shape, num_classes=num_outputs))


def randomize(model: Any) -> None:
    """Sets all weights, also statistics, to numbers as after a training."""
    random = np.random.default_rng(5)
    for variable in model.variables:
        value = np.asarray(variable)
        if "variance" in variable.path or "gamma" in variable.path:
            variable.assign(random.uniform(0.5, 1.5, value.shape))
        elif value.ndim < 2:
            variable.assign(random.normal(0, 0.2, value.shape))


@pytest.mark.parametrize(
    "name",
    [pytest.param(each, marks=pytest.mark.cluster if each in SLOW else ()) for each in NETWORKS],
)
def test_networks_become_layers_of_keras_alone(name: str) -> None:
    options, channels, num_outputs = NETWORKS[name]
    side = 32 if name == "encoder" else 16
    model = built(options, channels, num_outputs, (side, side))
    randomize(model)
    served = serving_model([model], channels=channels, bit_depth=8, thresholds=())
    config = keras.saving.serialize_keras_object(served)
    assert {each for each in names_of(config) if not each.startswith("keras.")} == set()
    larger = built(options, channels, num_outputs, (2 * side, side))
    larger.set_weights(model.get_weights())
    images = np.random.default_rng(1).integers(0, 256, (2, 2 * side, side, channels), np.uint8)
    batches = [
        Expected(pixels, np.asarray(probabilities_of(network, pixels)))
        for network, pixels in ((model, images[:, :side]), (larger, images[:1]))
    ]
    assert np.ptp(batches[0].probabilities) > 0.01
    found = compare(lambda pixels: outputs_of(served, pixels), batches, ())
    assert found.has_passed, found


def test_networks_of_16_bits_become_float32() -> None:
    config = ModelConfig(num_layers=2, base_filters=4, base_kernels=(3, 3), normalization="group")
    model = build_model(config, image_shape=(8, 8, 1), num_classes=2, precision="mixed_bfloat16")
    layers = portable(model)._flatten_layers()
    assert {layer.compute_dtype for layer in layers} == {"float32"}


def probabilities_of(model: Any, pixels: np.ndarray) -> Any:
    from job.models.ensemble import probabilities_of_logits

    return probabilities_of_logits(network_of([model])(tf.constant(pixels)))


def outputs_of(served: Any, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    found = served(pixels, training=False)
    return found[PROBABILITIES].numpy(), found[CLASS_IDS].numpy()


@pytest.mark.parametrize("num_outputs", [1, 2, 3])
@pytest.mark.parametrize("is_fitted", [False, True])
def test_class_ids_have_the_thresholds(num_outputs: int, is_fitted: bool) -> None:
    model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(num_outputs, 1)])
    model.set_weights([np.full((1, 1, 1, num_outputs), 0.01), np.linspace(-1, 0, num_outputs)])
    fitted = {1: (0.4,), 2: (0.3,), 3: (0.2, 0.6)}[num_outputs]
    thresholds = fitted if is_fitted else ()
    pixels = np.arange(64, dtype=np.uint16).reshape(1, 8, 8, 1) * 7
    functional = keras.Model(model.inputs[0], model.outputs[0])
    served = serving_model([functional], channels=1, bit_depth=16, thresholds=thresholds)
    probabilities, ids = outputs_of(served, pixels)
    assert ids.dtype == np.uint8
    assert np.array_equal(ids, class_ids(probabilities, thresholds))
    assert len(np.unique(ids)) > 1 or num_outputs > 1


def test_a_run_is_exported_as_a_savedmodel(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "export"
    assert main([str(trained_run), str(out)]) == 0
    assert f"savedmodel: {out}/savedmodel\n" in capsys.readouterr().out
    metadata = json.loads((out / "metadata.json").read_text())
    check = metadata["check"]["formats"]["savedmodel"]
    assert check["max_probability_difference"] <= 1e-5
    assert check["num_other_ids"] == 0
    assert check["num_pixels"] == 5 * 32 * 32 + 34 * 36
    assert set(metadata["files"]) == {
        "savedmodel/saved_model.pb",
        "savedmodel/fingerprint.pb",
        "savedmodel/variables/variables.data-00000-of-00001",
        "savedmodel/variables/variables.index",
    }
    assert "| savedmodel |" in (out / "MODEL_CARD.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_graph_that_reads_files_is_refused(tmp_path: Path) -> None:
    class Reader(keras.layers.Layer):
        def call(self, image: tf.Tensor) -> tf.Tensor:
            text = tf.io.read_file("/etc/hostname")
            return tf.cast(image, tf.float32) + tf.cast(tf.strings.length(text), tf.float32)

    image = keras.Input((None, None, 1), dtype="uint8", name=INPUT)
    model = keras.Model(image, {PROBABILITIES: Reader()(image), CLASS_IDS: image})
    with pytest.raises(ContentError, match=r"not on the list .*: ReadFile, StringLength"):
        savedmodel.write_savedmodel(model, str(tmp_path / "savedmodel"))
    with pytest.raises(ContentError, match=r"not of Keras: .*test_export\.Reader"):
        keras_file.write_keras_file(model, str(tmp_path / "model.keras"))


def test_an_export_that_computes_something_else_is_not_published(
    trained_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def damage(model: Any, path: str) -> None:
        for layer in model.layers:
            layer.set_weights([each * 1.001 for each in layer.get_weights()])
        keras_file.write_keras_file(model, path)

    damaged = FormatFunctions(damage, keras_file.open_keras_file)
    monkeypatch.setattr("job.exporting.pipeline.functions_of", lambda name: damaged)
    out = tmp_path / "export"
    assert main([str(trained_run), str(out), "--format", "keras"]) == 3
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "does not compute what infer computes: probabilities differ by up to" in error
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        code = main([str(trained_run), str(tmp_path / "export"), "--format", "keras"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert code == 5
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search("cannot write .* of the export: File too large.*; free some space", error)
    assert list(tmp_path.iterdir()) == []


def test_onnx_is_refused_before_the_network_computes_anything(
    trained_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("job.exporting.formats.registry._ONNX_BYTES", 1000)
    monkeypatch.delattr("job.exporting.pipeline._expected")
    assert main([str(trained_run), str(tmp_path / "export"), "--format", "onnx"]) == 2
    assert "give --format savedmodel or keras" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
