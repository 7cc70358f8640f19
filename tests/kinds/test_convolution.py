"""Convolutions; those over one and two axes also in test_contract.py and test_forms.py."""

from __future__ import annotations

import pytest
from kind_contract import EveryKind, InAModel, name

CASES = [
    ("Conv1D", {"filters": 6, "kernel_size": 3, "padding": "causal", "dilation_rate": 2}, (9, 4)),
    ("Conv2D", {"filters": 6, "kernel_size": (3, 2), "strides": 2, "padding": "same"}, (7, 6, 4)),
    ("Conv3D", {"filters": 6, "kernel_size": 2}, (4, 5, 3, 4)),
    ("Conv3D", {"filters": 6, "kernel_size": (1, 2, 3), "strides": (1, 2, 1)}, (4, 5, 3, 4)),
    ("Conv3D", {"filters": 6, "kernel_size": 2, "dilation_rate": 2}, (4, 5, 3, 4)),
    ("Conv3D", {"filters": 6, "kernel_size": 3, "padding": "same", "strides": 2}, (4, 5, 3, 4)),
    ("Conv3D", {"filters": 6, "kernel_size": 2, "data_format": "channels_first"}, (4, 4, 5, 3)),
]
# In a form that compresses well; Conv1D and Conv2D are in all other tests.
MODELS = [
    ("Conv3D", {"filters": 16, "kernel_size": 3}, (5, 5, 5, 8)),
]


@pytest.mark.parametrize("case", CASES, ids=name)
class TestConvolution(EveryKind):
    pass


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case[0])
class TestConvolutionInAModel(InAModel):
    pass
