"""Models whose layers are factorized in place."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import zoo

from keras_alds import apply_plan, compress, select
from keras_alds.kinds.base import is_factorized
from keras_alds.models.inventory import walk


def factorized_layers(model):
    return [layer for _, layer in walk(model) if is_factorized(layer)]


def value(tensor):
    return np.asarray(tf.convert_to_tensor(tensor))


class TestSubclassed:
    def test_weights_load_after_the_plan_is_applied(self, keras_module, tmp_path):
        model = zoo.subclassed(keras_module)
        plan = select(model, 0.4)
        compressed = compress(model, plan=plan)
        path = tmp_path / "compressed.weights.h5"
        compressed.save_weights(path)
        fresh = zoo.subclassed(keras_module)
        apply_plan(fresh, plan)
        fresh.load_weights(path)
        inputs = zoo.examples(model)
        np.testing.assert_allclose(
            zoo.outputs(fresh, inputs), zoo.outputs(compressed, inputs), rtol=1e-6, atol=1e-6
        )

    def test_without_a_config_the_error_names_the_remedy(self, keras_module):
        K = keras_module

        class Opaque(K.Model):
            def __init__(self, layer):
                super().__init__()
                self.layer = layer

            def call(self, x):
                return self.layer(x)

            def get_config(self):
                raise NotImplementedError("no config")

        model = Opaque(K.layers.Dense(16))
        model(np.zeros((2, 16), "float32"))
        weights = model.get_weights()
        with pytest.raises(ValueError, match="get_config"):
            compress(model, 0.3)
        np.testing.assert_array_equal(weights[0], model.get_weights()[0])
        apply_plan(model, select(model, 0.3))
        assert is_factorized(model.layer)


class TestInPlace:
    def test_references_names_and_bias_stay(self, small):
        layer, bias = small.get_layer("down"), small.get_layer("down").bias
        apply_plan(small, select(small, 0.4))
        assert small.get_layer("down") is layer
        assert layer.bias is bias
        assert [w.shape[-1] for w in layer.trainable_weights] == [layer.slices * layer.rank, 24, 24]

    def test_a_failure_leaves_everything_as_it_was(self, small, monkeypatch):
        from keras_alds.models import in_place

        inputs = zoo.examples(small)
        expected, weights = zoo.outputs(small, inputs), small.get_weights()
        layers = {path: (layer, type(layer)) for path, layer in walk(small)}

        def fail(*_):
            raise RuntimeError("no")

        monkeypatch.setattr(in_place, "carry_optimizers", fail)
        with pytest.raises(RuntimeError, match="no"):
            apply_plan(small, select(small, 0.4))
        for path, layer in walk(small):
            assert layers[path] == (layer, type(layer))
        np.testing.assert_array_equal(zoo.outputs(small, inputs), expected)
        for a, b in zip(weights, small.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
