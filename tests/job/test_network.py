"""The network of an ensemble, over mirrored pictures and in several precisions."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from job.config import ModelConfig
from job.models.ensemble import make_probability_step, network_of, prepared
from job.models.registry import build_model
from job.training.trainer_factory import network_words


@pytest.mark.parametrize("num_classes", [1, 3])
def test_network_of_several_is_the_mean_of_their_probabilities(num_classes: int) -> None:
    import keras

    random = np.random.default_rng(2)
    images = random.integers(0, 256, (2, 8, 8, 1), dtype=np.uint8)
    models = []
    for _ in range(2):
        model = keras.Sequential(
            [keras.Input((8, 8, 1)), keras.layers.Conv2D(num_classes, 3, padding="same")]
        )
        weights = [random.normal(size=each.shape) / 100 for each in model.get_weights()]
        model.set_weights(weights)
        models.append(model)

    def probabilities(model: Any, pixels: np.ndarray) -> np.ndarray:
        logits = model(prepared(model, tf.constant(pixels)))
        found = tf.sigmoid(logits) if num_classes == 1 else tf.nn.softmax(logits)
        return np.asarray(found)

    parts = []
    for model in models:
        for axes in ((), (2,), (1,), (1, 2)):
            mirrored = np.flip(images, axes) if axes else images
            found = probabilities(model, mirrored)
            parts.append(np.flip(found, axes) if axes else found)
    step = make_probability_step(network_of(models, "both"))
    assert step(images).numpy() == pytest.approx(np.mean(parts, axis=0), abs=1e-5)
    both = make_probability_step(network_of(models))
    assert both(images).numpy() == pytest.approx(np.mean(parts[::4], axis=0), abs=1e-5)
    horizontal = make_probability_step(network_of(models[:1], "horizontal"))
    assert horizontal(images).numpy() == pytest.approx(np.mean(parts[:2], axis=0), abs=1e-5)


def test_network_of_several_precisions_is_their_mean() -> None:
    config = ModelConfig(num_layers=2, base_filters=4, base_kernels=(3, 3))
    images = np.random.default_rng(3).integers(0, 256, (2, 16, 16, 1), dtype=np.uint8)
    models = [
        build_model(
            config, image_shape=(16, 16, 1), num_classes=2, value_max=255.0, seed=i, precision=each
        )
        for i, each in enumerate(("float64", "mixed_bfloat16", "float32"))
    ]
    alone = [make_probability_step(network_of([model]))(images).numpy() for model in models]
    assert not np.allclose(alone[0], alone[2], atol=1e-3)
    together = make_probability_step(network_of(models))(images).numpy()
    assert together.dtype == np.float32
    assert together == pytest.approx(np.mean(alone, axis=0), abs=1e-3)


def test_network_of_several_survives_logits_without_doubt() -> None:
    import keras

    model = keras.Sequential([keras.Input((2, 2, 1)), keras.layers.Conv2D(2, 1)])
    model.set_weights([np.array([[[[500.0, -500.0]]]]), np.zeros(2)])
    images = np.full((1, 2, 2, 1), 255, np.uint8)
    found = make_probability_step(network_of([model, model]))(images).numpy()
    assert found[..., 0] == pytest.approx(1.0)


def test_a_large_network_without_a_gpu_names_a_smaller_one() -> None:
    large, small = ModelConfig(), ModelConfig(num_layers=1)
    words = "network: 8 levels, 125.0 million parameters"
    assert network_words(large, 125_000_000, has_gpu=True) == words
    found = network_words(large, 125_000_000, has_gpu=False)
    assert found.startswith(f"{words}; slow without a GPU: for a first try --model.num-layers 4 ")
    found = network_words(small, 30_000, has_gpu=False)
    assert found == "network: 1 level, 30000 parameters"
