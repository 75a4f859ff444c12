"""Windows over large pictures: weights, equality with the plain pass, bounded memory, regions."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from data_prep.imaging.tiles import starts
from flexunet.errors import UsageError
from job.config import ModelConfig
from job.inference.network import make_probability_step, network_of, prepared
from job.inference.postprocess import class_ids, without_small
from job.inference.sliding_window import Windows, probabilities_of, slide, window_weights
from job.models.compatibility import window_overlap
from job.models.registry import build_model
from job.runs.loading import load_model, open_trained

WINDOW: dict[str, Any] = {"height": 16, "width": 12, "batch_size": 3}


def constant(windows: np.ndarray) -> np.ndarray:
    """A network that finds class 1 with probability 0.3 everywhere."""
    return np.broadcast_to(np.float32([0.7, 0.3]), (*windows.shape[:3], 2))


def brightness(windows: np.ndarray) -> np.ndarray:
    """A network that looks at single pixels: what it says of one is the same in every window."""
    bright = windows.astype(np.float32) / 255
    return np.concatenate([1 - bright, bright], axis=-1)


@pytest.mark.parametrize("length", [16, 17, 31, 32, 100])
@pytest.mark.parametrize("overlap", [0, 5, 15])
def test_weights_add_to_one_at_every_pixel(length: int, overlap: int) -> None:
    begins = starts(length, 16, overlap)
    total = np.zeros(length)
    for begin, weights in zip(begins, window_weights(length, 16, begins), strict=True):
        assert np.all(weights > 0)
        total[begin : begin + 16] += weights
    assert total == pytest.approx(np.ones(length), abs=1e-12)


def test_weights_are_those_of_a_gaussian() -> None:
    # Windows of 16 at 0 and 8: sigma is 2. Row 12 is 4.5 from the middle of the first (7.5) and
    # 3.5 from that of the second (15.5): exp(-4.5**2 / 8) against exp(-3.5**2 / 8).
    first = window_weights(24, 16, [0, 8])[0][12]
    bells = np.exp(-(np.array([4.5, 3.5]) ** 2) / 8)
    assert first == pytest.approx(bells[0] / bells.sum())


@pytest.mark.parametrize("size", [(16, 12), (50, 12), (16, 40), (53, 47), (9, 7), (9, 40)])
@pytest.mark.parametrize("overlap", [0, 4, 11])
def test_slide_keeps_what_windows_agree_on(size: tuple[int, int], overlap: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 1), dtype=np.uint8)
    for network in (constant, brightness):
        bands = list(slide(image, network, Windows(overlap=overlap, **WINDOW)))
        found = np.concatenate(bands)
        assert found.dtype == np.float32
        assert found.shape == (*size, 2)
        assert found == pytest.approx(network(image[np.newaxis])[0], abs=1e-6)
        assert max(len(band) for band in bands) <= 16


def test_slide_fills_every_batch() -> None:
    sizes = []

    def network(windows: np.ndarray) -> np.ndarray:
        sizes.append(windows.shape)
        return constant(windows)

    # 3 rows of 4 windows each, in batches of 3.
    list(slide(np.zeros((48, 48, 1), np.uint8), network, Windows(overlap=0, **WINDOW)))
    assert sizes == [(3, 16, 12, 1)] * 6


def test_slide_trusts_the_middle_of_a_window() -> None:
    def lost_at_borders(windows: np.ndarray) -> np.ndarray:
        found = np.zeros((*windows.shape[:3], 1), np.float32)
        found[:, 4:-4, 4:-4] = 1
        return found

    image = np.zeros((32, 32, 1), np.uint8)
    found = np.concatenate(
        list(slide(image, lost_at_borders, Windows(16, 16, overlap=12, batch_size=4)))
    )[..., 0]
    # Equal weights would give a quarter where half of the windows along both axes know nothing.
    assert found[4:-4, 4:-4].min() > 0.8
    assert not found[:4].any()  # no window has the picture's own border in its middle


def test_one_window_is_the_plain_forward_pass(trained_run: Path) -> None:
    run = open_trained(str(trained_run))
    step = make_probability_step(network_of([load_model(run, which="best")[0]]))
    image = np.random.default_rng(1).integers(0, 256, (32, 32, 1), dtype=np.uint8)
    plain = step(image[np.newaxis]).numpy()[0]
    windows = Windows(run.manifest.image_height, run.manifest.image_width, overlap=8, batch_size=1)
    assert np.array_equal(probabilities_of(image, step, windows), plain)
    bands = slide(image, step, Windows(32, 32, overlap=8, batch_size=1))
    assert np.array_equal(np.concatenate(list(bands)), plain)


def test_memory_does_not_grow_with_the_height_of_the_picture() -> None:
    peaks = []
    for height in (256, 4096):
        image = np.zeros((height, 64, 1), np.uint8)
        tracemalloc.start()
        for band in slide(image, constant, Windows(64, 64, overlap=32, batch_size=2)):
            class_ids(band)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # All probabilities of the higher one would be 2 MiB; a band is 32 KiB.
    assert peaks[1] < 2 * peaks[0]
    assert peaks[1] < 500_000


def test_window_overlap_is_the_first_that_is_set(trained_run: Path) -> None:
    manifest = open_trained(str(trained_run)).manifest
    assert window_overlap(manifest, None, None) == 16
    assert window_overlap(manifest, None, 4) == 4
    assert window_overlap(manifest, 0, 4) == 0
    with pytest.raises(UsageError, match="overlap by 32; give --overlap below 32"):
        window_overlap(manifest, 32)


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


def test_without_small_removes_regions_of_each_class_by_its_size() -> None:
    ids = np.zeros((6, 8), np.uint8)
    ids[0, :3] = 1  # 3 pixels
    ids[2:4, :2] = 1  # 4 pixels
    ids[0, 5:7] = 2  # 2 pixels
    kept = without_small(ids, (4, 2))
    assert np.array_equal(kept, np.where(np.arange(6)[:, None] == 0, np.where(ids == 2, 2, 0), ids))
    # A mask of four pixels for each of the network's: 4 * 1 and 2 * 4 are needed.
    assert np.array_equal(without_small(ids, (1, 2), 4.0) == 2, np.zeros((6, 8), bool))
    assert np.array_equal(
        without_small(ids, (1, 2), 4.0) == 1, (ids == 1) & (np.arange(6) > 0)[:, None]
    )
    assert np.array_equal(without_small(ids, ()), ids)
