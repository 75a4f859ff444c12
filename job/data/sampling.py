"""Orders the samples of an epoch and cuts the order into steps, from the seed alone.

The shuffle is exact and global and needs no buffer. A restart can begin at any batch at no cost.
The order does not depend on the number of workers.
"""

import numpy as np

from job.data.random_streams import Purpose, epoch_generator

PADDING = -1  # index of a sample that only fills the last batch


def sample_order(num_samples: int, *, seed: int, epoch: int, version: int) -> np.ndarray:
    """Returns the order of an epoch: a permutation of 0..N-1, (N,) int64.

    Args:
        version: of the random streams.
    """
    random = epoch_generator(Purpose.ORDER, seed=seed, epoch=epoch, version=version)
    return random.permutation(num_samples)


def epoch_order(
    has_foreground: np.ndarray, share: float | None, *, seed: int, epoch: int, version: int
) -> np.ndarray:
    """Returns the sample indices of an epoch in order, (N,) int64, N = number of samples.

    Has every sample once, unless fewer than `share` of them have foreground. Then that share is
    drawn from the samples with foreground, in rounds over all of them; the rest are the first of a
    permutation of the other samples.

    Args:
        version: of the random streams.
    """
    count = len(has_foreground)
    positive, negative = np.flatnonzero(has_foreground), np.flatnonzero(~has_foreground)
    wanted = 0 if share is None else round(share * count)
    if not len(positive) or wanted <= len(positive):
        return sample_order(count, seed=seed, epoch=epoch, version=version)
    random = epoch_generator(Purpose.FOREGROUND_ORDER, seed=seed, epoch=epoch, version=version)
    num_rounds = -(-wanted // len(positive))
    rounds = [random.permutation(positive) for _ in range(num_rounds)]
    chosen = [*np.concatenate(rounds)[:wanted], *random.permutation(negative)[: count - wanted]]
    return random.permutation(np.array(chosen, np.int64))


def share_at(share: float | None, end: float | None, progress: float) -> float | None:
    """Returns the foreground share of an epoch, see `TrainConfig.foreground_share`.

    Args:
        share: at the start of training; None: every sample once.
        end: share that it falls to; None: it stays the same.
        progress: of the training at the start of the epoch, 0 in the first, 1 in the last.
    """
    if share is None or end is None:
        return share
    return share + (end - share) * min(1.0, progress)


def global_batches(order: np.ndarray, batch_size: int) -> np.ndarray:
    """Returns `order` cut into steps, (steps, batch_size) int64, padded with PADDING."""
    num_steps = -(-len(order) // batch_size)
    padded = np.full(num_steps * batch_size, PADDING, np.int64)
    padded[: len(order)] = order
    return padded.reshape(num_steps, batch_size)


def copy_numbers(indices: np.ndarray) -> np.ndarray:
    """Returns the number of earlier occurrences of each index, int64, in the shape of `indices`."""
    flat = indices.ravel()
    places = np.argsort(flat, kind="stable")
    in_order = flat[places]
    numbers = np.empty(len(flat), np.int64)
    numbers[places] = np.arange(len(flat)) - np.searchsorted(in_order, in_order)
    return numbers.reshape(indices.shape)


def dropout_keys(
    indices: np.ndarray, *, seed: int, epoch: int, copies: np.ndarray | None = None
) -> np.ndarray:
    """Returns a key per sample, int64: a hash of (seed, epoch, sample index, number of the copy).

    Args:
        indices: of any shape.
        copies: `copy_numbers` of the epoch in the same shape; None: all 0.

    Source of the mixing function: SplitMix64, Steele et al., OOPSLA 2014.
    """
    with np.errstate(over="ignore"):
        start = np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(epoch)
        state = _mixed(np.asarray(start))
        words = indices.astype(np.uint64)
        if copies is not None:
            words += copies.astype(np.uint64) << np.uint64(32)
        return _mixed(state + words).astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
