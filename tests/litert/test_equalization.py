"""`equalize`: what it refuses. What it does: tests/models/test_ranges.py."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import zoo

import keras_alds

pytest.importorskip("ai_edge_litert")

from keras_alds.litert import equalize

L = keras.layers


def test_equalize_refuses_what_it_cannot_use():
    small = keras_alds.compress(zoo.functional(keras), 0.4)
    x = zoo.examples(small, 32)
    before = small.get_weights()
    with pytest.raises(ValueError, match=r"built `keras\.Model`"):
        equalize(L.Dense(3))
    with pytest.raises(ValueError, match="at least 8 examples in `representative_data`"):
        equalize(small, x[:5], verbose=0)
    with pytest.raises(ValueError, match="batches in `representative_data` of shape"):
        equalize(small, x[:, 1:], verbose=0)
    for old, new in zip(before, small.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
