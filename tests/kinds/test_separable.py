"""Separable convolutions."""

from __future__ import annotations

import keras
import pytest
from kind_contract import EveryKind, InAModel, name

import keras_alds

CASES = [
    ("SeparableConv1D", {"filters": 6, "kernel_size": 3, "strides": 2}, (9, 4)),
    ("SeparableConv1D", {"filters": 6, "kernel_size": 3, "dilation_rate": 2}, (9, 4)),
    ("SeparableConv2D", {"filters": 6, "kernel_size": 3, "depth_multiplier": 2}, (7, 6, 4)),
    ("SeparableConv2D", {"filters": 6, "kernel_size": 3, "dilation_rate": (1, 2)}, (7, 6, 4)),
    (
        "SeparableConv2D",
        {"filters": 6, "kernel_size": (3, 2), "strides": 2, "padding": "same", "use_bias": False},
        (7, 6, 4),
    ),
]
# In a form that compresses well.
MODELS = [
    ("SeparableConv1D", {"filters": 24, "kernel_size": 3}, (9, 24)),
    ("SeparableConv2D", {"filters": 24, "kernel_size": 3, "padding": "same"}, (6, 6, 24)),
]


@pytest.mark.parametrize("case", CASES, ids=name)
class TestSeparable(EveryKind):
    pass


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case[0])
class TestSeparableInAModel(InAModel):
    pass


@pytest.mark.both
def test_bad_strides(keras_module):
    side = keras_alds.layers if keras_module is keras else keras_alds.tf_keras
    with pytest.raises(ValueError, match=r"equal `strides`.*Received: strides=\(1, 2\)"):
        side.FactorizedSeparableConv2D(4, 3, 1, 2, strides=(1, 2))
