"""Checkpoints: of any model, taken at one moment, written later, read by the same model alone."""

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from flexunet.errors import ContentError, StorageError
from job.config import ModelConfig, OptimizerConfig
from job.models.registry import build_model
from job.optimization.optimizer import Adam
from job.runs import serialization

_STATE = {"step": 3}


def _model(**options):
    config = ModelConfig(base_filters=4, num_layers=3, **options)
    return build_model(config, image_shape=(8, 8, 3), num_classes=2)


class _Block(keras.layers.Layer):
    """A layer made of layers, which each have a weight of the block's own name."""

    def __init__(self, **options):
        super().__init__(**options)
        self.first = keras.layers.Conv2D(3, 3, padding="same", name="gain")
        self.second = keras.Sequential(
            [keras.layers.Conv2D(3, 1), keras.layers.BatchNormalization()], name="inner_2"
        )

    def build(self, shape):
        self.gain = self.add_weight(shape=(1,), name="gain")
        self.count = self.add_weight(shape=(), dtype="int32", trainable=False, name="count")
        self.twice = [self.add_weight(shape=(n + 1,), name="same") for n in range(2)]
        self.first.build(shape)
        self.second.build((*shape[:-1], 3))

    def call(self, x):
        return self.gain * self.second(self.first(x))


def _nested(i):
    return _Block()(_Block()(i))


def _sequential(i):
    inner = keras.Sequential([keras.layers.Conv2D(4, 3), keras.layers.Conv2D(4, 3)], name="b_1")
    return keras.Sequential([inner, keras.layers.BatchNormalization()])(i)


def _shared(i):
    layer = keras.layers.Conv2D(3, 3, padding="same")
    return layer(layer(i))


def _of_models(i):
    inner = keras.Input((8, 8, 3))
    block = keras.Model(inner, keras.layers.Dense(3)(keras.layers.Dense(4)(inner)), name="block")
    return block(block(i))


def _with_state(i):
    return keras.layers.Dropout(0.5)(keras.layers.BatchNormalization()(i))  # its seed counts draws


BODIES = [_nested, _sequential, _shared, _of_models, _with_state]


def _of(body):
    image = keras.Input((8, 8, 3))
    model = keras.Model(image, keras.layers.Conv2D(2, 1)(body(image)))
    for number, variable in enumerate(model.variables):
        variable.assign(tf.cast(tf.fill(variable.shape, number + 1), variable.dtype))
    return model


def _saved(folder, model):
    optimizer = Adam(OptimizerConfig(), model.trainable_variables)
    return serialization.take(str(folder), model, optimizer, _STATE)()


