"""BatchNormalization behind activations: what is moved, and that no output changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import zoo

import keras_alds
from keras_alds.models.merging import find_normalizations, merged


def network(keras: Any) -> Any:
    """Normalizations of every kind: movable ones, some of them only in part, and others."""
    L = keras.layers
    inputs = keras.Input((16, 16, 8))
    x = L.Conv2D(16, 3, activation="relu", name="a")(L.BatchNormalization(name="first")(inputs))
    x = L.BatchNormalization(name="whole")(x)
    x = L.Conv2D(16, 3, padding="same", use_bias=False, name="b")(L.MaxPooling2D(2)(x))
    x = L.BatchNormalization(name="half", center=False)(L.AveragePooling2D(2)(L.ReLU()(x)))
    x = L.Conv2D(16, 3, padding="same", name="linear")(x)
    x = L.BatchNormalization(name="by_converter")(x)
    x = L.Conv2D(16, 3, padding="same", activation="relu", name="c")(x)
    y = L.BatchNormalization(name="read_twice")(x)
    x = L.Conv2D(16, 1, activation="relu", name="d")(L.Add()([x, y]))
    x = L.Flatten()(L.BatchNormalization(name="flat", scale=False)(x))
    x = L.Dense(16, activation="relu", name="e")(x)
    x = L.BatchNormalization(name="dropped")(L.Dropout(0.5)(x))
    x = L.Dense(16, activation="tanh", name="f")(x)
    x = L.BatchNormalization(name="tanh")(x)
    model = keras.Model(inputs, L.Dense(8, name="head")(x))
    random = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, L.BatchNormalization):  # factors from 0.03 to 30, one of them 0
            weights = {
                variable.name.split("/")[-1].split(":")[0]: variable for variable in layer.weights
            }
            size = weights["moving_mean"].shape[0]
            for variable in weights.values():
                variable.assign(0.2 * random.standard_normal(size))
            weights["moving_variance"].assign(10 ** random.uniform(-3, 3, size))
            if layer.scale:
                weights["gamma"].assign(np.append(random.uniform(0.5, 1, size - 2), [0, -1]))
    return model


def test_merging_moves_what_it_can_and_changes_no_output(keras_module: Any):
    model = network(keras_module)
    random = np.random.default_rng(0)
    x = random.standard_normal((8, 16, 16, 8)).astype("float32")
    small = keras_alds.compress(model, plan=zoo.random_plan(model, random, None))
    for candidate in (model, small):
        names = {
            found.layer.name: (found.writer.name, found.reader and found.reader.name)
            for found in find_normalizations(candidate)
        }
        assert names == {
            "whole": ("a", None),  # `b` pads, and has no bias
            "half": ("b", None),
            "flat": ("d", "e"),
            "dropped": ("e", "f"),
        }
        before = candidate.get_weights()
        expected = np.asarray(candidate(x, training=False))
        with merged(candidate):
            inside = np.asarray(candidate(x, training=False))
            dropped = candidate.get_layer("dropped")
            assert not np.asarray(dropped.beta).any()
            assert set(np.unique(dropped.gamma)) == {-1, 0, 1}
        np.testing.assert_allclose(inside, expected, atol=1e-4 * np.abs(expected).max())
        for old, new in zip(before, candidate.get_weights(), strict=True):
            np.testing.assert_array_equal(old, new)


def test_what_cannot_be_moved_is_left_alone(keras_module: Any):
    L = keras_module.layers

    def found(**options: Any) -> list[Any]:
        inputs = keras_module.Input((8, 8, 4))
        writer = L.Conv2D(8, 3, activation="relu")
        x = L.BatchNormalization(axis=options.pop("axis", -1))(writer(inputs), **options)
        model = keras_module.Model(inputs, L.Conv2D(4, 1)(x))
        if hasattr(writer, "enable_lora"):
            assert len(find_normalizations(model)) == (0 if options.get("training") else 1)
            writer.enable_lora(2)  # the kernel is no variable then
        return find_normalizations(model)

    adapted = hasattr(L.Conv2D, "enable_lora")
    assert len(found()) == (0 if adapted else 1)
    assert not found(training=True)  # the statistics are those of the batch
    if not adapted:
        assert not found(axis=[1, 3])


def test_int8_files_keep_channels_whose_factors_are_small():
    pytest.importorskip("ai_edge_litert")
    import keras

    from keras_alds.litert import convert, read_file
    from keras_alds.litert.runs import Runner

    L = keras.layers
    keras.utils.set_random_seed(0)
    layers = [L.Conv2D(8, 3, activation="relu"), L.BatchNormalization(), L.Conv2D(8, 3)]
    model = keras.Sequential([keras.Input((8, 8, 4)), *layers, L.Flatten(), L.Dense(4)])
    layers[1].moving_variance.assign(np.logspace(-4, 2, 8))
    layers[0].kernel.assign(np.asarray(layers[0].kernel) * np.logspace(-2, 1, 8))
    x = np.random.default_rng(0).standard_normal((64, 8, 8, 4)).astype("float32")
    expected = model.predict(x, verbose=0)
    file = convert(model, quantize="int8", representative_data=x, verbose=0)
    found = Runner(file).predict(x)
    assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)
    assert {"MUL", "ADD"}.isdisjoint(operator.name for operator in read_file(file).operators)
