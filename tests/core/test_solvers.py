import dataclasses
import itertools
import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from keras_alds.core.choices import ChoiceTable, choice_table, offered_ranks
from keras_alds.core.solvers import InfeasibleBudget, lower_hull, min_max, min_sum
from keras_alds.core.spectra import spectra
from keras_alds.methods import METHODS, get_method


def front(cost, error):
    """A layer of one slice whose ranks have these costs and errors."""
    cost = np.array(cost, np.int64)
    ones = np.ones(cost.size, np.int64)
    rank = np.arange(cost.size) + 1
    return ChoiceTable(
        ones, rank, ones * cost.size, ones * 0, cost, cost[:, None], np.array(error, float)
    )


def cheapest(fronts):
    return sum(int(f.cost.min()) for f in fronts)


def total_at(fronts, threshold):
    return sum(int(f.cost[f.error <= threshold, 0].min()) for f in fronts)


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
    for picks in itertools.product(*(range(len(f)) for f in fronts)):
        cost = sum(int(f.cost[i, 0]) for f, i in zip(fronts, picks, strict=True))
        if cost <= budget:
            yield picks, [float(f.error[i]) for f, i in zip(fronts, picks, strict=True)]


def reachable(fronts):
    return st.integers(cheapest(fronts), sum(int(f.cost.max()) for f in fronts) + 2)


def check_totals(fronts, solution, budget):
    errors = [f.error[i] for f, i in zip(fronts, solution.indices, strict=True)]
    cost = sum(int(f.cost[i, 0]) for f, i in zip(fronts, solution.indices, strict=True))
    assert solution.total_cost == (cost,)
    assert cost <= budget
    assert solution.max_error == max(errors)
    assert solution.sum_error == pytest.approx(sum(errors))


@settings(max_examples=300, deadline=None)
@given(instances(), st.data())
def test_min_max_equals_brute_force_in_lexicographic_order(fronts, data):
    budget = data.draw(reachable(fronts))
    solution = min_max(fronts, [budget])
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
        assert required > (budget,)
        # No error of any front lies between.
        every = np.concatenate([f.error for f in fronts])
        assert not ((every > threshold) & (every < solution.max_error)).any()


@settings(max_examples=300, deadline=None)
@given(instances(), st.data())
def test_min_sum_is_within_one_step_of_its_bound(fronts, data):
    budget = data.draw(reachable(fronts))
    solution = min_sum(fronts, [budget])
    check_totals(fronts, solution, budget)
    best = min(sum(errors) for _, errors in every_selection(fronts, budget))
    assert solution.lower_bound <= best + 1e-9
    assert solution.sum_error >= best - 1e-9
    steps = [0.0]
    for f in fronts:
        steps += (-np.diff(f.error[lower_hull(f.cost[:, 0], f.error)])).tolist()
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
        hull = lower_hull(f.cost[:, 0], f.error)
        for a, b in itertools.pairwise(hull):
            step = int(f.cost[b, 0] - f.cost[a, 0])
            steps.append((-(f.error[a] - f.error[b]) / step, n, step))
    steps.sort()
    count = data.draw(st.integers(0, len(steps)))
    budget = cheapest(fronts) + sum(step for _, _, step in steps[:count])
    solution = min_sum(fronts, [budget])
    best = min(sum(errors) for _, errors in every_selection(fronts, budget))
    assert solution.sum_error == pytest.approx(best, abs=1e-9)
    assert solution.lower_bound == pytest.approx(best, abs=1e-9)


def random_fronts(seed, layers, most=800):
    rng = np.random.default_rng(seed)
    fronts = []
    for _ in range(layers):
        size = int(rng.integers(1, most))
        cost = np.sort(rng.choice(10**6, size, replace=False)) + 1
        error = np.sort(rng.random(size))[::-1]
        error[-1] = 0.0
        fronts.append(front(cost, error))
    return fronts


@pytest.mark.parametrize("seed", range(6))
def test_large_instances(seed):
    fronts = random_fronts(seed, 40)
    low, high = cheapest(fronts), sum(int(f.cost.max()) for f in fronts)
    for share in (0.0, 0.01, 0.2, 0.5, 0.9, 1.0):
        budget = int(low + share * (high - low))
        largest = min_max(fronts, [budget])
        check_totals(fronts, largest, budget)
        if largest.certificate is not None:
            threshold, required = largest.certificate
            reached = all(f.error.min() <= threshold for f in fronts)
            assert required == (total_at(fronts, threshold) if reached else math.inf,)
            assert required > (budget,)
            assert total_at(fronts, largest.max_error) <= budget
        # No single step fits into what is left.
        left = budget - largest.total_cost[0]
        for f, i in zip(fronts, largest.indices, strict=True):
            assert i + 1 == len(f) or f.cost[i + 1, 0] - f.cost[i, 0] > left
        least = min_sum(fronts, [budget])
        check_totals(fronts, least, budget)
        assert least.lower_bound - 1e-9 <= least.sum_error <= largest.sum_error + 1e-9
        assert least.sum_error <= least.lower_bound * 1.02 + 1e-9
        left = budget - least.total_cost[0]
        for f, i in zip(fronts, least.indices, strict=True):
            assert i + 1 == len(f) or f.cost[i + 1, 0] - f.cost[i, 0] > left


@pytest.mark.parametrize("solver", [min_max, min_sum])
def test_ties_go_in_the_order_of_the_layers(solver):
    same = [front([1, 2], [0.5, 0.0]) for _ in range(3)]
    assert solver(same, [4]).indices == (1, 0, 0)
    assert solver(same, [5]).indices == (1, 1, 0)


