"""What `_backend` finds in a layer, in Keras 3 and tf_keras."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from keras_alds._backend import backend_of
from keras_alds._backend.layers import dtype_policy


def test_own_variables_are_not_those_of_layers_inside(keras_module):
    K = keras_module

    class Own(K.layers.Layer):
        def __init__(self):
            super().__init__()
            self.norm = K.layers.BatchNormalization()
            self.norms = [K.layers.LayerNormalization()]

        def build(self, shape):
            self.shift = self.add_weight(name="shift", shape=(4,), trainable=False)
            self.scale = self.add_weight(name="scale", shape=(4,), initializer="ones")
            self.built = True

        def call(self, x):
            return self.norms[0](self.norm(x)) * self.scale + self.shift

    layer = Own()
    layer(np.ones((2, 4), "float32"))
    backend = backend_of(layer)
    for trainable in (True, False):
        layer.trainable = trainable
        assert [
            v is w
            for v, w in zip(backend.own_variables(layer), (layer.scale, layer.shift), strict=True)
        ] == [True, True]
        assert len(backend.own_variables(layer.norm)) == 4
    assert len(backend.children(layer)) == 2


def test_vocabularies_are_no_variables(keras_module):
    lookup = keras_module.layers.StringLookup(vocabulary=["a", "b"])
    lookup(tf.constant(["a"]))
    assert backend_of(lookup).own_variables(lookup) == []


def test_dtype_policy(keras_module):
    layer = keras_module.layers.Dense(2, dtype="mixed_float16")
    assert dtype_policy(layer).name == "mixed_float16"
    assert dtype_policy(layer).compute_dtype == "float16"


def test_the_giver_of_a_state_is_spent_once_the_layer_is_built(keras_module):
    old, new = keras_module.layers.Dense(2), keras_module.layers.Dense(2)
    backend = backend_of(old)
    backend.transplant(old, new)
    old.build((None, 3))
    assert new.weights == old.weights
    assert backend.is_spent(new)
    assert not backend.is_spent(old)
