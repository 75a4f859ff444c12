"""Divides logits by a temperature, and measures how well temperatures calibrate probabilities.

Logits are recovered from probabilities, so that means over models, flips and windows have a
temperature, too. Source: Guo et al. 2017, On Calibration of Modern Neural Networks,
arXiv:1706.04599, section 4.2.
"""

import numpy as np
import numpy.typing as npt

from job.postprocessing.masks import Ids

Probabilities = npt.NDArray[np.float32]

# A quarter to four, each 9 % above the one before.
TEMPERATURES = tuple(float(2 ** (step / 8)) for step in range(-16, 17))
DEFAULT_TEMPERATURE = TEMPERATURES.index(1.0)

_SMALLEST = np.finfo(np.float32).tiny  # the softmax of float32 has no smaller probability but 0
_MAX_PIXELS = 2**16  # of a case that are drawn for its likelihood


def calibrated(probabilities: Probabilities, temperature: float) -> Probabilities:
    """Returns probabilities (..., K) float32 with their logits divided by `temperature`.

    K = 1 is a sigmoid output.
    """
    if temperature == 1:
        return probabilities
    if probabilities.shape[-1] == 1:
        both = np.concatenate([1 - probabilities, probabilities], axis=-1)
        return calibrated(both, temperature)[..., 1:]
    logits = np.log(np.maximum(probabilities, _SMALLEST))
    logits /= np.float32(temperature)
    logits -= logits.max(axis=-1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(axis=-1, keepdims=True)
    result: Probabilities = logits
    return result


def log_likelihoods(
    truth: Ids, probabilities: Probabilities, ignore_id: int | None
) -> npt.NDArray[np.float64]:
    """Returns the mean log-likelihood of the true classes at each of `TEMPERATURES`.

    Of a large case, 65,536 pixels are drawn with a fixed seed. Zeros if all pixels are ignored.

    Args:
        truth: (H, W) class ids.
        probabilities: (H, W, K); K = 1 is a sigmoid output.
    """
    labels, found = truth.reshape(-1), probabilities.reshape(-1, probabilities.shape[-1])
    pixels = np.arange(labels.size) if ignore_id is None else np.flatnonzero(labels != ignore_id)
    if not len(pixels):
        return np.zeros(len(TEMPERATURES))
    if len(pixels) > _MAX_PIXELS:
        pixels = pixels[np.random.default_rng(0).integers(0, len(pixels), _MAX_PIXELS)]
    found = found[pixels].astype(np.float64)
    if found.shape[-1] == 1:
        found = np.concatenate([1 - found, found], axis=-1)
    logits = np.log(np.maximum(found, _SMALLEST))
    logits -= logits.max(axis=-1, keepdims=True)
    of_truth = logits[np.arange(len(pixels)), labels[pixels]]
    means = [
        np.mean(of_truth / each - np.log(np.exp(logits / each).sum(axis=-1)))
        for each in TEMPERATURES
    ]
    return np.array(means)
