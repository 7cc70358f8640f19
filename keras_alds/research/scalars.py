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

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keras_alds.core.choices import ChoiceTable
from keras_alds.core.solvers import (
    Chain,
    ChainOf,
    Solution,
    check_budgets,
    total_error,
    walks,
)


def one_scalar(
    tables: Sequence[ChoiceTable], budgets: Sequence[int], *, chain: ChainOf
) -> Solution:
    """Takes the most generous scalar whose choices are within the budgets, exactly.

    Where there are two budgets and the chain depends on what choices cost, the ratio of the
    budgets' prices is searched, and of all walks the one with the least sum of errors is taken.

    Args:
        tables: One table a layer.
        budgets: Largest total costs, integers, one or two.
        chain: What the scalar means: makes a layer's chain of its table and costs.

    Returns:
        The `Solution`; its lower bound is 0, since nothing is minimised over all layers.

    Raises:
        InfeasibleBudget: If the first choices of all chains together are above a budget.
        ValueError: As `check_budgets`.

    Example:
        >>> from keras_alds.core.choices import choice_table, offered_ranks
        >>> from keras_alds.core.spectra import spectra
        >>> tables = [
        ...     choice_table(spectra(kernel), offered_ranks(kernel.shape, near_slices=1))
        ...     for kernel in (np.eye(8), np.diag([4.0, 1.0, 1.0, 1.0]))
        ... ]
        >>> solution = one_scalar(tables, [40], chain=fractions_of_rank)
        >>> [table[row].rank for table, row in zip(tables, solution.indices, strict=True)]
        [2, 1]
    """
    limits = check_budgets(tables, budgets)
    found = [rows for rows, _ in walks(tables, limits, chain, together=True)]
    best = min(found, key=lambda rows: total_error(tables, rows))
    return Solution.of(tables, best, limits, 0.0)


def fractions_of_rank(table: ChoiceTable, cost: NDArray[Any]) -> Chain:
    """`"svd"`: a fraction p of the full rank r: the largest rank up to p·r, at least the first.

    From the fraction on at which the factors would weigh as much as the kernel, it stays whole.

    Args:
        table: The choices of a layer for one number of slices.
        cost: Not used: a fraction is one whatever ranks cost.

    Returns:
        The chain, by p.

    Example:
        >>> from keras_alds.core.choices import choice_table, offered_ranks
        >>> from keras_alds.core.spectra import spectra
        >>> table = choice_table(spectra(np.eye(6)), offered_ranks((6, 6), near_slices=1))
        >>> fractions_of_rank(table, table.cost[:, 0]).levels.tolist()
        [-inf, 0.3333333333333333, 0.5]
    """
    ranked, whole = _by_rank(table)
    levels = table.rank[ranked] / table.full_rank[ranked]
    if ranked.size and whole.size:
        row = ranked[-1]
        per_rank = int(table.weights[row]) // int(table.rank[row])
        even = int(table.weights[whole[0]]) / (per_rank * int(table.full_rank[row]))
        levels = np.append(levels, even)
    return Chain.of(np.append(ranked, whole), levels)


def errors_of_ranks(table: ChoiceTable, cost: NDArray[Any]) -> Chain:
    """`"svd-energy"`: the least rank with an error of at most t.

    Args:
        table: The choices of a layer for one number of slices.
        cost: What they cost; only their order matters.

    Returns:
        The chain, by −t.
    """
    front = table.front_rows(cost)
    error = table.error[front]
    # A row is taken as soon as t is below the error of the one before it.
    return Chain.of(front, -np.append(np.inf, error[:-1]))


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
    front = table.front_rows(cost)
    energy = 1 - table.error[front]
    drops = np.diff(energy) / energy[1:] / np.diff(cost[front])
    return Chain.of(front, -np.append(np.inf, drops))


def _by_rank(table: ChoiceTable) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of the factorized choices by rank, and the row of the whole kernel if there is one."""
    ranked = np.flatnonzero(table.slices > 0)
    return ranked[np.argsort(table.rank[ranked])], np.flatnonzero(table.slices == 0)
