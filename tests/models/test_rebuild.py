"""Models rebuilt layer by layer: what a config cannot hold, and single frozen weights."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import zoo

import keras_alds


@pytest.mark.both
def test_functions_are_shared_and_what_cannot_be_copied_is_named(keras_module):
    K, L = keras_module, keras_module.layers

    class NoConfig(L.Layer):
        def __init__(self, size):
            super().__init__(name="no_config")
            self.size = size

        def get_config(self):
            return {}

        def call(self, x):
            return x * self.size

    inputs = K.Input((4,))
    x = L.Dense(3, activation=lambda x: x * 2, name="own")(inputs)
    if keras_module is keras:
        model = K.Model(inputs, x)
        model.get_layer("own").kernel.trainable = False
        stock = keras_alds.expand(model)
        data = np.random.default_rng(0).standard_normal((5, 4)).astype("float32")
        np.testing.assert_array_equal(zoo.outputs(stock, data), zoo.outputs(model, data))
        own = stock.get_layer("own")
        assert own.bias.trainable
        assert not own.kernel.trainable
    model = K.Model(inputs, NoConfig(3)(L.Dense(3)(inputs)))
    with pytest.raises(ValueError, match=r"(?s)copy of the layer 'no_config'.*Remedy: register"):
        keras_alds.expand(model)
