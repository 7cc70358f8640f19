"""Cost that moves between the layers of a plan."""

from __future__ import annotations

import itertools

import keras
import numpy as np
import pytest

from keras_alds.choosing import calibrated, checked_options, selection_of
from keras_alds.kinds.base import kernel_values
from keras_alds.models.exchange import CostExchange
from keras_alds.models.inventory import Inventory
from keras_alds.models.trials import approximations

ROWS = np.random.default_rng(0).standard_normal((256, 24)).astype("float32")


class Outputs:
    """Adds up the relative squared errors of kernels, each with a weight, and runs no model."""

    def __init__(self, weights):
        self._weights = weights

    def discrepancy(self, kernels):
        total = 0.0
        for layer, kernel in kernels.items():
            own = kernel_values(layer)
            error = np.square(kernel - own).sum() / np.square(own).sum()
            total += self._weights[layer.name] * error
        return float(total)


def problem(K, layers):
    """The selection problem of a small net, its tables, and the rows for equal weights."""
    keras.utils.set_random_seed(0)
    stack = [K.layers.Dense(24, name=name) for name in layers[:-1]]
    net = K.Sequential([K.Input((24,)), *stack, K.layers.Dense(20, name=layers[-1])])
    given = {"target": "size", "max_slices": 1}
    options = checked_options(0.4, given, has_data=True, caller="select")
    selection, _ = calibrated(selection_of(Inventory.of(net), options), ROWS, verbose=0)
    tables = selection.tables()
    return selection, tables, selection.solve(tables).indices


def kernels_of(selection, tables, rows):
    chosen = [table[row] for table, row in zip(tables, rows, strict=True)]
    return approximations(selection.inventory.candidates, chosen)


def cost_of(tables, rows):
    return sum(int(table.cost[row, 0]) for table, row in zip(tables, rows, strict=True))


def improved(selection, tables, rows, probing, judging):
    exchange = CostExchange(selection, tables, "equal", probing, judging)
    new, kernels = exchange.improved(rows, kernels_of(selection, tables, rows))
    expected = kernels_of(selection, tables, new)
    assert kernels.keys() == expected.keys()
    for layer, kernel in kernels.items():
        np.testing.assert_array_equal(kernel, expected[layer])
    assert cost_of(tables, new) <= selection.budget_of(selection.resources[0])
    return new, kernels


def test_a_layer_with_more_effect_than_expected_gets_more(keras_module):
    selection, tables, rows = problem(keras_module, ["first", "second", "third", "head"])
    outputs = Outputs({"first": 1.0, "second": 1.0, "third": 20.0, "head": 1.0})
    new, kernels = improved(selection, tables, rows, outputs, outputs)
    before = kernels_of(selection, tables, rows)
    assert outputs.discrepancy(kernels) < 0.8 * outputs.discrepancy(before)
    assert tables[2].cost[new[2], 0] > tables[2].cost[rows[2], 0]


def test_nearly_as_good_as_brute_force(keras_module):
    selection, tables, rows = problem(keras_module, ["first", "head"])
    outputs = Outputs({"first": 3.0, "head": 1.0})
    _, kernels = improved(selection, tables, rows, outputs, outputs)
    budget = selection.budget_of(selection.resources[0])
    fronts = [table.front_rows() for table in tables]
    pairs = [pair for pair in itertools.product(*fronts) if cost_of(tables, pair) <= budget]
    least = min(outputs.discrepancy(kernels_of(selection, tables, pair)) for pair in pairs)
    assert outputs.discrepancy(kernels) <= 1.05 * least
    assert outputs.discrepancy(kernels) < outputs.discrepancy(kernels_of(selection, tables, rows))


@pytest.mark.parametrize("first", [0.01, 1.0, 20.0])
def test_what_is_worse_for_whole_plans_is_not_taken(keras_module, first):
    selection, tables, rows = problem(keras_module, ["first", "second", "head"])
    probing = Outputs({"first": 20.0, "second": 1.0, "head": 1.0})
    judging = Outputs({"first": first, "second": 1.0, "head": 1.0})
    new, kernels = improved(selection, tables, rows, probing, judging)
    before = judging.discrepancy(kernels_of(selection, tables, rows))
    assert new == rows or judging.discrepancy(kernels) < before


def test_outputs_that_are_not_finite_end_nothing(keras_module):
    selection, tables, rows = problem(keras_module, ["first", "second", "head"])
    infinite = Outputs({"first": np.inf, "second": 1.0, "head": 1.0})
    assert improved(selection, tables, rows, infinite, infinite)[0] == rows
