"""Transposed convolutions."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from kind_contract import EveryKind, InAModel, model_of, name

import keras_alds
from keras_alds import select

CASES = [
    ("Conv1DTranspose", {"filters": 6, "kernel_size": 3, "strides": 2}, (5, 4)),
    ("Conv1DTranspose", {"filters": 6, "kernel_size": 3, "dilation_rate": 2}, (5, 4)),
    ("Conv2DTranspose", {"filters": 6, "kernel_size": 3}, (5, 4, 4)),
    ("Conv2DTranspose", {"filters": 6, "kernel_size": (2, 3), "strides": (3, 2)}, (5, 4, 4)),
    (
        "Conv2DTranspose",
        {"filters": 6, "kernel_size": 3, "strides": 2, "padding": "same", "output_padding": 1},
        (5, 4, 4),
    ),
    (
        "Conv2DTranspose",
        {"filters": 6, "kernel_size": 4, "strides": 2, "padding": "same", "activation": "tanh"},
        (5, 4, 4),
    ),
    (
        "Conv2DTranspose",
        {"filters": 6, "kernel_size": 2, "strides": 3, "output_padding": (2, 1)},
        (5, 4, 4),
    ),
    ("Conv2DTranspose", {"filters": 6, "kernel_size": 3, "dilation_rate": 2}, (5, 4, 4)),
    (
        "Conv2DTranspose",
        {"filters": 6, "kernel_size": 2, "padding": "same", "dilation_rate": 2},
        (5, 4, 4),
    ),
    (
        "Conv2DTranspose",
        {"filters": 6, "kernel_size": 3, "strides": 2, "data_format": "channels_first"},
        (4, 5, 4),
    ),
    ("Conv3DTranspose", {"filters": 6, "kernel_size": 2, "strides": 2}, (3, 4, 2, 4)),
    ("Conv3DTranspose", {"filters": 6, "kernel_size": 2, "padding": "same"}, (3, 4, 2, 4)),
]
# In a form that compresses well.
MODELS = [
    ("Conv1DTranspose", {"filters": 16, "kernel_size": 3, "strides": 2}, (5, 16)),
    ("Conv2DTranspose", {"filters": 16, "kernel_size": 3, "strides": 2}, (5, 4, 16)),
    ("Conv3DTranspose", {"filters": 8, "kernel_size": 2, "strides": 2}, (3, 2, 3, 16)),
]


@pytest.mark.parametrize("case", CASES, ids=name)
class TestTransposed(EveryKind):
    pass


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case[0])
class TestTransposedInAModel(InAModel):
    pass


def test_pca_needs_a_bias_for_every_column(keras_module):
    K = keras_module
    model = model_of(K, MODELS[1])
    x = np.random.default_rng(0).standard_normal((32, 5, 4, 16)).astype("f")
    with pytest.raises(ValueError, match="not reachable"):
        select(model, 0.3, method="pca", calibration_data=x)
    model = K.Sequential([model, K.layers.Dense(64), K.layers.Dense(64)])
    model.build((None, 5, 4, 16))
    plan = select(model, 0.2, method="pca", calibration_data=x)
    (reason,) = {c.reason for c in plan.choices if c.kind == "Conv2DTranspose"}
    assert "needs a bias for every column" in reason


@pytest.mark.both
def test_bad_output_padding(keras_module):
    side = keras_alds.layers if keras_module is keras else keras_alds.tf_keras
    with pytest.raises(ValueError, match=r"Received: output_padding=2, strides=\(2, 2\)"):
        side.FactorizedConv2DTranspose(4, 3, 1, 2, strides=2, output_padding=2)
