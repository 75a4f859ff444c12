"""A small manifest for tests."""

from typing import Any


def manifest_values(**changes: Any) -> dict[str, Any]:
    """Returns the values of a manifest of one sample, with `changes`."""
    values = {
        "name": "d",
        "image_height": 4,
        "image_width": 6,
        "channels": 1,
        "bit_depth": 8,
        "value_max": 255,
        "classes": [
            {"id": 0, "name": "background", "color": [0, 0, 0]},
            {"id": 1, "name": "mass", "color": [255, 255, 255]},
        ],
        "geometry": "stretch",
        "split_rule": "file",
        "seed": 1,
        "splits": {"train": {"num_samples": 1, "num_groups": 1}},
        "shards": [
            {
                "name": "train-00000-of-00001.tfrecord",
                "split": "train",
                "num_records": 1,
                "num_bytes": 100,
                "crc32c": 5,
            }
        ],
        "samples_num_bytes": 10,
        "samples_crc32c": 7,
        "mean": [1.5],
        "std": [0.5],
        "tool_version": "0.1.0",
    }
    return values | changes
