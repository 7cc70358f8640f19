import itertools
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_alds.core.choices import choice_table
from keras_alds.methods import METHODS, get_method
from keras_alds.core.solvers import (
    InfeasibleBudget,
    cheapest,
    lower_hull,
    min_max,
    min_max_ranks,
    min_sum,
    total_at,
)
from keras_alds.core.spectra import spectra


def front(cost, error):
    return SimpleNamespace(cost=np.array(cost, np.int64), error=np.array(error, float))


@st.composite
def instances(draw, max_layers=4, max_choices=5):
    """Small fronts with errors that differ everywhere, save the last 0 of some layers."""
    sizes = draw(st.lists(st.integers(1, max_choices), min_size=1, max_size=max_layers))
    pool = draw(st.permutations(range(1, sum(sizes) + 1)))
    fronts = []
    for size in sizes:
        cost = sorted(draw(st.sets(st.integers(1, 40), min_size=size, max_size=size)))
        error = sorted((pool.pop() for _ in range(size)), reverse=True)
        if draw(st.booleans()):
            error[-1] = 0
        fronts.append(front(cost, np.array(error) / 7))
    return fronts


def every_selection(fronts, budget):
    for picks in itertools.product(*(range(f.cost.size) for f in fronts)):
        cost = sum(int(f.cost[i]) for f, i in zip(fronts, picks, strict=True))
        if cost <= budget:
            yield picks, [float(f.error[i]) for f, i in zip(fronts, picks, strict=True)]


def reachable(fronts):
    return st.integers(cheapest(fronts), sum(int(f.cost[-1]) for f in fronts) + 2)


def check_totals(fronts, solution, budget):
    errors = [f.error[i] for f, i in zip(fronts, solution.indices, strict=True)]
    cost = sum(int(f.cost[i]) for f, i in zip(fronts, solution.indices, strict=True))
    assert solution.total_cost == cost <= budget
    assert solution.max_error == max(errors)
    assert solution.sum_error == pytest.approx(sum(errors))


@settings(max_examples=300, deadline=None)
@given(instances(), st.data())
def test_min_max_equals_brute_force_in_lexicographic_order(fronts, data):
    budget = data.draw(reachable(fronts))
    solution = min_max(fronts, budget)
    check_totals(fronts, solution, budget)
    best = min(sorted(errors, reverse=True) for _, errors in every_selection(fronts, budget))
    found = [f.error[i] for f, i in zip(fronts, solution.indices, strict=True)]
    assert sorted(found, reverse=True) == best
    assert solution.lower_bound == solution.max_error
    if solution.certificate is None:
        assert solution.max_error == min(f.error.min() for f in fronts)
    else:
        threshold, required = solution.certificate
        assert threshold < solution.max_error
        assert required > budget
        # No error of any front lies between.
        every = np.concatenate([f.error for f in fronts])
        assert not ((every > threshold) & (every < solution.max_error)).any()


@settings(max_examples=300, deadline=None)
@given(instances(), st.data())
def test_min_sum_is_within_one_step_of_its_bound(fronts, data):
    budget = data.draw(reachable(fronts))
    solution = min_sum(fronts, budget)
    check_totals(fronts, solution, budget)
    best = min(sum(errors) for _, errors in every_selection(fronts, budget))
    assert solution.lower_bound <= best + 1e-9
    assert solution.sum_error >= best - 1e-9
    steps = [0.0]
    for f in fronts:
        steps += (-np.diff(f.error[lower_hull(f.cost, f.error)])).tolist()
    assert solution.sum_error <= solution.lower_bound + max(steps) + 1e-9
    if len(fronts) <= 2:
        # Exchanges between pairs reach everything, up to the gap at which they stop.
        assert solution.sum_error <= best + 1e-3 * best + 1e-9


