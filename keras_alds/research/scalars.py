"""One scalar for all layers: how the methods of the paper's comparison share a budget.

Such a method has a single number, a fraction of the rank, a part of the energy, a price λ, and
every layer's choice follows from it. As the number moves from its sparing end to its generous
one, a layer walks along a *chain* of its choices, and takes each at a *level* of the number. So
the total only changes at the levels of all chains: sorted and summed up once, they give the most
generous number within the budget exactly. Layers that step at the same level step together. What
is left of the budget is not spent, since a step in one layer alone would not be the method's.

The methods are those of arXiv 2107.11442, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keras_alds.core.choices import ChoiceTable
from keras_alds.core.solvers import InfeasibleBudget, Solution, check_budget, lower_hull


@dataclass(frozen=True, eq=False)
class Chain:
    """The choices that a layer takes one after another as the scalar gets more generous.

    Attributes:
        rows: Rows of the layer's table.
        levels: The scalar at which each of them is taken, not descending; −∞ for the first.
    """

    rows: NDArray[np.int64]
    levels: NDArray[np.float64]


#: Makes a layer's chain of its table and of what its choices cost.
ChainOf = Callable[[ChoiceTable, NDArray[Any]], Chain]


def one_scalar(tables: Sequence[ChoiceTable], budget: int, *, chain: ChainOf) -> Solution:
    """Takes the most generous scalar whose choices are within the budget, exactly.

    Args:
        tables: One table a layer.
        budget: Largest total cost, an integer.
        chain: What the scalar means: makes a layer's chain of its table and costs.

    Returns:
        The `Solution`; its lower bound is 0, since nothing is minimised over all layers.

    Raises:
        InfeasibleBudget: If the first choices of all chains together are above the budget.
        ValueError: If the budget is no integer.

    Example:
        >>> from keras_alds.core.choices import choice_table
        >>> from keras_alds.core.spectra import spectra
        >>> kernels = np.eye(8), np.diag([4.0, 1.0, 1.0, 1.0])
        >>> tables = [choice_table(spectra(kernel), near_slices=1) for kernel in kernels]
        >>> solution = one_scalar(tables, 40, chain=fractions_of_rank)
        >>> [table[row].rank for table, row in zip(tables, solution.indices, strict=True)]
        [2, 1]
    """
    budget = check_budget(budget)
    chains = [chain(table, table.cost) for table in tables]
    costs = [table.cost[c.rows] for table, c in zip(tables, chains, strict=True)]
    start = sum(int(cost[0]) for cost in costs)
    picks = [0] * len(chains)
    if chains:
        layer = np.concatenate([np.full(c.rows.size - 1, n) for n, c in enumerate(chains)])
        level = np.concatenate([c.levels[1:] for c in chains])
        step = np.concatenate([np.diff(cost) for cost in costs])
        order = np.argsort(level, kind="stable")
        totals = start + np.cumsum(step[order])
        last = np.append(np.diff(level[order]) > 0, True)[: order.size]
        within = np.flatnonzero(last & (totals <= budget))
        count = int(within[-1]) + 1 if within.size else 0
        for n in layer[order[:count]]:
            picks[int(n)] += 1
    total = sum(int(cost[i]) for cost, i in zip(costs, picks, strict=True))
    if total > budget:
        raise InfeasibleBudget(start, budget)
    indices = tuple(int(c.rows[i]) for c, i in zip(chains, picks, strict=True))
    errors = [float(t.error[i]) for t, i in zip(tables, indices, strict=True)]
    return Solution(indices, max(errors, default=0.0), math.fsum(errors), total, 0.0)


def fractions_of_rank(table: ChoiceTable, cost: NDArray[Any]) -> Chain:
    """`"svd"`: a fraction p of the full rank r: the largest rank up to p·r, at least the first.

    From the fraction on at which the factors would weigh as much as the kernel, it stays whole.

    Args:
        table: The choices of a layer for one number of slices.
        cost: Not used: a fraction is one whatever ranks cost.

    Returns:
        The chain, by p.

    Example:
        >>> from keras_alds.core.choices import choice_table
        >>> from keras_alds.core.spectra import spectra
        >>> table = choice_table(spectra(np.eye(6)), near_slices=1)
        >>> fractions_of_rank(table, table.cost).levels.tolist()
        [-inf, 0.3333333333333333, 0.5]
    """
    ranked, whole = _by_rank(table)
    levels = table.rank[ranked] / table.full_rank[ranked]
    if ranked.size and whole.size:
        row = ranked[-1]
        per_rank = int(table.weights[row]) // int(table.rank[row])
        even = int(table.weights[whole[0]]) / (per_rank * int(table.full_rank[row]))
        levels = np.append(levels, even)
    return _chain(np.append(ranked, whole), levels)


def errors_of_ranks(table: ChoiceTable, cost: NDArray[Any]) -> Chain:
    """`"svd-energy"`: the least rank with an error of at most t.

    Args:
        table: The choices of a layer for one number of slices.
        cost: What they cost; only their order matters.

    Returns:
        The chain, by −t.
    """
    front = _rows_of_front(table, cost)
    error = table.error[front]
    # A row is taken as soon as t is below the error of the one before it.
    return _chain(front, -np.append(np.inf, error[:-1]))


def hull_rates(table: ChoiceTable, cost: NDArray[Any]) -> Chain:
    """`"l-rank"`: the rank with the least λ·cost + error; of equal ones the least.

    The minimisers for all λ are the choices on the lower convex hull, each from the λ on at
    which the step to it saves as much error as it costs.

    Args:
        table: The choices of a layer.
        cost: What they cost.

    Returns:
        The chain, by −λ.

    References:
        Idelbayev and Carreira-Perpiñán, "Low-Rank Compression of Neural Nets: Learning the Rank
        of Each Layer", CVPR 2020, equation 5.
    """
    front = _rows_of_front(table, cost)
    hull = front[lower_hull(cost[front], table.error[front])]
    rates = -np.diff(table.error[hull]) / np.diff(cost[hull])
    return _chain(hull, -np.append(np.inf, rates))


def energy_drops(table: ChoiceTable, cost: NDArray[Any]) -> Chain:
    """`"pca"`: the ranks whose loss would lower the product of all layers' energies most per cost.

    Zhang et al. drop eigenvalues greedily, the one first that lowers Π_l Σ_{m≤j_l} λ_{l,m} least
    per cost: with E the energy of a choice, the relative drop (E_j − E_{j−1}) / E_j / Δcost.

    Args:
        table: The choices of a layer for one number of slices; errors are 1 − E.
        cost: What they cost.

    Returns:
        The chain, by the negative of the drop.

    References:
        Zhang et al., TPAMI 2016 (arXiv 1505.06798), section 3.3.
    """
    front = _rows_of_front(table, cost)
    energy = 1 - table.error[front]
    drops = np.diff(energy) / energy[1:] / np.diff(cost[front])
    return _chain(front, -np.append(np.inf, drops))


def _by_rank(table: ChoiceTable) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of the factorized choices by rank, and the row of the whole kernel if there is one."""
    ranked = np.flatnonzero(table.slices > 0)
    return ranked[np.argsort(table.rank[ranked])], np.flatnonzero(table.slices == 0)


def _rows_of_front(table: ChoiceTable, cost: NDArray[Any]) -> NDArray[np.int64]:
    """Rows with less error than every one that costs no more, by cost."""
    order = np.lexsort((table.rank, table.slices, table.error, cost))
    error = table.error[order]
    before = np.append(np.inf, np.minimum.accumulate(error)[:-1])
    return order[error < before]


def _chain(rows: NDArray[np.int64], levels: NDArray[np.float64]) -> Chain:
    levels = np.maximum.accumulate(np.append(-np.inf, levels[1:]))
    return Chain(rows.astype(np.int64), levels[: rows.size])
