"""Makes the launcher tests' cluster of two nodes available to the fault tests."""

from tests.launcher.conftest import ray_cluster

__all__ = ["ray_cluster"]
