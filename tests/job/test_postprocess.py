"""Masks made of probabilities."""

import numpy as np

from job.inference.postprocess import without_small


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
