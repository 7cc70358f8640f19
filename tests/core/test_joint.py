"""Two budgets at once, against every selection."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_alds.core.choices import choice_table
from keras_alds.core.joint import joint_min_max, joint_min_sum
from keras_alds.methods import METHODS, get_method
from keras_alds.core.solvers import InfeasibleBudget, min_max, min_sum
from keras_alds.core.spectra import spectra

SHAPES = [(6, 6), (3, 4, 4), (8, 5), (2, 2, 4, 4), (3, 6)]


def tables_of(shapes, seed, method="energy"):
    rng = np.random.default_rng(seed)
    method = get_method(method)
    return [
        choice_table(
            spectra(rng.standard_normal(shape)), error=method.error, near_slices=method.near_slices
        )
        for shape in shapes
    ]


@st.composite
def problems(draw, max_layers=4):
    """Layers, what a weight of each costs of the second budget, and two budgets in reach."""
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=max_layers))
    units = [draw(st.integers(0, 9)) for _ in shapes]
    return shapes, draw(st.integers(0, 2**16)), units, draw(st.floats(0, 1)), draw(st.floats(0, 1))


def costs_of(tables, units):
    return [np.stack([t.cost, u * t.weights], axis=1) for t, u in zip(tables, units, strict=True)]


def budgets_of(costs, *shares):
    least = sum(cost.min(axis=0) for cost in costs)
    most = sum(cost.max(axis=0) for cost in costs)
    return tuple(int(a + round(s * (b - a))) for a, b, s in zip(least, most, shares, strict=True))


def every_selection(tables, costs, budgets):
    """Errors of every selection of front rows within both budgets."""
    rows = [np.flatnonzero(np.isin(t.cost, t.front().cost)) for t in tables]
    for picks in itertools.product(*rows):
        total = sum(cost[i] for cost, i in zip(costs, picks, strict=True))
        if (total <= budgets).all():
            yield [float(t.error[i]) for t, i in zip(tables, picks, strict=True)]


@settings(max_examples=60, deadline=None)
@given(problems(max_layers=3))
def test_min_max_is_exact(problem):
    shapes, seed, units, *shares = problem
    tables = tables_of(shapes, seed)
    costs = costs_of(tables, units)
    budgets = budgets_of(costs, *shares)
    solution = joint_min_max(tables, costs, budgets)
    total = sum(cost[i] for cost, i in zip(costs, solution.indices, strict=True))
    assert (total <= budgets).all()
    best = min(max(errors) for errors in every_selection(tables, costs, np.array(budgets)))
    assert solution.lower_bound == best
    assert solution.max_error <= best


@settings(max_examples=60, deadline=None)
@given(problems(max_layers=3))
def test_min_sum_is_between_its_bound_and_one_step_above_each_budget(problem):
    shapes, seed, units, *shares = problem
    tables = tables_of(shapes, seed)
    costs = costs_of(tables, units)
    budgets = budgets_of(costs, *shares)
    solution = joint_min_sum(tables, costs, budgets)
    total = sum(cost[i] for cost, i in zip(costs, solution.indices, strict=True))
    assert (total <= budgets).all()
    best = min(sum(errors) for errors in every_selection(tables, costs, np.array(budgets)))
    assert solution.lower_bound <= best + 1e-9
    assert solution.sum_error >= best - 1e-9
    # Two budgets leave at most one layer between two hull choices each.
    steps = sorted((float(t.error.max()) for t in tables), reverse=True)[:2]
    assert solution.sum_error <= solution.lower_bound + sum(steps) + 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_min_sum_of_many_layers_is_near_its_bound(seed):
    rng = np.random.default_rng(seed)
    shapes = [SHAPES[i] for i in rng.integers(0, len(SHAPES), 40)]
    tables = tables_of(shapes, seed)
    costs = costs_of(tables, rng.integers(1, 200, 40).tolist())
    for shares in itertools.product((0.2, 0.5, 0.8), repeat=2):
        solution = joint_min_sum(tables, costs, budgets_of(costs, *shares))
        assert solution.lower_bound - 1e-9 <= solution.sum_error <= 1.06 * solution.lower_bound


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(METHODS)), problems())
def test_no_method_exceeds_either_budget(name, problem):
    shapes, seed, units, *shares = problem
    method = get_method(name)
    tables = tables_of(shapes, seed, name)
    costs = costs_of(tables, units)
    budgets = budgets_of(costs, *shares)
    candidates, solution = method.solve_joint(tables, units, budgets)
    rows = [table[i] for table, i in zip(candidates, solution.indices, strict=True)]
    assert sum(row.cost for row in rows) == solution.total_cost <= budgets[0]
    used = sum(unit * row.weights for unit, row in zip(units, rows, strict=True))
    assert used <= budgets[1]


@pytest.mark.parametrize("name", METHODS)
def test_a_loose_second_budget_changes_nothing(name):
    method = get_method(name)
    tables = tables_of(SHAPES, 3, name)
    units = [3, 1, 4, 1, 5]
    first, _ = budgets_of(costs_of(tables, units), 0.4, 1)
    one, alone = method.solve(tables, first)
    both, joint = method.solve_joint(tables, units, (first, 10**9))
    errors = [
        [t.error[i] for t, i in zip(c, s.indices, strict=True)]
        for c, s in ((one, alone), (both, joint))
    ]
    # Sums of pairs are exchanged with one budget only.
    assert sum(errors[1]) <= 1.02 * sum(errors[0])
    if method.solver not in (min_sum, min_max):
        assert errors[0] == errors[1]


def test_errors_say_which_budget():
    tables = tables_of(SHAPES[:2], 0)
    costs = costs_of(tables, [2, 7])
    least = sum(cost.min(axis=0) for cost in costs)
    for solver in (joint_min_max, joint_min_sum):
        for index in (0, 1):
            budgets = [10**6, 10**6]
            budgets[index] = int(least[index]) - 1
            with pytest.raises(InfeasibleBudget) as info:
                solver(tables, costs, budgets)
            assert (info.value.resource, info.value.required) == (index, int(least[index]))
    with pytest.raises(ValueError, match=r"order the choices of a layer alike.*layer 1"):
        joint_min_max(tables, [costs[0], costs[1] * [1, -1]], [10**6, 10**6])
    assert joint_min_max([], [], [1, 1]).indices == ()
    assert joint_min_sum([], [], [1, 1]).indices == ()
