"""What the tests of failures share with those of the launcher: the cluster of two nodes."""

from tests.launcher.conftest import ray_cluster

__all__ = ["ray_cluster"]
