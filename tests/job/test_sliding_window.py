"""Windows over large pictures: weights, equality with the plain pass, bounded memory."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.imaging.tiles import starts
from job.inference.sliding_window import Windows, probabilities_of, slide, window_weights
from job.models.ensemble import make_probability_step, network_of
from job.postprocessing.masks import class_ids
from job.runs.loading import load_model, open_run

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
    run = open_run(str(trained_run))
    step = make_probability_step(network_of([load_model(run, which="best")[0]]))
    image = np.random.default_rng(1).integers(0, 256, (32, 32, 1), dtype=np.uint8)
    plain = step(image[np.newaxis]).numpy()[0]
    windows = Windows(run.manifest.image_height, run.manifest.image_width, overlap=8, batch_size=1)
    assert np.array_equal(probabilities_of(image, step, windows), plain)
    bands = slide(image, step, Windows(32, 32, overlap=8, batch_size=1))
    assert np.array_equal(np.concatenate(list(bands)), plain)


def test_memory_does_not_grow_with_the_height_of_the_image() -> None:
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
