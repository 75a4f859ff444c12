"""Checkpoints: taken at one moment, written later, in the form of Keras' own weight files."""

import h5py
import numpy as np
import pytest
import tensorflow as tf

from job import checkpoint
from job.config import ModelConfig, OptimizerConfig
from job.model import BUILDERS, build_model
from job.optimizer import Adam

_STATE = {"step": 3}


def _model(name="flexunet", **options):
    config = ModelConfig(name=name, base_filters=4, num_layers=3, **options)
    return build_model(config, image_shape=(8, 8, 3), num_classes=2)


def _entries(path):
    """Every dataset and attribute of an HDF5 file."""
    found = {}

    def visit(name, entry):
        found.update({f"{name}@{key}": value for key, value in entry.attrs.items()})
        if isinstance(entry, h5py.Dataset):
            found[name] = entry[()].tobytes()

    with h5py.File(path) as file:
        file.visititems(visit)
    return found


@pytest.mark.parametrize("name", sorted(BUILDERS))
@pytest.mark.parametrize("normalization", ["none", "batch"])
def test_weights_are_what_keras_itself_would_write(tmp_path, name, normalization):
    model = _model(name, normalization=normalization, dropout_rate=0.1)
    optimizer = Adam(OptimizerConfig(), model.trainable_variables)
    members = checkpoint.take(str(tmp_path), model, optimizer, _STATE)()
    model.save_weights(tmp_path / "keras.weights.h5")
    expected = _entries(tmp_path / "keras.weights.h5")
    assert {key for key in expected if "/vars/" in key}
    ours = _entries(members[checkpoint.WEIGHTS_NAME])
    # Keras also writes the name of the model itself, which no reader asks for.
    assert ours == {key: value for key, value in expected.items() if key.startswith("layers/")}


def test_a_checkpoint_holds_what_was_at_the_moment_it_was_taken(tmp_path):
    model = _model()
    optimizer = Adam(OptimizerConfig(), model.trainable_variables)
    gradients = [tf.ones_like(weight.value) for weight in model.trainable_variables]

    @tf.function
    def update(step):
        optimizer.apply(gradients, step=step, learning_rate=tf.constant(0.1, tf.float64))

    update(tf.constant(0, tf.int64))
    weights = [weight.copy() for weight in model.get_weights()]
    moments = {name: moment.numpy().copy() for name, moment in optimizer.named_variables().items()}
    finish = checkpoint.take(str(tmp_path), model, optimizer, _STATE)
    for step in (1, 2, 3):
        update(tf.constant(step, tf.int64))
    members = finish()
    assert not np.array_equal(model.get_weights()[0], weights[0])
    checkpoint.read_weights(model, members[checkpoint.WEIGHTS_NAME])
    checkpoint.read_optimizer(optimizer, members[checkpoint.OPTIMIZER_NAME])
    for restored, taken in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(restored, taken)
    for name, moment in optimizer.named_variables().items():
        np.testing.assert_array_equal(moment.numpy(), moments[name])
    assert checkpoint.read_state(members[checkpoint.STATE_NAME]) == _STATE


def test_memory_is_used_again_and_never_while_it_is_needed(tmp_path):
    model = _model()
    optimizer = Adam(OptimizerConfig(), model.trainable_variables)
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    memory: checkpoint.Memory = []
    first = checkpoint.take(str(folders[0]), model, optimizer, _STATE, memory)
    before = model.get_weights()
    model.set_weights([weight + 1 for weight in before])
    second = checkpoint.take(str(folders[1]), model, optimizer, _STATE, memory)
    members = first()
    (used,) = memory
    third = checkpoint.take(str(folders[2]), model, optimizer, _STATE, memory)
    assert memory == []
    second(), third()
    assert any(arrays is used for arrays in memory) and len(memory) == 2
    checkpoint.read_weights(model, members[checkpoint.WEIGHTS_NAME])
    for restored, taken in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(restored, taken)