@settings(max_examples=200, deadline=None)
@given(instances(max_layers=5), st.data())
def test_min_sum_is_exact_where_the_hull_fits(fronts, data):
    """Budgets at which a whole number of hull steps is affordable."""
    steps = []
    for n, f in enumerate(fronts):
        hull = lower_hull(f.cost, f.error)
        for a, b in itertools.pairwise(hull):
            rate = (f.error[a] - f.error[b]) / (f.cost[b] - f.cost[a])
            steps.append((-rate, n, int(f.cost[b] - f.cost[a])))
    steps.sort()
    count = data.draw(st.integers(0, len(steps)))
    budget = cheapest(fronts) + sum(step for _, _, step in steps[:count])
    solution = min_sum(fronts, budget)
    best = min(sum(errors) for _, errors in every_selection(fronts, budget))
    assert solution.sum_error == pytest.approx(best, abs=1e-9)
    assert solution.lower_bound == pytest.approx(best, abs=1e-9)


def random_fronts(seed, layers):
    rng = np.random.default_rng(seed)
    fronts = []
    for _ in range(layers):
        size = int(rng.integers(1, 800))
        cost = np.sort(rng.choice(10**6, size, replace=False)) + 1
        error = np.sort(rng.random(size))[::-1]
        error[-1] = 0.0
        fronts.append(front(cost, error))
    return fronts


@pytest.mark.parametrize("seed", range(6))
def test_large_instances(seed):
    fronts = random_fronts(seed, 40)
    low, high = cheapest(fronts), sum(int(f.cost[-1]) for f in fronts)
    for share in (0.0, 0.01, 0.2, 0.5, 0.9, 1.0):
        budget = int(low + share * (high - low))
        largest = min_max(fronts, budget)
        check_totals(fronts, largest, budget)
        if largest.certificate is not None:
            threshold, required = largest.certificate
            assert total_at(fronts, threshold) == required > budget
            assert total_at(fronts, largest.max_error) <= budget
        # No single step fits into what is left.
        left = budget - largest.total_cost
        for f, i in zip(fronts, largest.indices, strict=True):
            assert i + 1 == f.cost.size or f.cost[i + 1] - f.cost[i] > left
        least = min_sum(fronts, budget)
        check_totals(fronts, least, budget)
        assert least.lower_bound - 1e-9 <= least.sum_error <= largest.sum_error + 1e-9
        assert least.sum_error <= least.lower_bound * 1.02 + 1e-9
        left = budget - least.total_cost
        for f, i in zip(fronts, least.indices, strict=True):
            assert i + 1 == f.cost.size or f.cost[i + 1] - f.cost[i] > left


@pytest.mark.parametrize("solver", [min_max, min_sum])
def test_ties_go_in_the_order_of_the_layers(solver):
    same = [front([1, 2], [0.5, 0.0]) for _ in range(3)]
    assert solver(same, 4).indices == (1, 0, 0)
    assert solver(same, 5).indices == (1, 1, 0)


@pytest.mark.parametrize("solver", [min_max, min_sum])
def test_budgets_at_and_beyond_the_ends(solver):
    fronts = [front([3, 8], [0.4, 0.0]), front([2], [0.0]), front([1, 2, 4], [0.9, 0.3, 0.1])]
    assert solver(fronts, 6).indices == (0, 0, 0)
    assert solver(fronts, 10**12).indices == (1, 0, 2)
    assert solver([], 0).indices == ()
    with pytest.raises(InfeasibleBudget, match=r"at least 6.*Received: budget=5") as info:
        solver(fronts, 5)
    assert (info.value.required, info.value.budget) == (6, 5)
    again = pickle.loads(pickle.dumps(info.value))
    assert (again.required, again.budget) == (6, 5)


def test_total_at_an_unreachable_threshold():
    fronts = [front([1, 2], [0.5, 0.2]), front([1], [0.0])]
    assert total_at(fronts, 0.2) == 3
    assert total_at(fronts, 0.1) == math.inf


