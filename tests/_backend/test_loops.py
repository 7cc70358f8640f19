"""Recurrent layers in passes over examples: traced once, and left as they were."""

from __future__ import annotations

import time

import numpy as np
import pytest

from keras_alds import CalibrationStats, compress
from keras_alds._backend.calls import replaced_calls, watched
from keras_alds._backend.loops import InGraph, compiled_loops, passing
from keras_alds.models.inventory import walk
from keras_alds.models.observe import when_known

STEPS, EXAMPLES = 20, 96
X = np.random.default_rng(0).standard_normal((EXAMPLES, STEPS, 6)).astype("float32")


def own_cell(K):
    @K.saving.register_keras_serializable(package="test_loops")
    class Cell(K.layers.Layer):
        def __init__(self, units, **kwargs):
            super().__init__(**kwargs)
            self.units = self.state_size = units
            self.a, self.b = K.layers.Dense(units), K.layers.Dense(units)

        def build(self, shape):
            self.a.build(shape)
            self.b.build((None, self.units))
            super().build(shape)

        def call(self, inputs, states, training=None):
            h = K.activations.tanh(self.a(inputs) + self.b(states[0]))
            return h, [h]

        def get_config(self):
            return {**super().get_config(), "units": self.units}

    return Cell


LAYERS = {
    "LSTM": lambda K: K.layers.LSTM(12),
    "GRU without a kernel to compress": lambda K: K.layers.GRU(12, reset_after=False),
    "Bidirectional": lambda K: K.layers.Bidirectional(K.layers.SimpleRNN(12)),
    "own cell": lambda K: K.layers.RNN(own_cell(K)(12)),
    "several cells": lambda K: K.layers.RNN([K.layers.LSTMCell(12), K.layers.GRUCell(8)]),
}


def model_of(K, layer, masked=False):
    start = [K.Input((STEPS, 6)), *([K.layers.Masking()] if masked else [])]
    return K.Sequential([*start, layer, K.layers.Dense(16), K.layers.Dense(8)])


def cells_of(model):
    held = [getattr(layer, "cell", None) for _, layer in walk(model)]
    return [inner for cell in held if cell is not None for inner in getattr(cell, "cells", [cell])]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore:The code of")
def test_python_runs_no_step_by_step(keras_module, name, monkeypatch):
    model = model_of(keras_module, LAYERS[name](keras_module))
    count = [0]
    for cls in {type(cell) for cell in cells_of(model)}:

        def call(self, *args, _call=cls.call, **kwargs):
            count[0] += 1
            return _call(self, *args, **kwargs)

        monkeypatch.setattr(cls, "call", call)
    compress(model, 0.1, calibration_data=X)
    # Some traces, of which each runs a step a few times; a pass has 60 steps, and there are dozens.
    assert count[0] < 120


def test_moments_are_those_of_calls_one_by_one(keras_module):
    model = model_of(keras_module, LAYERS["own cell"](keras_module))
    cell = model.layers[0].cell
    stats = CalibrationStats.collect(model, X, verbose=0)
    rows = {cell.a: [], cell.b: []}

    def watch(layer, inputs, outputs):
        rows[layer].append(np.asarray(inputs))
        return outputs

    with replaced_calls(watched(rows, watch)):
        for start in range(0, EXAMPLES, 32):
            model(X[start : start + 32])
    for layer, seen in rows.items():
        (found,) = [m for path, m in stats.moments.items() if path.endswith(layer.name)]
        seen = np.concatenate(seen)
        assert found.count == len(seen)
        np.testing.assert_allclose(found.blocks[0], seen.T @ seen / len(seen), atol=1e-5)


def test_watched_calls_come_one_after_the_other(keras_module):
    model = model_of(keras_module, LAYERS["own cell"](keras_module))
    cell, active, order = model.layers[0].cell, [], []

    def use(name, values):
        order.append((name, len(active)))
        active.append(name)
        time.sleep(0.002 * len(order) % 0.003)
        active.remove(name)

    def watch(layer, inputs, outputs):
        name = "a" if layer is cell.a else "b"
        return when_known(inputs, outputs, lambda values: use(name, values))

    # Keras runs one more step before the loop, whose outputs nobody needs.
    with replaced_calls(compiled_loops(model), watched([cell.a, cell.b], watch)):
        for _ in range(5):
            model(X[:2])
    assert order == [("a", 0), ("b", 0)] * (5 * (STEPS + 1))


def test_an_error_of_a_watcher_keeps_its_type(keras_module):
    model = model_of(keras_module, LAYERS["own cell"](keras_module))
    model.layers[0].cell.b.kernel.assign(np.full((12, 12), np.nan, "float32"))
    with pytest.raises(ValueError, match="NaN or infinity in the input of layer"):
        CalibrationStats.collect(model, X, verbose=0)
    assert all("call" not in vars(layer) for _, layer in walk(model))


def test_a_call_that_cannot_be_traced_runs_as_it_is(keras_module):
    layer = keras_module.layers.Dense(3)

    def call(x):
        return x + float(np.asarray(x).sum())  # needs values

    np.testing.assert_array_equal(InGraph(layer)(call, X[0]), X[0] + float(X[0].sum()))


def test_kinds_of_inputs(keras_module):
    layer = keras_module.layers.GRU(5)
    model = model_of(keras_module, layer)
    with passing(model), replaced_calls(compiled_loops(model)):
        for x in (X[:4], X[:3], X[:4, :7], X[:0]):
            mask = np.arange(x.shape[1])[None] < np.arange(2, 2 + len(x))[:, None]
            for given in (None, mask):
                found = layer(x, mask=given)
                with replaced_calls(
                    {layer: lambda call, *a, **k: type(layer).call(layer, *a, **k)}
                ):
                    right = layer(x, mask=given)
                np.testing.assert_allclose(found, right, atol=1e-6)


def test_settings_states_and_losses_stay(keras_module):
    K = keras_module
    cell = own_cell(K)(12)
    cell.a.activity_regularizer = K.regularizers.L2(0.1)
    stateful = K.layers.LSTM(12, stateful=True, return_sequences=True)
    model = K.Sequential([K.Input((STEPS, 6), batch_size=8), stateful, K.layers.RNN(cell)])
    model.add(K.layers.Dense(8))
    model(X[:8])
    before = [np.asarray(state) for state in stateful.states]
    seen = set()

    def watch(inputs, outputs):
        seen.add((stateful.stateful, stateful.return_state))
        return when_known(inputs, outputs, lambda _: None)

    with passing(model), replaced_calls(watched([model.layers[-1]], lambda _, x, y: watch(x, y))):
        model(X[:8])
    stats = CalibrationStats.collect(model, X, verbose=0)
    assert stats.examples == EXAMPLES
    assert seen == {(True, False)}
    for state, value in zip(stateful.states, before, strict=True):
        np.testing.assert_array_equal(state, value)
    model(X[:8])
    assert all(np.isfinite(float(loss)) for loss in model.losses)  # none of a graph
