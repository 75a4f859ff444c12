"""TensorFlow as these tests use it: quiet, and with two logical CPUs.

The devices must be set before TensorFlow's first op. A test module that needs them imports
TensorFlow at its top and makes no tensor while it is imported; modules that need no TensorFlow
do not wait for it.
"""

import os
import sys
from typing import Any

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Gives TensorFlow two logical CPUs when one of the collected modules imported it."""
    tf = sys.modules.get("tensorflow")
    if tf is not None:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * 2
        )


@pytest.fixture(scope="session")
def two_cpus() -> Any:
    """Returns the one `MirroredStrategy` over both logical CPUs.

    One for the whole process: a second strategy over the same devices numbers its collectives from
    the start again, and TensorFlow then finds other shapes under the same number.
    """
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