@pytest.mark.parametrize("solver", [min_max, min_sum])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (front([], []), "for layer 1"),
        (front([2, 1], [0.5, 0.1]), "strictly ascending"),
        (front([1, 2], [0.5, 0.5]), "strictly descending"),
        (front([1, 2], [np.nan, 0.5]), "finite"),
        (SimpleNamespace(cost=np.array([1.0]), error=np.array([0.5])), "integer costs"),
    ],
)
def test_bad_fronts(solver, bad, message):
    with pytest.raises(ValueError, match=message):
        solver([front([1], [0.5]), bad], 10)


@pytest.mark.parametrize("budget", [1.5, "10", None])
def test_budget_is_an_integer(budget):
    with pytest.raises(ValueError, match="Received: budget="):
        min_max([front([1], [0.5])], budget)


@pytest.mark.parametrize("name", METHODS)
def test_methods_stay_within_every_budget(name):
    method = get_method(name)
    rng = np.random.default_rng(0)
    shapes = [(3, 3, 4, 6), (8, 12), (3, 6, 8)]
    tables = [
        choice_table(
            spectra(rng.standard_normal(shape)), error=method.error, near_slices=method.near_slices
        )
        for shape in shapes
    ]
    least = cheapest([table.front() for table in tables])
    before = math.inf
    for budget in range(least, sum(int(np.prod(shape)) for shape in shapes) + 1):
        candidates, solution = method.solve(tables, budget)
        rows = [c[i] for c, i in zip(candidates, solution.indices, strict=True)]
        assert sum(row.cost for row in rows) == solution.total_cost <= budget
        assert all(row.keep for row in rows if row.error == 0)
        if name == "alds":
            assert solution.max_error <= before
            before = solution.max_error
    assert all(row.keep for row in rows)
    with pytest.raises(InfeasibleBudget):
        method.solve(tables, least - 1)


@given(
    seed=st.integers(0, 2**16),
    shapes=st.lists(
        st.sampled_from([(8, 8), (3, 4, 6), (12, 5), (3, 3, 4, 8), (2, 2, 6, 4)]),
        min_size=1,
        max_size=4,
    ),
    share=st.floats(0, 1),
)
@settings(deadline=None, max_examples=60)
def test_min_max_ranks_is_as_good_as_min_max_and_spends_on_ranks(seed, shapes, share):
    rng = np.random.default_rng(seed)
    tables = [choice_table(spectra(rng.standard_normal(shape))) for shape in shapes]
    fronts = [table.front() for table in tables]
    least, most = cheapest(fronts), sum(int(table.cost.max()) for table in tables)
    budget = least + round(share * (most - least))
    plain, solution = min_max(fronts, budget), min_max_ranks(tables, budget)
    check_totals(tables, solution, budget)
    assert solution.lower_bound == plain.lower_bound
    assert solution.certificate == plain.certificate
    assert solution.max_error <= solution.lower_bound
    optimum = solution.lower_bound
    left = budget - solution.total_cost
    for table, found in zip(tables, fronts, strict=True):
        row = table[solution.indices[tables.index(table)]]
        start = found[int(np.argmax(found.error <= optimum))]
        assert row.keep or row.slices == start.slices
        assert row.keep or row.rank >= start.rank
        more = (table.slices == row.slices) | (table.slices == 0)
        following = table.cost[more & (table.error < row.error)]
        assert following.size == 0 or following.min() - row.cost > left


def test_method_registry():
    assert get_method("alds").error == "slice"
    assert get_method("energy").error == "energy"
    changed = get_method("alds", error="spectral")
    assert (changed.name, changed.error) == ("alds", "spectral")
    assert changed.solver is min_max_ranks
    assert get_method("alds").error == "slice"
    with pytest.raises(ValueError, match=r"'alds', .*'energy', .*Received: method='magic'"):
        get_method("magic")
    with pytest.raises(ValueError, match="Received: error='magic'"):
        get_method("alds", error="magic")
    with pytest.raises(TypeError):
        METHODS["magic"] = get_method("alds")
