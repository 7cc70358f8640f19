"""Einsum layers."""

from __future__ import annotations

import keras
import pytest
from kind_contract import EveryKind, InAModel, name

import keras_alds
from keras_alds import select

CASES = [
    ("EinsumDense", {"equation": "ab,bc->ac", "output_shape": 6, "bias_axes": "c"}, (4,)),
    ("EinsumDense", {"equation": "...x,xy->...y", "output_shape": 6, "bias_axes": "y"}, (5, 4)),
    (
        "EinsumDense",
        {"equation": "abc,cde->abde", "output_shape": (None, 2, 3), "bias_axes": "de"},
        (5, 4),
    ),
    (
        "EinsumDense",
        {"equation": "abcd,cde->abe", "output_shape": (None, 6), "activation": "tanh"},
        (5, 2, 4),
    ),
    ("EinsumDense", {"equation": "abc,dce->aebd", "output_shape": (3, None, 2)}, (5, 4)),
    ("EinsumDense", {"equation": "abc,cd->ad", "output_shape": 6, "bias_axes": "d"}, (5, 4)),
    ("EinsumDense", {"equation": "ab...,bc->ac...", "output_shape": 6, "bias_axes": "c"}, (4, 5)),
]
# In a form that compresses well.
MODELS = [
    (
        "EinsumDense",
        {"equation": "abc,cde->abde", "output_shape": (None, 4, 6), "bias_axes": "de"},
        (5, 24),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=name)
class TestEinsum(EveryKind):
    pass


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case[0])
class TestEinsumInAModel(InAModel):
    pass


def test_einsum_kernels_that_are_no_matrix(keras_module):
    L, K = keras_module.layers, keras_module
    inputs = K.Input((8, 16))
    x = L.EinsumDense("abc,bcd->abd", (8, 16), name="per_row")(inputs)
    x = L.EinsumDense("abc,c->abc", (8, 16), name="scale")(x)
    model = K.Model(inputs, L.Dense(16, name="dense")(x))
    reasons = {choice.layer: choice.reason for choice in select(model, 0.05).choices}
    assert "axis 'b' of its kernel is in inputs and outputs" in reasons["per_row"]
    assert "axis 'c' of its kernel is in inputs and outputs" in reasons["scale"]


@pytest.mark.both
def test_bad_equations(keras_module):
    side = keras_alds.layers if keras_module is keras else keras_alds.tf_keras
    with pytest.raises(ValueError, match="holds many matrices, not one"):
        side.FactorizedEinsumDense("abc,bcd->abd", (8, 16), 1, 2)
    with pytest.raises(ValueError, match="one entry for every axis of 'bd'"):
        side.FactorizedEinsumDense("abc,cd->abd", 16, 1, 2).build((None, 3, 4))
    with pytest.raises(ValueError, match="to have the axes of its equation"):
        side.FactorizedEinsumDense("abc,cd->abd", (None, 16), 1, 2).build((None, 4))
