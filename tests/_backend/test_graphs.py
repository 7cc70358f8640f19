"""What `_backend` reads of a model as a graph, in Keras 3 and tf_keras."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from keras_alds._backend import backend_of


def two_inputs(K):
    image, number = K.Input((4,), name="image"), K.Input((3,), name="number")
    outputs = K.layers.Dense(2)(K.layers.Concatenate()([number, image]))
    return K.Model({"image": image, "number": number}, outputs)


def subclassed(K):
    class Own(K.Model):
        def __init__(self):
            super().__init__()
            self.dense = K.layers.Dense(3)

        def call(self, x):
            return self.dense(x)

    return Own()


def test_shapes_are_traced_by_layer(keras_module):
    K = keras_module
    shared, inputs = K.layers.Dense(4), K.Input((5, 4))
    model = K.Model(inputs, K.layers.Flatten()(shared(shared(inputs))))
    flatten, unused = model.layers[-1], K.layers.Dense(1)
    calls, _ = backend_of(model).trace_shapes(model, [shared, flatten, unused])
    assert calls == {
        shared: [((1, 5, 4), (1, 5, 4))] * 2,
        flatten: [((1, 5, 4), (1, 20))],
        unused: [],
    }
    assert "call" not in vars(shared)


def test_inputs_are_named_in_order(keras_module):
    K = keras_module
    model = two_inputs(K)
    backend = backend_of(model)
    assert backend.input_names(model) == ["image", "number"]
    inputs = [K.Input((2,), name="z"), K.Input((2,), name="a")]
    assert backend.input_names(K.Model(inputs, K.layers.Add()(inputs))) == ["z", "a"]
    assert backend.input_names(K.Sequential([K.Input((2,), name="x"), K.layers.Dense(1)])) == ["x"]
    assert backend.input_names(K.Sequential([K.layers.Dense(1)])) == []
    model = subclassed(K)
    model(np.zeros((1, 2), "float32"))
    assert backend.input_names(model) == []


def test_inputs_are_taken_as_the_model_takes_them(keras_module):
    model = two_inputs(keras_module)
    given = {"number": np.ones((2, 3), int), "image": np.zeros((2, 4))}
    found = backend_of(model).graph_inputs(model, given)
    assert [tuple(tensor.shape) for tensor in found] == [(2, 4), (2, 3)]
    assert all(tensor.dtype == tf.float32 for tensor in found)
    # A vector of single features gets its last axis, as in the model.
    single = keras_module.Sequential([keras_module.Input((1,)), keras_module.layers.Dense(1)])
    (found,) = backend_of(single).graph_inputs(single, np.arange(3.0))
    assert tuple(found.shape) == (3, 1)


def test_the_structure_of_outputs_is_kept(keras_module):
    K = keras_module
    inputs = K.Input((4,))
    outputs = {"a": K.layers.Dense(1)(inputs), "b": K.layers.Dense(2)(inputs)}
    model = K.Model(inputs, outputs)
    starts, ends = backend_of(model).graph_ends(model)
    assert starts is inputs
    tf.nest.assert_same_structure(ends, outputs)


def test_input_specs(keras_module):
    K = keras_module
    backend = backend_of(two_inputs(K))
    specs = backend.input_specs(two_inputs(K))
    assert {name: tuple(spec.shape) for name, spec in specs.items()} == {
        "image": (1, 4),
        "number": (1, 3),
    }
    model = subclassed(K)
    for unknown in (model, K.Sequential([K.layers.Dense(1)])):
        with pytest.raises(ValueError, match="to have known input shapes"):
            backend.input_specs(unknown)
    model(np.zeros((7, 5), "float32"))
    spec = backend.input_specs(model)
    assert (tuple(spec.shape), spec.dtype) == ((1, 5), tf.float32)


def test_infers_without_training(keras_module):
    K = keras_module
    x = tf.ones((1, 1000))
    backend = backend_of(K.layers.Dropout(0.5))
    for layer in (K.layers.Dropout(0.5), K.Sequential([K.layers.Dropout(0.5)])):
        for kwargs in ({}, {"training": None}):
            np.testing.assert_array_equal(np.asarray(backend.infer(layer, (x,), kwargs)), x)
    assert (np.asarray(backend.infer(layer, (x,), {"training": True})) == 0).any()
    assert backend.infer(tf.function(lambda x, training: training), (x, 3), {}) == 3
