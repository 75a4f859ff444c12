"""TensorFlow as these tests use it: quiet, and with two logical CPUs.

The devices must be set before TensorFlow's first op. A test module that needs them imports
TensorFlow at its top and makes no tensor while it is imported; modules that need no TensorFlow
do not wait for it.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from flexunet.storage import open_store
from tests import commands
from tests.job.discs import prepare_discs
from tests.shared import made_once

PROJECT = Path(__file__).resolve().parents[2]

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


@pytest.fixture
def zero_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets networks begin with zeros: 125 million random weights take 3 s."""
    import keras

    for name in ("HeNormal", "GlorotUniform"):
        monkeypatch.setattr(keras.initializers, name, lambda seed: keras.initializers.Zeros())


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a run that the real command trained to find discs; do not write there.

    Beside its parent lie `dataset` (12 train, 4 valid, 4 test of 32x32 pixels) and `source`. A
    process of its own trains, because TensorFlow's devices are set once per process.
    """
    return made_once(tmp_path_factory, "trained", _train_discs) / "runs" / "discs"


def _train_discs(folder: Path) -> None:
    options = {
        "data": prepare_discs(folder),
        "output": str(folder / "runs"),
        "name": "discs",
        "preset": "reference",
        "epochs": "5",
        "seed": "2",  # of others, some find no disc yet
        "global-batch-size": "1",
        "precision": "float32",
        "prediction-images": "0",
        "model.num-layers": "2",
        "model.base-filters": "8",
        "model.base-kernels": "5,5",
        "optimizer.learning-rate": "0.003",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    done = commands.run("job.train", "--local", "--no-tensorboard", *arguments)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def own_run(trained_run: Path, tmp_path: Path) -> Path:
    """Returns a copy of `trained_run` that a test may change."""
    folder = tmp_path / "own-runs" / "discs"
    shutil.copytree(trained_run, folder)
    return folder


@pytest.fixture(scope="session")
def street_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with the runs "clear" and "noisy" of 12 classes; do not write there.

    Nothing was trained: the masks are synthetic, their evaluation is real.
    """
    return made_once(tmp_path_factory, "street-runs", _store_street_runs)


def _store_street_runs(folder: Path) -> None:
    from tests.job.stored_runs import store_run

    store_run(str(folder / "clear"), noise=0.3, has_figures=False)
    store_run(str(folder / "noisy"), noise=0.6, epochs=5)


@pytest.fixture(scope="session")
def discs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Returns a dataset of 16 discs; do not write there."""
    return prepare_discs(tmp_path_factory.mktemp("discs"), num_images=16)


@pytest.fixture
def copy(discs: str, tmp_path: Path) -> Path:
    """Returns a dataset that the test may damage."""
    return Path(shutil.copytree(discs, tmp_path / "copy"))


@pytest.fixture
def remote(discs: str, bucket_url: str) -> str:
    """Returns the dataset in a bucket."""
    source, target = open_store(discs), open_store(bucket_url)
    for stat in source.list():
        target.put(stat.name, source.get(stat.name))
    return bucket_url
