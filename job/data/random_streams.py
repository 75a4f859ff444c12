"""Makes the random streams for the order and the augmentation of samples.

The generators are numpy's Philox with the seed of the run in the key. The last word of the counter
is the purpose, so that no two streams share numbers. In version 1, used by runs of version 0.1.0,
the order of epoch i and the augmentation of sample i in epoch 0 share numbers. Version 3 differs
from version 2 in dropout alone, which `job.models.dropout` draws. Initial weights draw from
generators of Keras.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """Names the purpose of a stream; the values are part of every run."""

    DECISIONS = 0  # kinds and strengths of augmentation of a sample
    DEFORMATION = 1
    DISTORTION = 2
    ORDER = 3  # of an epoch's samples
    FOREGROUND_ORDER = 4  # of an epoch that oversamples samples with foreground
    # Each kind of augmentation from here on has its own stream: whether it applies, and how much.
    SCALE = 5
    CROP = 6
    CONTRAST = 7
    GAMMA = 8
    BLUR = 9
    NOISE = 10


@dataclass(frozen=True)
class SampleKey:
    """Names one sample in one epoch of a run.

    Attributes:
        seed: of the run, 0..2**64 - 1.
        epoch: 0..2**32 - 1.
        index: of the sample in its split, 0..2**32 - 1.
        copy: number of earlier occurrences of the sample in this epoch.
    """

    seed: int
    epoch: int
    index: int
    copy: int = 0


def sample_generator(purpose: Purpose, sample: SampleKey) -> np.random.Generator:
    """Returns the generator of one sample in one epoch."""
    key = np.array([sample.seed, (sample.epoch << 32) | sample.index], np.uint64)
    counter = np.array([0, 0, sample.copy, purpose], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def epoch_generator(
    purpose: Purpose, *, seed: int, epoch: int, version: int
) -> np.random.Generator:
    """Returns the generator of one epoch.

    Args:
        version: of the streams, `TrainConfig.random_streams`.
    """
    if version == 1:
        philox = np.random.Philox(key=[seed, epoch])
        return np.random.Generator(
            philox.jumped() if purpose == Purpose.FOREGROUND_ORDER else philox
        )
    key, counter = np.array([seed, epoch], np.uint64), np.array([0, 0, 0, purpose], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
