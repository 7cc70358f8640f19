"""Sampled costs: interpolation, sums over calls, tables of choices and the solvers on them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_alds.core.choices import choice_table
from keras_alds.core.costs import DENSE, NEVER, SampledCosts, sum_costs
from keras_alds.core.solvers import InfeasibleBudget
from keras_alds.core.spectra import spectra
from keras_alds.methods import get_method

RANKS = st.dictionaries(st.integers(1, 60), st.integers(0, 10**9), min_size=1, max_size=8)


@given(RANKS, st.integers(0, 10**9))
def test_interpolation_is_exact_at_samples_and_between_its_neighbours(row: Any, dense: int):
    costs = SampledCosts.of_points({DENSE: dense, **{(2, j, 0): cost for j, cost in row.items()}})
    known = sorted(row)
    assert costs.of(2, known).tolist() == [row[j] for j in known]
    for j, cost in zip(range(1, 62), costs.of(2, range(1, 62)).tolist(), strict=True):
        if j > known[-1]:
            assert cost == NEVER
        elif j < known[0]:
            assert cost == row[known[0]]
        else:
            around = [row[max(i for i in known if i <= j)], row[min(i for i in known if i >= j)]]
            assert min(around) <= cost <= max(around)
    assert set(costs.of(3, known)) == {NEVER}
    assert SampledCosts.of_points(costs.points) == costs
    assert set(costs.of(2, known, scheme=1)) == {NEVER}


def test_the_sum_over_calls_is_the_sum_at_every_rank():
    first = SampledCosts.of_points(
        {DENSE: 100, (1, 4, 0): 10, (1, 20, 0): 90, (2, 4, 0): 7, (1, 4, 3): 20, (1, 8, 1): 5}
    )
    second = SampledCosts.of_points(
        {DENSE: 50, (1, 2, 0): 1, (1, 9, 0): 8, (1, 16, 0): 44, (1, 6, 3): 9}
    )
    both = sum_costs([(3, first), (1, second)])
    assert both.dense == 350
    ranks = np.arange(2, 17)
    exact = 3 * first.of(1, ranks) + second.of(1, ranks)
    assert np.abs(both.of(1, ranks) - exact).max() <= 3  # each of the calls is rounded up
    assert both.of(1, [17])[0] == both.of(2, [4])[0] == both.of(1, [4], 1)[0] == NEVER
    assert both.of(1, [4], 3)[0] == 3 * 20 + 9
    with pytest.raises(ValueError, match="at least one call"):
        sum_costs([])


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=7), st.integers(1, 300))
def test_smoothed_costs_never_fall_and_are_the_nearest(row: list[int], step: int):
    points = {(1, j, 2): cost for j, cost in enumerate(row, 1)}
    costs = SampledCosts.of_points({DENSE: 900, **points})
    smooth = list(costs.smoothed().points.values())[1:]
    # The least squares solution in closed form: the largest least mean of a run around each.
    n = len(row)
    for i, value in enumerate(smooth):
        exact = max(min(np.mean(row[a : b + 1]) for b in range(i, n)) for a in range(i + 1))
        assert abs(value - exact) <= 0.5
    assert smooth == sorted(smooth)
    if row == sorted(row):
        assert costs.smoothed() == costs
    # In steps below the dense layer, never less than measured.
    ranks = range(1, n + 1)
    stepped, fine = costs.smoothed(step).of(1, ranks, 2), costs.smoothed().of(1, ranks, 2)
    assert not ((900 - stepped) % step).any()
    assert ((fine <= stepped) & (stepped < fine + step)).all()


def test_of_costs_that_differ_by_noise_the_smaller_error_is_taken():
    kernel = np.diag([9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0])
    points = {DENSE: 100, (1, 1, 0): 51, (1, 2, 0): 52, (1, 3, 0): 55}
    costs = SampledCosts.of_points(points)
    for step, rank in ((1, 1), (10, 3)):
        table = choice_table(spectra(kernel), costs=[costs.smoothed(step)])
        assert table.front()[0].rank == rank


@pytest.mark.parametrize(
    "samples",
    [
        ((0, 1, (4, 2), (1, 2)),),
        ((0, 1, (2,), (1, 2)),),
        ((0, 1, (), ()),),
        ((0, 1, (2,), (-1,)),),
        ((1, 1, (2,), (1,)), (0, 1, (2,), (1,))),
    ],
)
def test_bad_samples_are_refused(samples: Any):
    with pytest.raises(ValueError, match="ascending schemes, slices and ranks"):
        SampledCosts(5, samples)
    with pytest.raises(ValueError, match="ascending schemes, slices and ranks"):
        SampledCosts(5, (), step=0)
    with pytest.raises(ValueError, match="cost of the dense layer"):
        SampledCosts.of_points({(1, 2, 0): 3})


def random_costs(rng: np.random.Generator, kernel: np.ndarray) -> SampledCosts:
    """Latencies without order: some choices are slower than the dense kernel, some ranks faster."""
    points = {DENSE: 60}
    for k in (1, 2, 3):
        points.update(((k, j, 0), int(rng.integers(5, 90))) for j in (1, 2, 3))
    return SampledCosts.of_points(points)


def test_table_holds_only_what_is_faster_and_smaller():
    rng = np.random.default_rng(1)
    kernel = rng.normal(size=(6, 6))
    costs = random_costs(rng, kernel)
    table = choice_table(spectra(kernel), costs=[costs])
    whole = choice_table(spectra(kernel))
    offered = {(row.slices, row.rank): row for row in whole}
    rows = {(row.slices, row.rank): row for row in table}
    expected = {
        choice
        for choice in offered
        if choice == (0, 0) or costs.of(choice[0], [choice[1]])[0] < costs.dense
    }
    assert set(rows) == expected
    assert 1 < len(rows) < len(offered)
    for choice, row in rows.items():
        assert row.cost == (costs.points.get((*choice, 0), *row.cost),)
        assert (row.error, row.weights) == (offered[choice].error, offered[choice].weights)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["alds", "energy"])
def test_solvers_against_brute_force(seed: int, name: str):
    rng = np.random.default_rng(seed)
    method = get_method(name)
    tables = []
    for _ in range(3):
        kernel = rng.normal(size=(6, 6))
        costs = random_costs(rng, kernel)
        tables.append(
            choice_table(spectra(kernel), error_measure=method.error_measure, costs=[costs])
        )
    everything = [
        (sum(row.cost[0] for row in rows), [row.error for row in rows])
        for rows in itertools.product(*tables)
    ]
    measure = max if name == "alds" else sum
    for budget in (40, 80, 120, 180):
        within = [measure(errors) for cost, errors in everything if cost <= budget]
        if not within:
            with pytest.raises(InfeasibleBudget):
                method.solve(tables, [budget])
            continue
        solution = method.solve(tables, [budget])
        chosen = [t[i] for t, i in zip(tables, solution.indices, strict=True)]
        assert sum(row.cost[0] for row in chosen) == solution.total_cost[0] <= budget
        assert all(row.keep or row.cost < (60,) for row in chosen)
        value = measure(row.error for row in chosen)
        if name == "alds":
            assert value == min(within)
        else:  # three layers: exact but for triple exchanges
            assert min(within) <= value <= 1.1 * min(within) + 1e-12