@pytest.mark.parametrize("body", BODIES)
def test_any_model_comes_back_whatever_was_built_before_it(tmp_path, body):
    model = _of(body)
    values = [variable.numpy() for variable in model.variables]
    members = _saved(tmp_path, model)
    names = list(serialization.weights_by_path(model))
    assert len(names) == len(values)
    for _ in range(2):  # Keras' own names are others now
        again = _of(body)
    assert list(serialization.weights_by_path(again)) == names
    for variable in again.variables:
        variable.assign(tf.zeros(variable.shape, variable.dtype))
    serialization.read_weights(again, members[serialization.WEIGHTS_NAME])
    for variable, value in zip(again.variables, values, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


class _Named(keras.layers.Layer):
    """A layer whose weights have the names that it is given."""

    def __init__(self, names):
        super().__init__()
        self.names = names

    def build(self, shape):
        self.all = [self.add_weight(shape=(), name=name) for name in self.names]

    def call(self, x):
        return x * sum(self.all)


names = st.lists(
    st.sampled_from(["w", "w_1", "w_1_1", "w_2", "conv2d", "conv2d_1"]), min_size=1, max_size=6
)


@settings(max_examples=50, deadline=None)
@given(names=names)
def test_no_variable_is_lost_whatever_its_name(names):
    image = keras.Input((8, 8, 3))
    found = serialization.weights_by_path(keras.Model(image, _Named(names)(image)))
    assert len({id(variable) for variable in found.values()}) == len(names)


def test_names_that_somebody_gave_stay():
    """Else two layers that change places in the code would take each other's weights."""
    image = keras.Input((8, 8, 3))

    def model(order):
        layers = {n: keras.layers.Conv2D(3, 1, use_bias=False, name=n) for n in order}
        x = image
        for layer in layers.values():
            x = layer(x)
        return keras.Model(image, x)

    for order in (["enc_1", "enc_2"], ["enc_2", "enc_1"]):
        found = serialization.weights_by_path(model(order))
        assert list(found) == [f"{name}/kernel" for name in order]


# Checkpoints in the world have these names: they may never change.
@pytest.mark.parametrize(
    ("normalization", "of_a_layer"),
    [
        ("none", []),
        ("group", ["group_normalization/beta", "group_normalization/gamma"]),
        (
            "batch",
            ["batch_normalization/beta", "batch_normalization/gamma",
             "batch_normalization/moving_mean", "batch_normalization/moving_variance"],
        ),
    ],
)  # fmt: skip
def test_names_of_the_weights_of_flexunet_stay(normalization, of_a_layer):
    found = serialization.weights_by_path(_model(normalization=normalization))
    convolutions = {
        f"conv2d{number}/{kind}"
        for number in ("", *(f"_{n}" for n in range(1, 10)))
        for kind in ("bias", "kernel")
    }
    transposed = {
        f"conv2d_transpose{number}/{kind}" for number in ("", "_1") for kind in ("bias", "kernel")
    }
    norms = {
        name.replace("/", f"{number}/")
        for number in ("", *(f"_{n}" for n in range(1, 10)))
        for name in of_a_layer
    }
    assert set(found) == convolutions | transposed | norms | {"head/bias", "head/kernel"}


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("other", BODIES)
def test_weights_of_another_model_are_refused_and_nothing_is_set(tmp_path, body, other):
    if body is other:
        return
    members = _saved(tmp_path, _of(body))
    model = _of(other)
    before = [variable.numpy() for variable in model.variables]
    with pytest.raises(ContentError, match="does not fit this model: it has"):
        serialization.read_weights(model, members[serialization.WEIGHTS_NAME])
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


def test_weights_of_another_shape_are_named(tmp_path):
    members = _saved(tmp_path, _model())
    with pytest.raises(ContentError, match=r"conv2d/kernel has shape .*; give the model options"):
        serialization.read_weights(_model(base_kernels=(5, 5)), members[serialization.WEIGHTS_NAME])


@pytest.mark.parametrize("damage", ["one is missing", "one is more", "one has another shape"])
def test_a_file_that_does_not_hold_the_model_is_never_handed_over(tmp_path, damage, monkeypatch):
    class Broken(h5py.File):
        def __setitem__(self, name, values):
            is_first = name == "conv2d/kernel:0"
            if damage == "one is missing" and is_first:
                return
            if damage == "one is more" and is_first:
                super().__setitem__("more:0", values)
            if damage == "one has another shape" and is_first:
                values = values[..., :1]
            super().__setitem__(name, values)

    monkeypatch.setattr(h5py, "File", Broken)
    with pytest.raises(StorageError, match="does not have the weights that were written"):
        _saved(tmp_path, _model())


@pytest.mark.parametrize("normalization", ["none", "batch", "group"])
def test_weight_files_of_keras_and_of_version_0_1_0_are_read(tmp_path, normalization):
    """Version 0.1.0 wrote what Keras writes."""
    model = _model(normalization=normalization)
    model.save_weights(tmp_path / "keras.weights.h5")
    values = model.get_weights()
    again = _model(normalization=normalization)
    again.set_weights([value + 1 for value in values])
    serialization.read_weights(again, str(tmp_path / "keras.weights.h5"))
    for restored, value in zip(again.get_weights(), values, strict=True):
        np.testing.assert_array_equal(restored, value)


def test_a_link_in_a_weight_file_is_not_followed(tmp_path):
    members = _saved(tmp_path, _model())
    path = members[serialization.WEIGHTS_NAME]
    with h5py.File(path, "r+") as file:
        values = file["conv2d/kernel:0"][()]
        with h5py.File(tmp_path / "other.h5", "w") as other:
            other["values"] = values
        del file["conv2d/kernel:0"]
        file["conv2d/kernel:0"] = h5py.ExternalLink("other.h5", "values")
    with pytest.raises(ContentError, match="does not fit"):
        serialization.read_weights(_model(), path)


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
    finish = serialization.take(str(tmp_path), model, optimizer, _STATE)
    for step in (1, 2, 3):
        update(tf.constant(step, tf.int64))
    members = finish()
    assert not np.array_equal(model.get_weights()[0], weights[0])
    serialization.read_weights(model, members[serialization.WEIGHTS_NAME])
    serialization.read_optimizer(optimizer, members[serialization.OPTIMIZER_NAME])
    for restored, taken in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(restored, taken)
    for name, moment in optimizer.named_variables().items():
        np.testing.assert_array_equal(moment.numpy(), moments[name])
    assert serialization.read_state(members[serialization.STATE_NAME]) == _STATE


def test_memory_is_used_again_and_never_while_it_is_needed(tmp_path):
    model = _model()
    optimizer = Adam(OptimizerConfig(), model.trainable_variables)
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    memory: serialization.Memory = []
    first = serialization.take(str(folders[0]), model, optimizer, _STATE, memory)
    before = model.get_weights()
    model.set_weights([weight + 1 for weight in before])
    second = serialization.take(str(folders[1]), model, optimizer, _STATE, memory)
    members = first()
    (used,) = memory
    third = serialization.take(str(folders[2]), model, optimizer, _STATE, memory)
    assert memory == []
    second(), third()
    assert any(arrays is used for arrays in memory) and len(memory) == 2
    serialization.read_weights(model, members[serialization.WEIGHTS_NAME])
    for restored, taken in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(restored, taken)
