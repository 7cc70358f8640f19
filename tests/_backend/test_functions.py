"""Models whose own code is in `tf.function`s, which were traced before anything was compressed."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from keras_alds import ALDSCompress, CalibrationStats, apply_plan, compress, count_macs, select
from keras_alds.models.inventory import walk

X = np.random.default_rng(0).standard_normal((40, 8)).astype("float32")


def block(K, *, method, **options):
    """A layer that calls two others in a function: its `call`, or an attribute."""

    class Block(K.layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.a = K.layers.Dense(24, activation="relu", name="a")
            self.b = K.layers.Dense(16, name="b")
            self.both = (lambda x: self.run(x)) if method else tf.function(self.run, **options)

        def build(self, shape):
            self.a.build(shape)
            self.b.build((None, 24))
            super().build(shape)

        def run(self, x):
            return self.b(self.a(x))

        def call(self, x):
            return self.both(x)

    if method:
        Block.run = tf.function(Block.run, **options)
    return Block(name="block")


@pytest.fixture(params=["method", "attribute", "compiled by XLA"])
def model(request, keras_module):
    options = {"jit_compile": True} if "XLA" in request.param else {}
    layer = block(keras_module, method=request.param != "attribute", **options)
    inputs = keras_module.Input((8,))
    model = keras_module.Model(inputs, keras_module.layers.Dense(4, name="head")(layer(inputs)))
    model.predict(X, verbose=0)
    return model


def outputs(model):
    """What the layers' weights of now give."""
    a, b, head = (layer for _, layer in walk(model) if hasattr(layer, "kernel"))
    dense = [np.asarray(tf.convert_to_tensor(layer.kernel)) for layer in (a, b, head)]
    bias = [np.asarray(tf.convert_to_tensor(layer.bias)) for layer in (a, b, head)]
    x = np.maximum(X @ dense[0] + bias[0], 0) @ dense[1] + bias[1]
    return x @ dense[2] + bias[2]


class TestFunctions:
    def test_follow_what_their_layers_become(self, model, monkeypatch):
        before = model.predict(X, verbose=0)
        plan = select(model, 0.3)

        def fail(*_):
            raise RuntimeError("late")

        with monkeypatch.context() as patch:
            patch.setattr("keras_alds.models.in_place.carry_optimizers", fail)
            with pytest.raises(RuntimeError, match="late"):
                apply_plan(model, plan)
        np.testing.assert_array_equal(model.predict(X, verbose=0), before)
        apply_plan(model, plan)
        np.testing.assert_allclose(model.predict(X, verbose=0), outputs(model), atol=1e-5)
        assert np.abs(model.predict(X, verbose=0) - before).max() > 0.01

    def test_are_looked_into(self, model):
        assert count_macs(model) == 8 * 24 + 24 * 16 + 16 * 4
        stats = CalibrationStats.collect(model, X, verbose=0)
        assert all(moment.count == len(X) for moment in stats.moments.values())
        small = compress(model, 0.3, target="size", calibration_data=X, sequential=True)
        expected, found = model.predict(X, verbose=0), small.predict(X, verbose=0)
        assert np.linalg.norm(found - expected) < 0.5 * np.linalg.norm(expected)
        assert not tf.config.functions_run_eagerly()


def test_training_follows(keras_module):
    layer = block(keras_module, method=True)
    inputs = keras_module.Input((8,))
    model = keras_module.Model(inputs, keras_module.layers.Dense(4, name="head")(layer(inputs)))
    model.compile(keras_module.optimizers.SGD(0.01), "mse")
    callback = ALDSCompress(0.3, at_epoch=1, verbose=0)
    model.fit(X, np.ones((40, 4)), epochs=3, verbose=0, callbacks=[callback])
    np.testing.assert_allclose(model.predict(X, verbose=0), outputs(model), atol=1e-5)


def test_functions_elsewhere_see_no_observer_later(keras_module):
    run = tf.function(lambda layer, x: layer(x))

    class Net(keras_module.Model):
        def __init__(self):
            super().__init__()
            self.a, self.b = keras_module.layers.Dense(24), keras_module.layers.Dense(16)

        def call(self, x):
            return self.b(run(self.a, x))

    model = Net()
    before = np.asarray(model(X[:8]))
    stats = CalibrationStats.collect(model, X, verbose=0)
    assert [moment.count for moment in stats.moments.values()] == [40, 40]
    np.testing.assert_allclose(model(X[:32])[:8], before, atol=1e-5)  # the size of its batches
