"""Equal ranges between encoder and decoder: what they are, and that no output changes."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import zoo

import keras_alds
from keras_alds.kinds.base import factorized_kind, is_factorized
from keras_alds.models.ranges import (
    equalized,
    find_pairs,
    scales_for_norms,
    scales_for_ranges,
)

pytest.importorskip("ai_edge_litert")

from keras_alds.litert import equalize

L = keras.layers


def pairs_network(K: Any) -> Any:
    """Factorized and stock pairs of every kind, shared ones and things that are no pairs."""
    L = K.layers
    inputs = K.Input((10, 10, 8), name="images")
    x = L.Conv2D(16, 3, padding="same", activation="relu", name="first")(inputs)
    shared = L.Conv2D(16, 3, dilation_rate=2, padding="same", name="shared")
    x = L.BatchNormalization(name="bn")(L.Add(name="sum")([shared(x), shared(shared(x))]))
    x = L.Conv2D(16, 3, strides=2, activation="relu", name="down")(x)
    x = L.Reshape((16, 16), name="rows")(x)
    x = L.Conv1D(16, 3, padding="causal", name="causal")(x)
    x = L.Dense(16, activation="relu", name="rowwise")(x)
    x = L.Flatten(name="flat")(x)
    return K.Model(inputs, L.Dense(8, name="head")(x))


@pytest.mark.parametrize("seed", range(2))
def test_equal_ranges_change_no_output(keras_module: Any, seed: int):
    random = np.random.default_rng(seed)
    model = pairs_network(keras_module)
    small = keras_alds.compress(model, plan=zoo.random_plan(model, random, None))
    x = random.standard_normal((16, 10, 10, 8)).astype("float32")
    for candidate in (small, keras_alds.expand(small)):
        pairs = find_pairs(candidate)
        # In stock layers the linear decoder of `causal` is the encoder of what follows, too.
        layers = [pair.layer for pair in pairs]
        extra = [layer for layer in layers if layer.name == "causal" and not is_factorized(layer)]
        assert len(pairs) == 6 + len(extra)
        inner = {id(pair.encoder) for pair in pairs}
        zoo.spread(candidate, 4, seed)
        expected = np.asarray(candidate(x, training=False))
        before = candidate.get_weights()
        for batches in ([x[:8], x[8:]], None):
            with equalized(candidate, batches):
                found = np.asarray(candidate(x, training=False))
                np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
                for pair in pairs:
                    left = np.asarray(pair.encoder).reshape(-1, pair.decoder.shape[-2])
                    right = np.asarray(pair.decoder).reshape(left.shape[1], -1)
                    if batches is None and id(pair.decoder) not in inner:
                        norms = np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=1)
                        np.testing.assert_allclose(*norms, rtol=1e-4)
            for old, new in zip(before, candidate.get_weights(), strict=True):
                np.testing.assert_array_equal(old, new)
    # The ranges themselves, from the layers' own arithmetic.
    first = small.get_layer("first")
    equalize(small, x, verbose=0)
    middle = (
        np.abs(factorized_kind(first).encoded(first, x))
        .reshape(-1, first.encoder.shape[-1])
        .max(axis=0)
    )
    np.testing.assert_allclose(middle, middle[0], rtol=1e-4)


def test_what_is_no_pair_is_left_alone():
    inputs = keras.Input((6, 6, 4))
    x = L.Conv2D(8, 3, padding="same", activation="relu", name="not_linear")(inputs)
    x = L.Conv2D(8, 1, name="read_twice")(x)
    y = L.Conv2D(8, 1, name="a")(x)
    x = L.Add()([y, L.Conv2D(8, 1, name="b")(x)])
    x = L.Conv2D(8, 3, name="before_3x3")(x)
    x = L.Conv2D(8, 3, name="wide")(x)
    x = L.Conv2D(8, 1, name="linear")(x)
    x = L.Conv2D(8, 1, name="also_output")(x)
    z = L.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, [L.Dense(3, name="head")(z), x])
    assert [pair.layer.name for pair in find_pairs(model)] == ["wide", "linear"]


def test_scales_by_hand():
    left, right = np.array([[1.0, 2.0, 0.0, 3.0]]), np.array([[5.0], [7.0], [1e9], [0.0]])
    scale = scales_for_ranges(left, right, np.array([10.0, 1e-3, 0.0, 4.0]), 1.0)
    assert scale[0] * 10 == pytest.approx(scale[1] * 1e-3) == pytest.approx(scale[3] * 4)
    # A zero encoder column: its huge decoder row no longer sets the scale.
    assert 1e9 / scale[2] <= max(5 / scale[0], 7 / scale[1]) * 1.001
    # A rank that is next to never excited is not blown up beyond what XNNPACK takes.
    tiny = scales_for_ranges(left[:, :2], right[:2], np.array([10.0, 1e-30]), 1.0)
    assert tiny[1] * 2.0 / (tiny[0] * 10.0) <= 127 * 256 / 8 * 1.001
    for scale in (
        scales_for_ranges(np.zeros((3, 2)), np.zeros((2, 3)), np.zeros(2), 0.0),
        scales_for_norms(np.zeros((3, 2)), np.zeros((2, 3))),
    ):
        np.testing.assert_array_equal(scale, 1.0)
