"""The methods with one scalar for all layers, against their definitions by enumeration."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_alds.core.calibration.moments import SecondMoment
from keras_alds.core.choices import choice_table, offered_ranks
from keras_alds.core.costs import WeightCosts
from keras_alds.core.slicing import divisors, kernel_sizes, unfold, weights
from keras_alds.core.solvers import InfeasibleBudget
from keras_alds.core.spectra import spectra
from keras_alds.methods import METHODS, get_method
from keras_alds.research.pca import centred_spectra

SHAPES = [(8, 8), (3, 4, 6), (12, 5), (3, 3, 4, 8), (2, 2, 6, 4), (16, 3), (1, 1)]
KEEP = 0


class Layer:
    """A layer by its definition: what every rank costs, and its dropped energy."""

    def __init__(self, kernel, near, cost_per_weight, energies=None):
        c, kappa, f = kernel_sizes(kernel.shape)
        self.k = min(divisors(c), key=lambda k: (abs(k - near), k))
        self.full = min(c // self.k * kappa, f)
        per_rank = weights(kernel.shape, self.k, 1)
        self.even = Fraction(kernel.size, per_rank * self.full)
        self.cost = {
            j: j * per_rank * cost_per_weight
            for j in range(1, self.full + 1)
            if j * per_rank < kernel.size
        }
        self.cost[KEEP] = kernel.size * cost_per_weight
        if energies is None:
            parts = [np.linalg.svd(part, compute_uv=False) for part in unfold(kernel, self.k)]
            energies = np.square(parts).sum(axis=0)
        self.total = energies.sum()
        self.dropped = {j: energies[j:].sum() for j in self.cost}
        self.dropped[KEEP] = 0.0

    @property
    def ranks(self):
        """Ranks in ascending order, and then "keep"."""
        return [*sorted(j for j in self.cost if j), KEEP]


@st.composite
def problems(draw):
    """Kernels, some of them twice, units of cost, and a budget that can be reached."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4))
    kernels = [rng.standard_normal(shape) * rng.uniform(0.2, 3) for shape in shapes]
    if draw(st.booleans()):
        kernels.append(kernels[0].copy())
    units = [draw(st.integers(1, 9)) for _ in kernels]
    return kernels, units, draw(st.floats(0, 1.05))


def layers_and_solution(method, problem, moments=None):
    kernels, units, share = problem
    found = [spectra(kernel) for kernel in kernels]
    energies = [None] * len(kernels)
    if moments is not None:
        found = [centred_spectra(k, m) for k, m in zip(kernels, moments, strict=True)]
        energies = [
            variances(kernel, moment) for kernel, moment in zip(kernels, moments, strict=True)
        ]
    method = get_method(method)
    tables = [
        choice_table(
            s,
            offered_ranks(s.kernel_shape, near_slices=method.near_slices),
            [WeightCosts(((0, s.kernel_shape, unit),), unit)],
            error_measure=method.error_measure,
        )
        for s, unit in zip(found, units, strict=True)
    ]
    layers = [
        Layer(kernel, method.near_slices, unit, energy)
        for kernel, unit, energy in zip(kernels, units, energies, strict=True)
    ]
    least = sum(layer.cost[layer.ranks[0]] for layer in layers)
    most = sum(layer.cost[KEEP] for layer in layers)
    budget = least + round(share * (most - least))
    solution = method.solve(tables, [budget])
    rows = [table[i] for table, i in zip(tables, solution.indices, strict=True)]
    assert all(row.keep or row.slices == layer.k for row, layer in zip(rows, layers, strict=True))
    assert solution.total_cost[0] == sum(row.cost[0] for row in rows) <= budget
    assert solution.max_error == max(row.error for row in rows)
    return layers, budget, [row.rank for row in rows]


def total(layers, picks):
    return sum(layer.cost[pick] for layer, pick in zip(layers, picks, strict=True))


def most_generous(layers, budget, selections):
    """The last of some ever more generous selections that is within the budget."""
    within = [picks for picks in selections if total(layers, picks) <= budget]
    return max(within, key=lambda picks: total(layers, picks))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["svd", "alds-simple", "alds-simple-5"]), problems())
def test_the_same_fraction_of_rank(method, problem):
    layers, budget, found = layers_and_solution(method, problem)

    def at(layer, p):
        if p >= layer.even and len(layer.ranks) > 1:
            return KEEP
        return max([j for j in layer.ranks if 0 < j <= p * layer.full], default=layer.ranks[0])

    fractions = {Fraction(0)}
    for layer in layers:
        fractions |= {Fraction(j, layer.full) for j in layer.ranks} | {layer.even}
    selections = [[at(layer, p) for layer in layers] for p in fractions]
    assert found == most_generous(layers, budget, selections)


@settings(max_examples=100, deadline=None)
@given(problems())
def test_the_same_part_of_the_energy(problem):
    layers, budget, found = layers_and_solution("svd-energy", problem)
    relative = [{j: e / layer.total for j, e in layer.dropped.items()} for layer in layers]
    # Equal kernels have equal errors up to rounding: they step together.
    thresholds = sorted({round(e, 9) for errors in relative for e in errors.values()})
    selections = [
        [
            next(j for j in layer.ranks if errors[j] <= t + 1e-8)
            for layer, errors in zip(layers, relative, strict=True)
        ]
        for t in thresholds
    ]
    assert found == most_generous(layers, budget, selections)


