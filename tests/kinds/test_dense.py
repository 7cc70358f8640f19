"""Dense layers; also in test_contract.py and test_forms.py."""

from __future__ import annotations

import pytest
from kind_contract import EveryKind, name

CASES = [
    ("Dense", {"units": 6}, (4,)),
    ("Dense", {"units": 6, "activation": "tanh", "use_bias": False}, (5, 4)),
]


@pytest.mark.parametrize("case", CASES, ids=name)
class TestDense(EveryKind):
    pass
