"""What is alive beside a model and holds its layers."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from keras_alds import apply_plan, select
from keras_alds._backend import backend_of
from keras_alds._backend.live import Holders, are_read, empty, live, retire, variables_of


def dense(K):
    layer = K.layers.Dense(3)
    layer.build((None, 4))
    return layer


class TestLive:
    def test_finds_objects_of_subclasses(self, keras_module):
        layer = dense(keras_module)
        assert any(item is layer for item in live(keras_module.layers.Layer))
        assert not any(item is layer for item in live(keras_module.Model))

    def test_finds_objects_that_the_program_froze(self):
        # In a process of its own: the objects would never be unfrozen again as they were.
        code = (
            "import gc, keras; from keras_alds._backend.live import live; "
            "layer = keras.layers.Dense(3); gc.freeze(); "
            "found = live(keras.layers.Layer); assert any(item is layer for item in found); "
            "assert gc.get_freeze_count() > 100_000"
        )
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_runs_no_code_of_proxies(self):
        class Proxy:
            @property
            def __class__(self):
                raise AssertionError

        proxy = Proxy()
        assert live(dict)
        del proxy


def test_what_is_read_by_a_function(keras_module):
    K = keras_module
    inputs = K.Input((4,))
    model = K.Model(inputs, K.layers.Dense(2)(K.layers.Dense(3)(inputs)))
    model.set_weights(model.get_weights())
    model(np.zeros((1, 4)))
    assert not are_read(model.variables)
    function = tf.function(model)
    function(np.zeros((1, 4)))
    assert are_read(model.variables)
    assert are_read(model.variables[-1:])
    assert not are_read(K.models.clone_model(model).variables)
    concrete = function.get_concrete_function(tf.TensorSpec((1, 4)))
    del function
    assert are_read(model.variables)
    del concrete


def test_objects_whose_constructor_failed_are_left_out(keras_module):
    K, errors = keras_module, []

    class Broken(K.layers.Layer):
        def __init__(self):
            errors.append(self)

    class BrokenModel(K.Model):
        def __init__(self):
            errors.append(self)

    for cls in (Broken, BrokenModel):
        with contextlib.suppress(Exception):
            cls()
    kinds = [K.optimizers, *([K.optimizers.legacy] if K.__name__ == "tf_keras" else [])]
    for kind in kinds:
        with pytest.raises((TypeError, ValueError)) as error:
            kind.Adam(typo=1)
        errors.append(error)
    model = K.Sequential([K.Input((32,)), K.layers.Dense(24)])
    holders = Holders.of(backend_of(model), model)
    assert next(iter(holders.layers)) is model
    assert not any(hasattr(item, "typo") for item in holders.optimizers)
    broken = [item for item in errors if isinstance(item, K.layers.Layer)]
    assert len(broken) == 2
    assert all(holders.layers[item] == [] for item in broken)
    apply_plan(model, select(model, 0.3))


def test_what_is_replaced_is_retired_in_mixed_precision(keras_module):
    K, failed = keras_module, []

    class Outer(K.layers.Layer):
        def call(self, inputs):  # where a layer that is built late loads its factors
            failed.append(retire([inner.kernel]))
            return inputs

    inner = dense(K)
    graph = tf.function(lambda x: inner(x)).get_concrete_function(tf.TensorSpec((2, 4)))
    Outer(dtype="mixed_float16")(np.zeros((2, 4), "float32"))
    assert failed == [True]
    with pytest.raises(RuntimeError, match="replaced since"):
        graph(tf.zeros((2, 4)))
    assert np.isnan(backend_of(inner).value(inner.kernel))


class TestEmpty:
    def test_frees_the_value_and_restores_it(self, keras_module):
        layer = dense(keras_module)
        before = backend_of(layer).value(layer.kernel)
        undo = empty(layer.kernel)
        assert np.isnan(backend_of(layer).value(layer.kernel))
        undo()
        np.testing.assert_array_equal(backend_of(layer).value(layer.kernel), before)

    def test_in_a_distribution_strategy(self, keras_module):
        with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
            layer = dense(keras_module)
        before = layer(tf.ones((2, 4)))
        undo = empty(layer.kernel)
        with pytest.raises(tf.errors.InvalidArgumentError):
            layer(tf.ones((2, 4)))
        undo()
        np.testing.assert_array_equal(layer(tf.ones((2, 4))), before)

    @pytest.mark.parametrize("kind", ["Dense", "Conv2D", "EinsumDense", "Embedding", "LSTM"])
    def test_no_graph_computes_with_it(self, keras_module, kind):
        layers = keras_module.layers
        layer, shape = {
            "Dense": (layers.Dense(3), (2, 4)),
            "Conv2D": (layers.Conv2D(3, 2), (2, 5, 5, 4)),
            "EinsumDense": (layers.EinsumDense("abc,cd->abd", (None, 3)), (2, 5, 4)),
            "Embedding": (layers.Embedding(7, 3), (2, 5)),
            "LSTM": (layers.LSTM(3), (2, 5, 4)),
        }[kind]
        inputs = tf.ones(shape, tf.int32 if kind == "Embedding" else tf.float32)
        layer(inputs)
        # A graph in a data set runs outside of Python.
        data = tf.data.Dataset.from_tensors(inputs).map(layer)
        list(data)
        empty(variables_of(layer)[0])
        with pytest.raises(tf.errors.InvalidArgumentError):
            list(data)