@settings(max_examples=100, deadline=None)
@given(problems())
def test_one_price_for_cost(problem):
    layers, budget, found = layers_and_solution("l-rank", problem)
    prices = {0.0}
    for layer in layers:
        for a, b in itertools.combinations(layer.ranks, 2):
            prices.add((layer.dropped[a] - layer.dropped[b]) / (layer.cost[b] - layer.cost[a]))
    # Between two prices at which anything can change.
    prices = sorted(price for price in prices if price >= 0)
    distinct = [prices[0]] + [b for a, b in itertools.pairwise(prices) if b - a > 1e-9 * b]
    between = [(a + b) / 2 for a, b in itertools.pairwise(distinct)] + [2 * distinct[-1] + 1]
    selections = [
        [
            min(layer.ranks, key=lambda j, layer=layer: price * layer.cost[j] + layer.dropped[j])
            for layer in layers
        ]
        for price in between
    ]
    assert found == most_generous(layers, budget, selections)


def variances(kernel, moment):
    rows = unfold(kernel, 1)[0]
    covariance = rows.T @ (moment.blocks[0] - np.outer(moment.mean, moment.mean)) @ rows
    values = np.linalg.eigvalsh(covariance)[::-1][: min(rows.shape)]
    return np.maximum(values, 0)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_principal_components_go_greedily(problem):
    kernels, _, _ = problem
    rng = np.random.default_rng(len(kernels))
    moments = []
    for kernel in kernels:
        c, kappa, _ = kernel_sizes(kernel.shape)
        x = rng.standard_normal((60, c * kappa)) @ rng.standard_normal((c * kappa, c * kappa)) + 2
        moments.append(SecondMoment((x.T @ x / 60)[None], 60, x.mean(0)))
    layers, budget, found = layers_and_solution("pca", problem, moments)
    # Greedily: from the whole kernels on, drop what lowers the product of energies least per cost.
    picks = [KEEP] * len(layers)

    def drop(layer, pick):
        before = layer.ranks[layer.ranks.index(pick) - 1]
        energy = layer.total - layer.dropped[pick]
        loss = (layer.dropped[before] - layer.dropped[pick]) / energy
        return loss / (layer.cost[pick] - layer.cost[before])

    while total(layers, picks) > budget:
        drops = [
            (drop(layer, pick), n)
            for n, (layer, pick) in enumerate(zip(layers, picks, strict=True))
            if layer.ranks.index(pick)
        ]
        n = min(drops)[1]
        picks[n] = layers[n].ranks[layers[n].ranks.index(picks[n]) - 1]
    # The step from the last rank to the whole kernel may gain more per cost than the one before.
    monotone = all(
        drop(layer, a) >= drop(layer, b)
        for layer in layers
        for a, b in itertools.pairwise(layer.ranks[1:])
    )
    if monotone and len({kernel.tobytes() for kernel in kernels}) == len(kernels):
        assert found == picks
    assert total(layers, found) <= budget


@pytest.mark.parametrize("name", [name for name, m in METHODS.items() if m.near_slices])
def test_rank_multiples_and_limits_hold(name):
    method = get_method(name)
    rng = np.random.default_rng(0)
    tables = [
        choice_table(
            spectra(rng.standard_normal((3, 3, 12, 16))),
            offered_ranks(
                (3, 3, 12, 16), near_slices=method.near_slices, max_slices=2, rank_multiple=4
            ),
            error_measure=method.error_measure,
        )
        for _ in range(2)
    ]
    solution = method.solve(tables, [2000])
    for table, index in zip(tables, solution.indices, strict=True):
        assert table[index].keep or table[index].rank % 4 == 0
        assert table[index].slices <= min(2, method.near_slices)
    with pytest.raises(InfeasibleBudget):
        method.solve(tables, [10])
    assert method.solve([], [0]).indices == ()


@pytest.mark.parametrize(
    ("channels", "near", "expected"),
    [(16, 3, 2), (16, 5, 4), (12, 5, 4), (15, 4, 3), (9, 1, 1), (7, 3, 1), (6, 3, 3)],
)
def test_the_nearest_number_of_slices(channels, near, expected):
    assert set(offered_ranks((3, 3, channels, 16), near_slices=near)) == {expected}


def test_what_a_bias_costs_is_counted():
    kernel = np.random.default_rng(0).standard_normal((6, 6))

    def table(added, unit=1):
        offered = offered_ranks((6, 6), near_slices=1, added=added)
        costs = WeightCosts(((0, (6, 6), unit),), unit, added * unit)
        return choice_table(spectra(kernel), offered, [costs])

    plain, more = table(0, 3), table(6, 3)
    kept = more.slices == 0
    assert more.cost[kept] == plain.cost[plain.slices == 0]
    np.testing.assert_array_equal(more.cost[~kept, 0], more.weights[~kept] * 3 + 18)
    assert more.cost[~kept].max() < more.cost[kept]
    # 24 weights and a bias of 6 are less than 36; with a bias of 12 they are not.
    assert table(6).rank.max() == 2
    assert table(12).rank.max() == 1
