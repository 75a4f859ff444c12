"""The order of samples, the cut into steps, and the keys of dropout."""

import numpy as np
import pytest

from job.data.sampling import (
    PADDING,
    dropout_keys,
    epoch_order,
    global_batches,
    sample_order,
    share_at,
)


def test_sample_order_is_a_permutation_by_seed_and_epoch() -> None:
    orders = {
        (seed, epoch): tuple(sample_order(50, seed=seed, epoch=epoch, version=2))
        for seed in (0, 1) for epoch in (0, 1)
    }  # fmt: skip
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len(set(orders.values())) == 4
    assert orders[0, 1] == tuple(sample_order(50, seed=0, epoch=1, version=2))


def test_sample_order_is_the_same_on_every_machine() -> None:
    # A restart elsewhere must continue this very order.
    assert sample_order(8, seed=3, epoch=2, version=2).tolist() == [3, 6, 5, 2, 1, 0, 4, 7]


def test_epoch_order_draws_foreground_as_often_as_asked() -> None:
    has_foreground = np.arange(20) % 10 == 3  # two of 20
    order = epoch_order(has_foreground, 0.5, seed=1, epoch=0, version=2)
    counts = np.bincount(order, minlength=20)
    assert len(order) == 20
    # Ten places for two samples: five each. The other ten are all different.
    assert counts[has_foreground].tolist() == [5, 5]
    assert sorted(counts[~has_foreground]) == [0] * 8 + [1] * 10
    assert order.tolist() == epoch_order(has_foreground, 0.5, seed=1, epoch=0, version=2).tolist()
    others = [
        epoch_order(has_foreground, 0.5, seed=1, epoch=epoch, version=2) for epoch in range(1, 9)
    ]
    assert {tuple(each) for each in others} != {tuple(order)}
    assert set(np.concatenate([order, *others])) == set(range(20))  # each has its turn


def test_epoch_order_is_every_sample_once_where_there_is_foreground_enough() -> None:
    plain = sample_order(20, seed=1, epoch=2, version=2).tolist()
    half = np.arange(20) < 10
    for has_foreground, share in ((half, 0.5), (half, None), (np.zeros(20, bool), 0.5)):
        assert epoch_order(has_foreground, share, seed=1, epoch=2, version=2).tolist() == plain


def test_the_foreground_share_falls_in_a_line() -> None:
    shares = [share_at(0.6, 0.1, epoch / 4) for epoch in range(6)]
    assert shares == pytest.approx([0.6, 0.475, 0.35, 0.225, 0.1, 0.1])
    assert (share_at(0.6, None, 0.5), share_at(None, None, 0.5)) == (0.6, None)
    has_foreground = np.arange(20) < 2
    orders = [
        epoch_order(has_foreground, share_at(0.5, 0.0, at), seed=1, epoch=0, version=2)
        for at in (0, 0.5, 1)
    ]
    assert [int(has_foreground[order].sum()) for order in orders] == [10, 5, 2]


def test_global_batches_pads_the_tail() -> None:
    batches = global_batches(np.array([4, 2, 0, 1, 3]), 2)
    assert batches.tolist() == [[4, 2], [0, 1], [3, PADDING]]
    assert global_batches(np.arange(4), 2).tolist() == [[0, 1], [2, 3]]


def test_dropout_keys_are_unique_and_stable() -> None:
    keys = {
        int(key)
        for seed in (0, 1, 2**40) for epoch in range(20)
        for key in dropout_keys(np.arange(500), seed=seed, epoch=epoch)
    }  # fmt: skip
    assert len(keys) == 3 * 20 * 500
    # A checkpoint continues with the masks of the run before it, so these numbers stay.
    keys_now = dropout_keys(np.array([0, 7]), seed=1, epoch=2)
    assert keys_now.tolist() == [1685891443961195628, -7692980538755587081]
