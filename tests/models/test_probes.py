"""Models run with other kernels: as a graph, from several of their steps, or as code."""

from __future__ import annotations

import numpy as np
import pytest
import zoo

from keras_alds._backend import backend_of
from keras_alds._backend.calls import replaced_calls
from keras_alds.kinds.base import known_kind
from keras_alds.models import probes
from keras_alds.models.inventory import Inventory
from keras_alds.models.probes import Prober


def candidates(model):
    return [record.layer for record in Inventory.of(model).candidates]


def halved(layer):
    return 0.5 * backend_of(layer).value(known_kind(layer).variable(layer))


def flat(outputs):
    return np.concatenate([np.ravel(output) for output in outputs])


def assert_as_with_the_kernel_itself(model, inputs):
    layers = candidates(model)
    prober = Prober(model, layers, [inputs])
    for layer in layers:
        found = prober.outputs({layer: (kernel := halved(layer))})
        variable = known_kind(layer).variable(layer)
        before = backend_of(layer).value(variable)
        variable.assign(kernel)
        expected = zoo.outputs(model, inputs)
        variable.assign(before)
        np.testing.assert_allclose(flat(found), expected, rtol=1e-4, atol=1e-5)
    own = flat(prober.outputs({}))
    np.testing.assert_allclose(own, zoo.outputs(model, inputs), rtol=1e-4, atol=1e-5)
    return prober


@pytest.mark.parametrize("fewest", [1, 100])
def test_every_kind_of_model(model, monkeypatch, fewest):
    monkeypatch.setattr(probes, "_FEWEST_IN_A_TAIL", fewest)
    prober = assert_as_with_the_kernel_itself(model, zoo.examples(model, 4))
    if fewest == 1 and len(prober._program.steps) > 8:
        assert len(prober._tails) > 1


def test_masks_reach_steps_in_the_middle(keras_module, monkeypatch):
    L = keras_module.layers
    monkeypatch.setattr(probes, "_FEWEST_IN_A_TAIL", 1)
    inputs = keras_module.Input((6,), dtype="int32")
    x = L.Embedding(20, 8, mask_zero=True)(inputs)
    x = L.Dense(16)(x)
    x = L.GlobalAveragePooling1D()(L.LSTM(8, return_sequences=True)(L.Dense(8)(x)))
    model = keras_module.Model(inputs, L.Dense(4)(x))
    tokens = np.random.default_rng(0).integers(0, 20, (5, 6)) * (np.arange(6) < 4)
    prober = assert_as_with_the_kernel_itself(model, tokens)
    assert len(prober._tails) > 2


def test_code_that_cannot_be_traced(keras_module):
    K = keras_module

    class Scaled(K.layers.Layer):
        def call(self, x):
            if hasattr(x, "numpy"):
                return x / float(x.numpy().std())
            if getattr(self, "made", False):
                raise TypeError("no graph")
            return x

    inputs = K.Input((16,))
    layer = Scaled()
    model = K.Model(inputs, K.layers.Dense(4)(layer(K.layers.Dense(24)(inputs))))
    layer.made = True
    x = np.random.default_rng(0).normal(size=(8, 16)).astype("float32")
    prober = Prober(model, (layers := candidates(model)), [x])
    assert np.isfinite(prober.divergence({layers[0]: halved(layers[0])}))


def test_what_watches_a_layer_sees_every_run(keras_module):
    model = zoo.functional(keras_module)
    layers, seen = candidates(model), []
    prober = Prober(model, layers, [zoo.examples(model, 4)])
    kernels = {layers[0]: halved(layers[0])}
    expected = prober.outputs(kernels)

    def watch(call, x, *args, **kwargs):
        seen.append(np.array(x))
        return call(x, *args, **kwargs)

    for runs in (1, 2):
        with replaced_calls({model.layers[-1]: watch}):
            np.testing.assert_allclose(prober.outputs(kernels)[0], expected[0], rtol=1e-4)
        assert len(seen) == runs