@pytest.mark.parametrize("solver", [min_max, min_sum])
def test_budgets_at_and_beyond_the_ends(solver):
    fronts = [front([3, 8], [0.4, 0.0]), front([2], [0.0]), front([1, 2, 4], [0.9, 0.3, 0.1])]
    assert solver(fronts, [6]).indices == (0, 0, 0)
    assert solver(fronts, [10**12]).indices == (1, 0, 2)
    assert solver([], [0]).indices == ()
    with pytest.raises(InfeasibleBudget, match=r"at least 6.*Received: budget=5") as info:
        solver(fronts, [5])
    assert (info.value.required, info.value.budget) == (6, 5)
    again = pickle.loads(pickle.dumps(info.value))
    assert (again.required, again.budget) == (6, 5)


def test_the_certificate_of_an_unreachable_threshold():
    fronts = [front([1, 2], [0.5, 0.2]), front([1], [0.4])]
    assert min_max(fronts, [9]).certificate == (0.2, (math.inf,))


@pytest.mark.parametrize("solver", [min_max, min_sum])
@pytest.mark.parametrize("bad", [front([], []), front([3, 4], [0.5, 0.1]).take([])])
def test_a_layer_without_choices(solver, bad):
    with pytest.raises(ValueError, match=r"at least one choice.* for layer 1"):
        solver([front([1], [0.5]), bad], [10])


@pytest.mark.parametrize("budget", [1.5, "10", None])
def test_budget_is_an_integer(budget):
    with pytest.raises(ValueError, match="Received: budgets="):
        min_max([front([1], [0.5])], [budget])


@pytest.mark.parametrize("name", METHODS)
def test_methods_stay_within_every_budget(name):
    method = get_method(name)
    rng = np.random.default_rng(0)
    shapes = [(3, 3, 4, 6), (8, 12), (3, 6, 8)]
    tables = [
        choice_table(
            spectra(rng.standard_normal(shape)),
            offered_ranks(shape, near_slices=method.near_slices),
            error_measure=method.error_measure,
        )
        for shape in shapes
    ]
    least = cheapest(tables)
    before = math.inf
    for budget in range(least, sum(int(np.prod(shape)) for shape in shapes) + 1):
        solution = method.solve(tables, [budget])
        rows = [table[i] for table, i in zip(tables, solution.indices, strict=True)]
        assert sum(row.cost[0] for row in rows) == solution.total_cost[0] <= budget
        assert all(row.keep for row in rows if row.error == 0)
        if name == "alds":
            assert solution.max_error <= before
            before = solution.max_error
    assert all(row.keep for row in rows)
    with pytest.raises(InfeasibleBudget):
        method.solve(tables, [least - 1])


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
def test_min_max_spends_what_is_left_on_ranks(seed, shapes, share):
    rng = np.random.default_rng(seed)
    tables = [choice_table(spectra(rng.standard_normal(shape))) for shape in shapes]
    least, most = cheapest(tables), sum(int(table.cost.max()) for table in tables)
    budget = least + round(share * (most - least))
    solution = min_max(tables, [budget])
    check_totals(tables, solution, budget)
    optimum = solution.lower_bound
    feasible = [t for t in {*np.concatenate([t.error for t in tables])} if t >= optimum]
    assert optimum in feasible
    assert total_at(tables, optimum) <= budget
    assert solution.max_error <= optimum
    left = budget - solution.total_cost[0]
    for table, index in zip(tables, solution.indices, strict=True):
        row, front = table[index], table.front()
        start = front[int(np.argmax(front.error <= optimum))]
        assert row.keep or row.slices == start.slices
        assert row.keep or row.rank >= start.rank
        more = (table.slices == row.slices) | (table.slices == 0)
        following = table.cost[more & (table.error < row.error), 0]
        assert following.size == 0 or following.min() - row.cost[0] > left


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budgets", [1, 2])
def test_min_sum_against_integer_programming(seed, budgets):
    """SciPy's exact solver of mixed-integer programs as a reference of another kind."""
    rng = np.random.default_rng(seed)
    tables = []
    for f in random_fronts(seed, 12, most=40):
        cost = np.hstack([f.cost, f.cost * int(rng.integers(1, 200))])[:, :budgets]
        tables.append(dataclasses.replace(f, cost=cost))
    low = sum(table.cost[0] for table in tables)
    high = sum(table.cost[-1] for table in tables)
    limits = low + (rng.uniform(0.1, 0.6, budgets) * (high - low)).astype(int)
    solution = min_sum(tables, limits)
    layer = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    rows = (layer == np.arange(len(tables))[:, None]).astype(float)
    reference = milp(
        np.concatenate([table.error for table in tables]),
        integrality=np.ones(layer.size),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(rows, 1, 1),
            LinearConstraint(np.concatenate([t.cost for t in tables]).T / limits[:, None], ub=1),
        ],
        options={"mip_rel_gap": 0},
    )
    assert reference.success
    assert solution.lower_bound <= reference.fun + 1e-9
    assert reference.fun - 1e-9 <= solution.sum_error <= 1.02 * reference.fun


def test_method_registry():
    assert get_method("alds").error_measure == "slice"
    assert get_method("energy").error_measure == "energy"
    changed = get_method("alds", error_measure="spectral")
    assert (changed.name, changed.error_measure) == ("alds", "spectral")
    assert changed.solve is min_max
    assert get_method("alds").error_measure == "slice"
    with pytest.raises(ValueError, match=r"'alds', .*'energy', .*Received: method='magic'"):
        get_method("magic")
    with pytest.raises(ValueError, match="Received: error_measure='magic'"):
        get_method("alds", error_measure="magic")
    with pytest.raises(TypeError):
        METHODS["magic"] = get_method("alds")
