"""Several budgets at once, against every selection."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keras_alds.core.choices import choice_table, offered_ranks
from keras_alds.core.costs import WeightCosts
from keras_alds.core.solvers import InfeasibleBudget, min_max, min_sum
from keras_alds.core.spectra import spectra
from keras_alds.methods import METHODS, get_method

SHAPES = [(6, 6), (3, 4, 4), (8, 5), (2, 2, 4, 4), (3, 6)]


def tables_of(shapes, units, seed, method="energy"):
    rng = np.random.default_rng(seed)
    method = get_method(method)
    return [
        choice_table(
            spectra(rng.standard_normal(shape)),
            offered_ranks(shape, near_slices=method.near_slices),
            [WeightCosts(((0, shape, each),), each) for each in (1, unit)],
            error_measure=method.error_measure,
        )
        for shape, unit in zip(shapes, units, strict=True)
    ]


@st.composite
def problems(draw, max_layers=4):
    """Layers, what a weight of each costs of the second budget, and two budgets in reach."""
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=max_layers))
    units = [draw(st.integers(0, 9)) for _ in shapes]
    return shapes, draw(st.integers(0, 2**16)), units, draw(st.floats(0, 1)), draw(st.floats(0, 1))


def budgets_of(tables, *shares):
    least = sum(table.cost.min(axis=0) for table in tables)
    most = sum(table.cost.max(axis=0) for table in tables)
    return tuple(int(a + round(s * (b - a))) for a, b, s in zip(least, most, shares, strict=True))


def every_selection(tables, budgets):
    """Errors of every selection of front rows within both budgets."""
    for picks in itertools.product(*(table.front_rows() for table in tables)):
        total = sum(table.cost[i] for table, i in zip(tables, picks, strict=True))
        if (total <= budgets).all():
            yield [float(t.error[i]) for t, i in zip(tables, picks, strict=True)]


@settings(max_examples=60, deadline=None)
@given(problems(max_layers=3))
def test_min_max_is_exact(problem):
    shapes, seed, units, *shares = problem
    tables = tables_of(shapes, units, seed)
    budgets = budgets_of(tables, *shares)
    solution = min_max(tables, budgets)
    total = sum(table.cost[i] for table, i in zip(tables, solution.indices, strict=True))
    assert solution.total_cost == tuple(total)
    assert (total <= budgets).all()
    best = min(max(errors) for errors in every_selection(tables, np.array(budgets)))
    assert solution.lower_bound == best
    assert solution.max_error <= best


@settings(max_examples=60, deadline=None)
@given(problems(max_layers=3))
@example(([(6, 6), (3, 4, 4), (6, 6)], 0, [0, 1, 1], 0.25, 0.0))  # one budget leaves no choice
def test_min_sum_is_between_its_bound_and_one_step_above_each_budget(problem):
    shapes, seed, units, *shares = problem
    tables = tables_of(shapes, units, seed)
    budgets = budgets_of(tables, *shares)
    solution = min_sum(tables, budgets)
    total = sum(table.cost[i] for table, i in zip(tables, solution.indices, strict=True))
    assert solution.total_cost == tuple(total)
    assert (total <= budgets).all()
    best = min(sum(errors) for errors in every_selection(tables, np.array(budgets)))
    assert solution.lower_bound <= best + 1e-9
    assert solution.sum_error >= best - 1e-9
    # Two budgets leave at most one layer between two hull choices each.
    steps = sorted((float(t.error.max()) for t in tables), reverse=True)[:2]
    assert solution.sum_error <= solution.lower_bound + sum(steps) + 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_min_sum_of_many_layers_is_near_its_bound(seed):
    rng = np.random.default_rng(seed)
    shapes = [SHAPES[i] for i in rng.integers(0, len(SHAPES), 40)]
    tables = tables_of(shapes, rng.integers(1, 200, 40).tolist(), seed)
    for shares in itertools.product((0.2, 0.5, 0.8), repeat=2):
        solution = min_sum(tables, budgets_of(tables, *shares))
        assert solution.lower_bound - 1e-9 <= solution.sum_error <= 1.06 * solution.lower_bound


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(METHODS)), problems())
def test_no_method_exceeds_either_budget(name, problem):
    shapes, seed, units, *shares = problem
    method = get_method(name)
    tables = tables_of(shapes, units, seed, name)
    budgets = budgets_of(tables, *shares)
    solution = method.solve(tables, budgets)
    rows = [table[i] for table, i in zip(tables, solution.indices, strict=True)]
    used = sum(unit * row.weights for unit, row in zip(units, rows, strict=True))
    assert solution.total_cost == (sum(row.weights for row in rows), used)
    assert (np.array(solution.total_cost) <= budgets).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", METHODS)
def test_a_loose_second_budget_changes_nothing(name, seed):
    method = get_method(name)
    tables = tables_of(SHAPES, [3, 1, 4, 1, 5], seed, name)
    alone = [dataclasses.replace(table, cost=table.cost[:, :1]) for table in tables]
    for share in (0.2, 0.4, 0.6, 0.8):
        first, _ = budgets_of(tables, share, 1)
        one, both = method.solve(alone, [first]), method.solve(tables, [first, 10**9])
        assert one.indices == both.indices


@pytest.mark.parametrize("seed", range(6))
def test_three_budgets(seed):
    rng = np.random.default_rng(seed)
    shapes = [SHAPES[i] for i in rng.integers(0, len(SHAPES), 4)]
    tables = [
        dataclasses.replace(table, cost=table.cost[:, :1] * [1, *rng.integers(1, 9, 2)])
        for table in tables_of(shapes, [1] * 4, seed)
    ]
    for shares in itertools.product((0.3, 0.6), repeat=3):
        budgets = np.array(budgets_of(tables, *shares))
        sums, maxima = [], []
        for errors in every_selection(tables, budgets):
            sums.append(sum(errors))
            maxima.append(max(errors))
        exact, near = min_max(tables, budgets), min_sum(tables, budgets)
        assert exact.lower_bound == min(maxima)
        assert near.lower_bound - 1e-9 <= min(sums) <= near.sum_error + 1e-9
        # Three budgets leave at most two layers between two hull choices each.
        steps = sorted((float(t.error.max()) for t in tables), reverse=True)[:3]
        assert near.sum_error <= near.lower_bound + sum(steps) + 1e-9
        for solution in (exact, near):
            assert (np.array(solution.total_cost) <= budgets).all()


def test_three_budgets_of_many_layers_are_near_their_bound():
    rng = np.random.default_rng(0)
    shapes = [SHAPES[i] for i in rng.integers(0, len(SHAPES), 40)]
    tables = [
        dataclasses.replace(table, cost=table.cost[:, :1] * [1, *rng.integers(1, 200, 2)])
        for table in tables_of(shapes, [1] * 40, 0)
    ]
    for shares in itertools.product((0.2, 0.5, 0.8), repeat=3):
        solution = min_sum(tables, budgets_of(tables, *shares))
        assert solution.lower_bound - 1e-9 <= solution.sum_error <= 1.08 * solution.lower_bound


def test_errors_say_which_budget():
    tables = tables_of(SHAPES[:2], [2, 7], 0)
    least = sum(table.cost.min(axis=0) for table in tables)
    for solver in (min_max, min_sum):
        for index in (0, 1):
            budgets = [10**6, 10**6]
            budgets[index] = int(least[index]) - 1
            with pytest.raises(InfeasibleBudget) as info:
                solver(tables, budgets)
            assert (info.value.resource, info.value.required) == (index, int(least[index]))
    turned = dataclasses.replace(tables[1], cost=tables[1].cost * [1, -1])
    with pytest.raises(ValueError, match=r"choices alike.*layer 1 costs of two choices \["):
        min_max([tables[0], turned], [10**6, 10**6])
    with pytest.raises(ValueError, match=r"layer 0 costs of shape \(\d+, 2\) for 1 budgets"):
        min_max(tables, [10**6])
    assert min_max([], [1, 1]).indices == ()
    assert min_sum([], [1, 1]).indices == ()
