"""Plans: their files, and the budget that keeps a promise."""

from __future__ import annotations

import json

import numpy as np
import pytest

from keras_alds import CompressionPlan, select
from keras_alds.resources import allowed_after, removed_fraction


def other_scheme(plan):
    data = plan.to_dict()
    for choice in data["choices"]:
        choice["scheme"] = 4
    return data


def test_plan_files(small, tmp_path):
    path = tmp_path / "plan.json"
    for text, message in (
        ("{", "not JSON"),
        ("[]", "Expected the JSON of a keras_alds compression plan"),
        ('{"format": "keras_alds.CompressionPlan", "version": 99}', "of version 2"),
        ('{"format": "keras_alds.CompressionPlan", "version": 2}', "other fields"),
        (json.dumps(other_scheme(select(small, 0.4))), "the fold schemes of a plan"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            CompressionPlan.load(path)


@pytest.mark.parametrize("before", [1, 7, 1000, 271_098, 10**12 + 7])
def test_the_budget_is_the_largest_that_keeps_the_promise(before):
    for cr in np.random.default_rng(0).uniform(1e-3, 1 - 1e-3, 200):
        after = allowed_after(before, cr)
        assert removed_fraction(before, after) >= cr
        assert removed_fraction(before, after + 1) < cr
