"""Embeddings."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from kind_contract import EveryKind, InAModel, name
from layer_contract import KERASES

from keras_alds import select

CASES = [
    ("Embedding", {"input_dim": 20, "output_dim": 6}, (7,)),
]
# In a form that compresses well.
MODELS = [
    ("Embedding", {"input_dim": 50, "output_dim": 24, "mask_zero": True}, (7,)),
]


@pytest.mark.parametrize("case", CASES, ids=name)
class TestEmbedding(EveryKind):
    pass


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case[0])
class TestEmbeddingInAModel(InAModel):
    pass


def test_tables_that_are_tied():
    L = keras.layers
    inputs = keras.Input((8,), dtype="int32")
    table = L.ReversibleEmbedding(50, 16, name="table")
    x = L.Dense(16, name="dense")(table(inputs))
    model = keras.Model(inputs, table(x, reverse=True))
    reasons = {choice.layer: choice.reason for choice in select(model, 0.02).choices}
    assert "reads its table in both directions" in reasons["table"]


@pytest.mark.parametrize("side", KERASES.values(), ids=KERASES)
def test_ragged_and_sparse_numbers(side):
    layer = side.layers.FactorizedEmbedding(9, 6, rank=2)
    numbers = np.array([3, 1, 4, 1, 5, 8])
    ragged = layer(tf.RaggedTensor.from_row_lengths(numbers, [2, 0, 3, 1]))
    np.testing.assert_array_equal(ragged.row_lengths(), [2, 0, 3, 1])
    np.testing.assert_allclose(ragged.flat_values, layer(numbers))
    padded = np.array([[3, 0], [0, 8]])
    np.testing.assert_allclose(layer(tf.sparse.from_dense(padded)), layer(padded))
