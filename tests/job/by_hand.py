"""The formulas of the newer losses and metrics, written out in NumPy, one image after the other."""

import numpy as np

Numbers = np.ndarray
SMALL = 1e-6


def probabilities(logits: Numbers) -> Numbers:
    """Returns the softmax of logits (B, H, W, C) in float64."""
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def cross_entropy(labels: Numbers, logits: Numbers) -> Numbers:
    """Returns -log of the probability of each pixel's class, (B, H, W); 255 counts as class 0."""
    p = probabilities(logits)
    found = np.zeros(labels.shape)
    for place in np.ndindex(labels.shape):
        found[place] = -np.log(p[place][labels[place] % 255])
    return found


def pixel_dice(labels: Numbers, logits: Numbers) -> Numbers:
    """Returns Dice over the classes at each pixel, (B, H, W); 255 counts as class 0."""
    p = probabilities(logits)
    found = np.zeros(labels.shape)
    for place in np.ndindex(labels.shape):
        truth = np.zeros(p.shape[-1])
        truth[labels[place] % 255] = 1
        found[place] = (2 * (truth @ p[place]) + SMALL) / (sum(truth + p[place]) + SMALL)
    return found


def foreground_dice(labels: Numbers, logits: Numbers, weights: Numbers) -> Numbers:
    """Returns Dice of each image and class from 1 on, (B, C - 1), over weighted pixels."""
    p = probabilities(logits)
    found = np.zeros((len(labels), p.shape[-1] - 1))
    for image, c in np.ndindex(found.shape):
        truth = (labels[image] == c + 1).astype(float)
        share = p[image, ..., c + 1]
        both = (weights[image] * truth).sum() + (weights[image] * share).sum()
        found[image, c] = (2 * (weights[image] * truth * share).sum() + SMALL) / (both + SMALL)
    return found


def multiclass_dice(labels: Numbers, logits: Numbers, weights: Numbers) -> Numbers:
    """Returns Dice of each image over all classes at once, (B,), with 1 added to both sides."""
    p = probabilities(logits)
    found = np.zeros(len(labels))
    for image in range(len(labels)):
        truth = np.stack([labels[image] == c for c in range(p.shape[-1])], axis=-1)
        part = weights[image][..., np.newaxis]
        found[image] = (2 * (part * truth * p[image]).sum() + 1) / (
            (part * truth).sum() + (part * p[image]).sum() + 1
        )
    return found
