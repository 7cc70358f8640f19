"""Copies of models, in Keras 3 and tf_keras."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_alds import compress
from keras_alds._backend import backend_of
from keras_alds._backend.graphs import is_ragged, is_sparse


def block(K, inner, name):
    inputs = K.Input((4,))
    return K.Model(inputs, inner(inputs), name=name)


@pytest.mark.parametrize("frozen", ["first", "second"])
def test_what_is_frozen_stays_so_in_shared_layers(keras_module, frozen):
    K = keras_module
    inner = block(K, K.layers.Dense(4, name="dense"), "inner")
    shares = K.__name__ == "keras"  # clones of tf_keras do not, and are refused
    second = block(K, inner if shares else K.layers.Dense(4), "second")
    first = block(K, inner, "first")
    inputs = K.Input((4,))
    model = K.Model(inputs, K.layers.Add()([first(inputs), second(inputs)]))
    model.get_layer(frozen).trainable = False
    inner.trainable = True
    copy = backend_of(model).copy_model(model)

    def states(model):
        inner = model.get_layer("first").layers[-1]
        layers = (model, model.get_layer("first"), model.get_layer("second"), inner)
        return [layer.trainable for layer in (*layers, inner.layers[-1])]

    assert states(copy) == states(model)
    assert states(copy) == [True, frozen != "first", frozen != "second", True, True]


def test_models_that_share_an_input(keras_module):
    K = keras_module
    inputs = K.Input((16,), name="shared")
    first = K.Model(inputs, K.layers.Dense(16)(inputs), name="first")
    second = K.Model(inputs, K.layers.Dense(16)(inputs), name="second")
    second.layers[-1].trainable = False
    model = K.Model(inputs, K.layers.Add()([first(inputs), second(inputs)]))
    copy = backend_of(model).copy_model(model)
    x = np.ones((2, 16), "float32")
    np.testing.assert_array_equal(copy(x), model(x))
    assert compress(model, 0.3).count_params() <= 0.7 * model.count_params()
    assert [layer.trainable for layer in copy.get_layer("second").layers[1:]] == [False]
    assert copy.get_layer("first").layers[-1].trainable


def test_settings_after_compile_are_copied(keras_module):
    K = keras_module
    model = K.Sequential([K.Input((4,)), K.layers.Dense(2)])
    model.compile("sgd", "mse", jit_compile=True, steps_per_execution=3)
    copy = backend_of(model).copy_model(model)
    assert copy.jit_compile is True
    arguments = backend_of(model).compile_arguments(copy)
    assert arguments["steps_per_execution"] == 3
    if K.__name__ == "tf_keras":
        model.run_eagerly, model.jit_compile = True, False
        copy = backend_of(model).copy_model(model)
        assert copy.run_eagerly
        assert not copy.jit_compile


def test_inputs_stay_sparse_ragged_and_optional(keras_module):
    K = keras_module
    L = K.layers
    inner_input = K.Input((4,), sparse=True)
    inner = K.Model(inner_input, L.Dense(2)(inner_input))
    sparse, ragged = K.Input((4,), sparse=True), K.Input((None, 4), ragged=True)
    sizes = L.Lambda(lambda x: x.row_lengths()[:, None], output_shape=(1,))(ragged)
    model = K.Model([sparse, ragged], [inner(sparse), sizes])
    for net in (model, K.Sequential([K.Input((4,), sparse=True), L.Dense(2)])):
        copy = backend_of(net).copy_model(net)
        copy = backend_of(copy).copy_model(copy)
        assert [*map(is_sparse, copy.inputs)] == [*map(is_sparse, net.inputs)]
        assert [*map(is_ragged, copy.inputs)] == [*map(is_ragged, net.inputs)]
    assert is_sparse(backend_of(model).copy_model(model).layers[-2].inputs[0])
    if K.__name__ == "keras":
        net = K.Sequential([K.Input((4,), optional=True), L.Dense(2)])
        assert backend_of(net).copy_model(net).inputs[0]._keras_history.operation.optional


@pytest.mark.parametrize("mode", ["int8", "float8"])
def test_layers_that_are_quantized(mode):
    L = keras.layers
    layers = [L.Dense(64, name="first"), L.Dense(64, name="second"), L.Dense(8, name="last")]
    model = keras.Sequential([keras.Input((32,)), *layers])
    x = np.random.default_rng(0).normal(size=(8, 32)).astype("float32")
    model.get_layer("first").quantize(mode)
    if mode == "float8":
        model.compile("adam", "mse")
        model.fit(x, x[:, :8], verbose=0)  # the scales follow
    model.get_layer("first").bias.trainable = False
    model.compile("adam", "mse")
    copy = backend_of(model).copy_model(model)
    np.testing.assert_array_equal(copy(x), model(x))
    assert not copy.get_layer("first").bias.trainable
    assert len(copy.trainable_weights) == len(model.trainable_weights)
    small = compress(model, 0.3, method="energy")
    assert [type(layer).__name__ for layer in small.layers] == [
        "Dense",
        "FactorizedDense",
        "Dense",
    ]
    small.fit(x, x[:, :8], verbose=0)


def test_a_copy_holds_no_tensor_of_the_graph_that_built_it(keras_module):
    """Code may keep an output in an attribute; the copy is built by a traced call."""
    K = keras_module

    class Keeping(K.Model):
        def __init__(self, **options):
            super().__init__(**options)
            self.dense, self.last = K.layers.Dense(16), None

        def call(self, x):
            self.last = self.dense(x)
            return self.last

    model = Keeping()
    x = np.ones((4, 16), "float32")
    model(x)
    small = compress(model, 0.3, method="energy")
    assert not tf.is_symbolic_tensor(small.last)
    np.testing.assert_allclose(small(x), small.last)
