"""Losses and metrics of a large image: sums in float32 are those in float64.

A sum that is one chain of additions would lose three digits here. Those of normalisation are tested
beside it; the largest of a window (pooling) and counts of whole numbers have no rounding.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from job.losses import LOSSES, make_loss
from job.metrics.batch import REFERENCE_METRICS

SIDE = 512
ENDINGS = ("loss", "entropy", "multiclass", "focal", "loss_foreground")
LONG_NAMES = [name for name in LOSSES if name.endswith(ENDINGS)]


@pytest.fixture(scope="module")
def image() -> tuple[np.ndarray, np.ndarray]:
    """Returns labels (1, 512, 512) with a disc, and float32 logits that are often right."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    labels = ((x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.05).astype(np.int32)[np.newaxis]
    noise = np.random.default_rng(0).normal(0, 1.5, (1, SIDE, SIDE, 2))
    logits = 2.5 * (labels[..., np.newaxis] == [0, 1]) + noise
    return labels, logits.astype(np.float32)


def in_both(
    function: Callable[[tf.Tensor], Any], logits: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns what `function` gives for logits of 32 and of 64 bits."""
    narrow, wide = (
        np.array(function(tf.constant(logits, dtype)), np.float64)
        for dtype in (tf.float32, tf.float64)
    )
    return narrow, wide


@pytest.mark.parametrize("name", [*LONG_NAMES, "ce_dice"])
def test_a_loss_of_a_large_image_is_exact(image: Any, name: str) -> None:
    labels, logits = image
    loss = make_loss(name, num_classes=2, class_weights=[1.0, 3.0])
    found, exact = in_both(lambda x: loss(labels, x, tf.ones(1), tf.identity), logits)
    assert found == pytest.approx(exact, rel=1e-5)
    assert exact > 0


@pytest.mark.parametrize("name", REFERENCE_METRICS)
def test_a_metric_of_a_large_image_is_exact(image: Any, name: str) -> None:
    labels, logits = image
    metric = REFERENCE_METRICS[name]
    found, exact = in_both(lambda x: metric(labels, x, tf.ones(1)), logits)
    assert found == pytest.approx(exact, rel=1e-5)
    assert np.all(exact > 0)
